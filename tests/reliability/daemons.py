"""Starts daemons quickly: one process loads torch and a tiny model, and forks for each daemon.

Each daemon is a process of its own that runs the real service with the real engine; only what it would spend
five seconds on, importing and loading, is inherited. `Daemons` is the handle a test holds; run as a module,
this file is the process that forks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from daemon import cli
from daemon.config import load_config
from daemon.errors import LensdError
from daemon.model_wiring import load_compute
from daemon.observe.logs import configure
from daemon.service import serve
from tests.support import tiny

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Job:
    """The settings and hook of one daemon.

    `flags` are dotted settings as on the command line, `environment` is added to the process's. `hook`,
    `module:function`, is called in the new process with `hook_args` and must return a context manager, within
    which the service runs.
    """

    inbox: Path
    outbox: Path
    log: Path
    once: bool = True
    flags: dict[str, Any] | None = None
    hook: str | None = None
    hook_args: dict[str, Any] | None = None
    environment: dict[str, str] | None = None

    def as_json(self) -> str:
        flags = {
            "inbox.path": str(self.inbox),
            "outbox.path": str(self.outbox),
            "inbox.settle_seconds": 0,
            "inbox.rescan_seconds": 0.2,
            "http.enabled": False,
            **(self.flags or {}),
        }
        return json.dumps(
            {
                "flags": flags,
                "once": self.once,
                "log": str(self.log),
                "hook": self.hook,
                "hook_args": self.hook_args or {},
                "environment": self.environment or {},
            }
        )


class Daemons:
    """A process that forks daemons. Use as a context manager; `folder` receives the tiny model."""

    def __init__(self, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.daemons", str(folder)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._alive: set[int] = set()
        assert self._answer() == "ready"

    def __enter__(self) -> Daemons:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in list(self._alive):
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def start(self, job: Job) -> int:
        """Fork a daemon; its process id."""
        pid = int(self._ask(f"start {job.as_json()}"))
        self._alive.add(pid)
        return pid

    def wait(self, pid: int) -> int:
        """The daemon's exit code once it ended, negative where a signal ended it."""
        code = int(self._ask(f"wait {pid}"))
        self._alive.discard(pid)
        return code

    def run(self, job: Job) -> int:
        """Start a daemon and wait for its end."""
        return self.wait(self.start(job))

    def kill(self, pid: int) -> int:
        """SIGKILL; the exit code, which tells whether it ended before."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.wait(pid)

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def forker(folder: Path) -> None:
    """Answer commands on standard input until it ends."""
    torch.set_num_threads(1)  # no thread may exist when a daemon is forked
    with contextlib.redirect_stdout(sys.stderr):
        folder.mkdir(parents=True, exist_ok=True)
        toml = folder / "lensd.toml"
        toml.write_text(tiny.make_tiny(folder).toml())
        compute = load_compute(load_config(toml, {}, {}))
    gc.collect()
    gc.freeze()  # else each daemon looks through all of it again when it has "loaded" it: half of its time
    answer("ready")
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        if command == "wait":
            answer(os.waitstatus_to_exitcode(os.waitpid(int(argument), 0)[1]))
            continue
        pid = os.fork()
        if pid:
            answer(pid)
            continue
        code = 70
        try:
            code = serve_job(toml, json.loads(argument), compute)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def serve_job(toml: Path, job: dict[str, Any], compute: Any) -> int:
    """One daemon, in the forked process, with the exit codes of `lensd run`."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(2, 1)
    configure("json", "info")
    os.environ.update(job["environment"])
    config = load_config(toml, {}, job["flags"])
    with hooked(job):
        try:
            tokenizer = compute.tokenizer.limited(config.batching.max_text_tokens)
            limited = dataclasses.replace(compute, tokenizer=tokenizer)
            tally = serve(config, once=job["once"], load=lambda _: limited)
        except (LensdError, OSError) as error:
            return cli.complain(error, cli.exit_code(error))
    return cli.SOME_FAILED if job["once"] and (tally.failed or tally.left) else cli.DONE


@contextlib.contextmanager
def hooked(job: dict[str, Any]) -> Iterator[None]:
    if job["hook"] is None:
        yield
        return
    module, _, function = job["hook"].partition(":")
    with getattr(importlib.import_module(module), function)(**job["hook_args"]):
        yield


def answer(value: object) -> None:
    sys.stdout.write(f"{value}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    forker(Path(sys.argv[1]))
