"""A Ray cluster of one node on this machine, in processes that a test may kill."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

WORKER = "ray::Worker"  # how Ray names the process of an actor of lensd


class RayHead:
    """The head of a cluster. Start it anew as often as it was killed; it listens where it did."""

    def __init__(self, cpus: int) -> None:
        self.cpus = cpus
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which the head and whoever works with it must run."""
        return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}

    def start(self) -> None:
        """Returns once it takes connections."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", f"--port={self.port}", f"--num-cpus={self.cpus}"]
        command += ["--include-dashboard=false", "--disable-usage-stats", "--object-store-memory=200000000"]
        command.append(f"--temp-dir={self._temporary()}")
        self._process = subprocess.Popen(
            command,
            env=os.environ | self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not listens(self.port):
            if self._process.poll() is not None:
                raise RuntimeError(f"ray start ended with {self._process.returncode}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)

    def _temporary(self) -> str:
        """A short path: Ray puts sockets there, whose names may have 107 characters."""
        return tempfile.mkdtemp(prefix="r", dir="/tmp")

    def workers(self) -> list[int]:
        """The process ids of the workers there are."""
        return [pid for pid, name in self._family() if name.startswith(WORKER)]

    def kill(self) -> None:
        """SIGKILL to every process of the cluster, and to every worker."""
        for pid, _ in self._family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait()
            self._process = None

    def _family(self) -> list[tuple[int, str]]:
        """The head's process and all that descend from it, with their command lines."""
        if self._process is None:
            return []
        found, parents = [], {self._process.pid}
        processes = list(all_processes())
        grown = True
        while grown:
            more = {pid for pid, parent, _ in processes if parent in parents} - parents
            parents |= more
            grown = bool(more)
        found = [(pid, name) for pid, _, name in processes if pid in parents]
        return found or [(self._process.pid, "")]


def all_processes() -> Iterator[tuple[int, int, str]]:
    """Process id, parent and command line of every process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(entry.name), parent, (entry / "cmdline").read_text().replace("\0", " ")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
