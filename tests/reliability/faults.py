"""Faults for a daemon of the fork server, and a small job to try them on.

The first half runs inside the daemon: hooks, each a context manager that watches the operations of
`daemon.fs.durable` and stops the process, or fails one, at a chosen place. The second half runs in the test:
`Trial` is a job's folders and the daemons run on them, `Workers` runs trials two at a time.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import queue
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from daemon.executor.local import LocalExecutor
from daemon.fs import durable
from daemon.records import Batch, BatchResult
from tests.reliability import ledger
from tests.reliability.daemons import Daemons, Job
from tests.reliability.disk_model import Recorder
from tests.support import tiny

T = TypeVar("T")
R = TypeVar("R")

STRIDE = int(os.environ.get("LENSD_CRASH_STRIDE", "0"))  # of the points tried; 0: as each test chooses
KILLED = 137  # exit code of a process that a fault ended
PART_RECORDS = 4
HUNG_SECONDS = 60  # after which a daemon is killed, so that a hang is a failure and no hanging test

log = logging.getLogger(__name__)  # figures of a run: pytest --log-cli-level=info


# In the daemon


@contextlib.contextmanager
def traced(trace: str, act: Callable[[int, durable.Operation], None]) -> Iterator[None]:
    """Call `act` with each operation and its number, from 1, after writing both to the file `trace`.

    The samples that the model computes are written there too, so that a test sees what was computed again.
    One operation at a time: what `act` does is not overtaken by another thread's operation.
    """
    file = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    turn = threading.Lock()
    count = 0

    def note(**fields: object) -> None:
        os.write(file, json.dumps(fields).encode() + b"\n")

    def observe(operation: durable.Operation) -> None:
        nonlocal count
        with turn:
            count += 1
            target = str(operation.target) if operation.target else None
            note(number=count, name=operation.name, path=str(operation.path), target=target)
            act(count, operation)

    run = LocalExecutor.run

    async def run_and_note(executor: LocalExecutor, batch: Batch) -> BatchResult:
        entries = [(entry.part.part, entry.sample.sample.record_index) for entry in batch.entries]
        note(computed=[[part.file.unit, index] for part, index in entries])
        return await run(executor, batch)

    LocalExecutor.run = run_and_note  # type: ignore[method-assign]
    try:
        with durable.watch_operations(observe):
            yield
    finally:
        LocalExecutor.run = run  # type: ignore[method-assign]
        os.close(file)


def count(trace: str) -> contextlib.AbstractContextManager[None]:
    """Change nothing; leave the operations, numbered, and the samples computed in the file `trace`."""
    return traced(trace, lambda number, operation: None)


def exit_at(trace: str, n: int) -> contextlib.AbstractContextManager[None]:
    """End the process just before its n-th operation, with no chance to clean up."""

    def act(number: int, operation: durable.Operation) -> None:
        if number == n:
            os._exit(KILLED)

    return traced(trace, act)


def fail_at(
    trace: str, n: int, errno: int, name: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """Let the n-th operation, or the n-th called `name`, raise OSError instead of happening."""
    seen = 0

    def act(number: int, operation: durable.Operation) -> None:
        nonlocal seen
        if name in (None, operation.name):
            seen += 1
            if seen == n:
                raise OSError(errno, os.strerror(errno), str(operation.path))

    return traced(trace, act)


@contextlib.contextmanager
def record(recording: str, root: str) -> Iterator[None]:
    """Record what a disk would hold at each moment: see `tests.reliability.disk_model`."""
    with Recorder(Path(recording), Path(root)) as recorder, durable.watch_operations(recorder.observe):
        yield


# In the test


@dataclass(frozen=True, slots=True)
class Trace:
    """The trace of one run."""

    operations: tuple[dict[str, Any], ...]
    computed: frozenset[tuple[str, int]]  # unit and record_index of the samples computed

    @classmethod
    def read(cls, path: Path) -> Trace:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return cls(
            tuple(line for line in lines if "number" in line),
            frozenset((unit, index) for line in lines for unit, index in line.get("computed", ())),
        )

    def last(self) -> str:
        """The operation before which the run was stopped, for messages."""
        if not self.operations:
            return "no operation"
        operation = self.operations[-1]
        target = f" -> {operation['target']}" if operation["target"] else ""
        return f"{operation['number']}: {operation['name']} {operation['path']}{target}"


@dataclass(slots=True)
class Trial:
    """One inbox and outbox, what was dropped, and the daemons run there one after the other."""

    folder: Path
    dropped: dict[str, ledger.Dropped]
    runs: list[int] = field(default_factory=list)  # exit codes

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox"

    @classmethod
    def make(cls, folder: Path) -> Trial:
        """Several files and parts: good ones, bad records, files that must fail, and a duplicate."""
        for name in ("inbox", "outbox"):
            (folder / name).mkdir(parents=True)
        lines = [json.dumps(record) for record in tiny.contrast_records(13)]
        lines[2], lines[5], lines[6] = "{oops", '{"prompt": "only"}', '{"prompt": NaN}'
        many = "\n".join(lines).encode()
        packed = "\n".join(json.dumps({"text": f"some text {i}"}) for i in range(6)).encode()
        broken = "\n".join(json.dumps({"text": random.Random(i).randbytes(40).hex()}) for i in range(14))
        files = {
            "many.jsonl": (many, 13),
            "array.json": (json.dumps(tiny.contrast_records(3)).encode(), 3),
            "packed.jsonl.gz": (gzip.compress(packed, mtime=0), 6),
            "broken.json": (json.dumps(tiny.contrast_records(3)).encode()[:-9], None),
            "broken.jsonl.gz": (gzip.compress(broken.encode(), mtime=0)[:-20], None),
            "same.jsonl": (many, 13),
        }
        inbox = folder / "inbox"
        return cls(folder, {name: ledger.drop(inbox, name, *file) for name, file in files.items()})

    def run(self, daemons: Daemons, fault: Callable[..., Any] | None = None, **args: object) -> Trace:
        """Run a daemon with `fault`, a hook of this module, until the inbox is drained or it is stopped."""
        trace = self.folder / f"trace-{len(self.runs)}"
        hook = fault or count
        job = Job(
            self.inbox,
            self.outbox,
            self.log,
            flags={"inbox.part_records": PART_RECORDS},
            hook=f"{__name__}:{hook.__name__}",
            hook_args=args if hook is record else {"trace": str(trace), **args},
        )
        pid = daemons.start(job)
        watchdog = threading.Timer(HUNG_SECONDS, os.kill, (pid, signal.SIGKILL))
        watchdog.start()
        try:
            self.runs.append(daemons.wait(pid))
        finally:
            watchdog.cancel()
        return Trace.read(trace)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def drain(self, daemons: Daemons) -> tuple[Trace, list[str]]:
        """Run a daemon without a fault, and say all that is wrong afterwards."""
        trace = self.run(daemons)
        found = ledger.violations(self.inbox, self.outbox, self.dropped)
        if self.runs[-1] not in (0, 1):
            found.append(f"exit codes {self.runs}")
        return trace, found + self.complaints()

    def complaints(self) -> list[str]:
        """Tracebacks in the log."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line[-1500:] for line in lines if "Traceback" in line][:1]

    def published(self) -> list[str]:
        """The violations of the folders published so far, whether or not all is drained."""
        return ledger.published(self.outbox, self.dropped)[1]

    def checkpointed(self) -> set[tuple[str, int]]:
        """Unit and record_index of what lies in finished part files of units not yet published."""
        units = {path.name.rpartition("-")[2] for path in self.outbox.iterdir() if path.is_dir()}
        found: set[tuple[str, int]] = set()
        for part in self.outbox.glob(".staging/*/*.parts/*"):
            unit = part.parent.name.removesuffix(".parts")
            if part.name.isdecimal() and unit not in units:
                first = int(part.name) * PART_RECORDS
                found |= {(unit, index) for index in range(first, first + PART_RECORDS)}
        return found


