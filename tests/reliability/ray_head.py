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
        head = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={temporary()}"]
        self._process = self._node(self.cpus, *head)
        while not listens(self.port):
            if self._process.poll() is not None:
                raise RuntimeError(f"ray start ended with {self._process.returncode}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(0.2)

    def _temporary(self) -> str:
        """A short path: Ray puts sockets there, whose names may have 107 characters."""
        return tempfile.mkdtemp(prefix="r", dir="/tmp")

    def add_node(self, cpus: int) -> subprocess.Popen[bytes]:
        """Have one more node join, which also runs on this machine."""
        return self._node(cpus, f"--address={self.address}")

    def remove_node(self, node: subprocess.Popen[bytes]) -> None:
        kill_family(node)

    def _node(self, cpus: int, *more: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={cpus}"]
        command += ["--node-ip-address=127.0.0.1", "--disable-usage-stats", "--object-store-memory=200000000"]
        return subprocess.Popen(
            [*command, *more],
            env=os.environ | self.environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def workers(self) -> list[int]:
        """The process ids of the workers on the head."""
        return (
            [pid for pid, name in family(self._process) if name.startswith(WORKER)] if self._process else []
        )

    def kill(self) -> None:
        """SIGKILL to every process of the head, and to every worker on it."""
        if self._process is not None:
            kill_family(self._process)
            self._process = None


def kill_family(process: subprocess.Popen[bytes]) -> None:
    for pid, _ in family(process):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def family(process: subprocess.Popen[bytes]) -> list[tuple[int, str]]:
    """A process and all that descend from it, with their command lines."""
    processes = list(all_processes())
    members, grown = {process.pid}, True
    while grown:
        more = {pid for pid, parent, _ in processes if parent in members} - members
        members |= more
        grown = bool(more)
    return [(pid, name) for pid, _, name in processes if pid in members]


def temporary() -> str:
    """A short path: Ray puts sockets there, whose names may have 107 characters."""
    return tempfile.mkdtemp(prefix="r", dir="/tmp")


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