class Workers:
    """Fork servers, each started when it is first needed, that work through many trials together."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self._idle: queue.Queue[Daemons | Path] = queue.Queue()
        for number in range(size):
            self._idle.put(folder / str(number))
        self._threads = ThreadPoolExecutor(size)

    def map(self, trial: Callable[[Daemons, T], R], items: Iterable[T]) -> list[R]:
        """`trial(daemons, item)` for each item, in their order."""

        def run(item: T) -> R:
            idle = self._idle.get()
            try:
                if isinstance(idle, Path):
                    idle = Daemons(idle)
                return trial(idle, item)
            finally:
                self._idle.put(idle)

        return list(self._threads.map(run, items))

    def close(self) -> None:
        self._threads.shutdown()
        while not self._idle.empty():
            idle = self._idle.get()
            if isinstance(idle, Daemons):
                idle.__exit__()


_workers = pytest.StashKey[Workers]()


def shared_workers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workers:
    """One pair of fork servers for all tests of a session: starting one costs seconds."""
    config = request.config
    if _workers not in config.stash:
        config.stash[_workers] = workers = Workers(tmp_path_factory.mktemp("workers"))
        config.add_cleanup(workers.close)
    return config.stash[_workers]


def check(problems: Iterable[str]) -> None:
    """Fail the test where anything is wrong, one line for each."""
    lines = list(problems)
    if lines:
        pytest.fail("\n".join([f"{len(lines)} violations", *lines[:40]]), pytrace=False)
