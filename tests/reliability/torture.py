"""Kills the daemon at random moments under load, again and again, then counts every record.

`make torture KILLS=200`. The same seed drops the same files and kills after the same delays; what the
daemon was doing then differs from run to run. Also holds what the other tools here share: `Feed`, which
drops files of every kind and remembers them, `recount`, and the hooks that run inside a daemon.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pyarrow.parquet as pq
import pytest
import zstandard

from daemon import durable
from daemon.compute.device import Study
from daemon.compute.packing import Batch
from daemon.records import Block
from tests.reliability.daemons import Daemons, Job
from tests.reliability.ledger import Dropped, violations

PART_RECORDS = 16
WAITING = 40  # files kept in the inbox
NAMES_AGAIN = 0.1  # share of the files that are dropped under a name used before
HUNG_SECONDS = 60  # after which a daemon told to end is killed
PATIENCE_SECONDS = 5  # of a daemon that is to kill itself at some step
SETTINGS: dict[str, Any] = {
    "inbox.part_records": PART_RECORDS,
    "inbox.max_attempts": 1000,  # being there at a kill costs an attempt, and that is not what is tested here
}

Kind = Literal["single", "json", "jsonl", "parts", "gzip", "zstd", "bad_records", "duplicate", "unusable"]
KINDS: dict[Kind, int] = {
    "single": 4,
    "json": 4,
    "jsonl": 4,
    "parts": 3,
    "gzip": 1,
    "zstd": 1,
    "bad_records": 2,
    "duplicate": 1,
    "unusable": 1,
}

Moment = Literal["immediate", "start", "work", "step"]
MOMENTS: dict[Moment, int] = {"immediate": 1, "start": 2, "work": 4, "step": 4}
DELAYS: dict[Moment, tuple[float, float]] = {
    "immediate": (0.0, 0.02),
    "start": (0.02, 0.2),
    "work": (0.2, 0.9),
}


_daemons = pytest.StashKey[Daemons]()


@dataclass(frozen=True, slots=True)
class Content:
    """What a file holds; `records` None where it must fail."""

    suffix: str
    raw: bytes
    records: int | None


class Feed:
    """Drops files into an inbox and remembers them in `dropped`. Same seed, same files."""

    def __init__(self, inbox: Path, rng: random.Random, kinds: dict[Kind, int] = KINDS) -> None:
        inbox.mkdir(parents=True, exist_ok=True)
        self.inbox = inbox
        self.dropped: dict[str, Dropped] = {}  # by a name of its own, whatever name it was dropped under
        self._rng = rng
        self._kinds = kinds
        self._recent: list[Content] = []

    @property
    def records(self) -> int:
        """In all different contents that can be used."""
        return sum({entry.sha256: entry.records or 0 for entry in self.dropped.values()}.values())

    def waiting(self) -> int:
        return len(waiting(self.inbox))

    def top_up(self, files: int) -> None:
        """Drop files until so many wait."""
        for _ in range(files - self.waiting()):
            self.drop()

    def drop(self, kind: Kind | None = None) -> str:
        """Let one more file appear, whole; its name. Now and then a name that is in use is used again."""
        if kind is None:
            (kind,) = self._rng.choices(list(self._kinds), list(self._kinds.values()))
        content = self._content(kind)
        again = self._rng.random() < NAMES_AGAIN
        return self.place(content, f"again{content.suffix}" if again else None)

    def place(self, content: Content, name: str | None = None) -> str:
        """Drop a file, under `name` where none waits under it."""
        serial = len(self.dropped)
        draft = self.inbox / ".draft"
        draft.write_bytes(content.raw)
        unique = f"{serial:06}{content.suffix}"
        if name is None or not durable.move_without_replacing(draft, self.inbox / name):
            name = unique
            draft.rename(self.inbox / name)
        self.dropped[unique] = Dropped(content.records, hashlib.sha256(content.raw).hexdigest())
        return name

    def _content(self, kind: Kind) -> Content:
        if kind == "duplicate" and self._recent:
            return self._rng.choice(self._recent)
        content = self._new_content(kind)
        if content.records is not None:
            self._recent = [*self._recent[-20:], content]
        return content

    def _new_content(self, kind: Kind) -> Content:
        rng, serial = self._rng, len(self.dropped)
        lines = [as_json(serial, number) for number in range(rng.randint(1, PART_RECORDS - 1))]
        if kind == "parts":
            lines = [as_json(serial, number) for number in range(rng.randint(2, 5) * PART_RECORDS + 1)]
            return Content(".jsonl", joined(lines), len(lines))
        if kind == "gzip":
            return Content(".jsonl.gz", gzip.compress(joined(lines), mtime=0), len(lines))
        if kind == "zstd":
            return Content(".jsonl.zst", zstandard.compress(joined(lines)), len(lines))
        if kind == "bad_records":
            lines = [as_json(serial, number) for number in range(3 * PART_RECORDS)]
            for number in rng.sample(range(1, len(lines)), 10):  # the first says which recipe it is
                lines[number] = rng.choice(['{"prompt": "only"}', "{oops", "[]"])
            return Content(".jsonl", joined(lines), len(lines))
        if kind == "unusable":
            whole = gzip.compress(joined([as_json(serial, number) for number in range(3 * PART_RECORDS)]))
            broken = [
                (".json", f"[{', '.join(lines)}".encode()),
                (".jsonl.gz", whole[:-20]),  # fails when some of it is read
                (".png", f"picture {serial}".encode()),
            ]
            return Content(*rng.choice(broken), None)
        if kind == "single":
            return Content(".json", f"[{lines[0]}]".encode(), 1)
        if kind == "jsonl":
            return Content(".jsonl", joined(lines), len(lines))
        return Content(".json", f"[{', '.join(lines)}]".encode(), len(lines))


def as_json(serial: int, number: int) -> str:
    """One record, unlike every other."""
    return json.dumps(
        {
            "id": f"{serial}-{number}",
            "prompt": f"File {serial} says " + "once " * (number % 5) + f"that {number} is",
            "fact": str(number),
            "hallucination": str(number + 1 + serial % 3),
        }
    )


def joined(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


@dataclass(frozen=True, slots=True)
class Recount:
    """Records of different contents: wanted, found at least once, found again."""

    records: int
    lost: int
    duplicated: int


def recount(outbox: Path, dropped: dict[str, Dropped]) -> Recount:
    """Every record in the outbox, counted without believing any manifest's numbers."""
    wanted = {(d.sha256, index) for d in dropped.values() for index in range(d.records or 0)}
    found: Counter[tuple[str, int]] = Counter()
    for path in outbox.glob("[!.]*/manifest.json"):
        sha256 = json.loads(path.read_bytes())["input"]["sha256"]
        found.update((sha256, index) for index in record_indices(path.parent))
    return Recount(len(wanted), len(wanted - found.keys()), found.total() - len(found))


def record_indices(folder: Path) -> list[int]:
    """Of every row and every reject in a published folder."""
    indices: list[int] = pq.read_table(folder / "metrics.parquet", columns=["record_index"])[0].to_pylist()
    rejects = folder / "rejects.jsonl"
    if rejects.exists():
        indices += [json.loads(line)["record_index"] for line in rejects.read_bytes().splitlines()]
    return indices


@contextlib.contextmanager
def dying_at(step: int) -> Iterator[None]:
    """A hook: the process kills itself just before its `step`-th operation on disk.

    Where it comes to no such step it dies anyway, by SIGALRM, after some seconds.
    """
    left = step

    def observe(_: durable.Operation) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    signal.alarm(PATIENCE_SECONDS)
    with durable.watch_operations(observe):
        yield


@contextlib.contextmanager
def poisoned(prefix: str) -> Iterator[None]:
    """A hook: a batch with a sample whose id starts so kills the process."""

    def before(batch: Batch) -> None:
        if any(entry.sample.sample_id.startswith(prefix) for entry in batch.samples):
            os.kill(os.getpid(), signal.SIGKILL)

    with before_each_batch(before):
        yield


@contextlib.contextmanager
def gated(reached: str, go: str) -> Iterator[None]:
    """A hook: the device makes the file `reached`, then waits for the file `go` before it works."""

    def before(_: Batch) -> None:
        Path(reached).touch()
        while not Path(go).exists():
            time.sleep(0.01)

    with before_each_batch(before):
        yield


@contextlib.contextmanager
def blind_watcher() -> Iterator[None]:
    """A hook: the folder's watcher works and reports nothing."""

    async def nothing(*_: object, stop_event: asyncio.Event, **options: object) -> AsyncIterator[None]:
        await stop_event.wait()
        for _ in ():
            yield

    with mock.patch("watchfiles.awatch", nothing):
        yield


@contextlib.contextmanager
def as_user(uid: int) -> Iterator[None]:
    """A hook: from here on the process is this user, for good."""
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)
    yield


@contextlib.contextmanager
def before_each_batch(before: Callable[[Batch], None]) -> Iterator[None]:
    run = Study.run

    def call(study: Study, batch: Batch) -> Block:
        before(batch)
        return run(study, batch)

    with mock.patch.object(Study, "run", call):
        yield


def wait_until(condition: Callable[[], object], what: str, *pids: int, seconds: float = 60) -> None:
    """Raises TimeoutError if `what` does not come, at once if one of the daemons it is to come from ended."""
    limit = time.monotonic() + seconds
    while not condition():
        gone = [pid for pid in pids if ended(pid)]
        if gone or time.monotonic() > limit:
            why = f"daemon {gone[0]} ended" if gone else f"after {seconds:.0f} s"
            raise TimeoutError(f"waited in vain for {what}: {why}")
        time.sleep(0.02)


def shared_daemons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Daemons:
    """For fixtures: one fork server for all tests of a session, since starting one costs seconds."""
    config = request.config
    if _daemons not in config.stash:
        config.stash[_daemons] = daemons = Daemons(tmp_path_factory.mktemp("daemons"))
        config.add_cleanup(daemons.__exit__)
    return config.stash[_daemons]


@contextlib.contextmanager
def running(daemons: Daemons, job: Job) -> Iterator[int]:
    """The process id of a daemon that is told to end with the block, and must then end in order."""
    pid = daemons.start(job)
    try:
        yield pid
    except BaseException:
        daemons.kill(pid)
        raise
    assert end(daemons, pid) == 0, job.log


def end(daemons: Daemons, pid: int) -> int:
    """Tell a daemon to end; its exit code, -9 where it did not."""
    os.kill(pid, signal.SIGTERM)
    watchdog = threading.Timer(HUNG_SECONDS, os.kill, (pid, signal.SIGKILL))
    watchdog.start()
    code = daemons.wait(pid)
    watchdog.cancel()
    return code


def events(log: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a daemon's log about one event."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    parsed = (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}"))
    return [event for event in parsed if event["event"] == name]


def ended(pid: int) -> bool:
    """Whether a daemon ended by itself; nobody waited for it yet."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def waiting(inbox: Path) -> list[str]:
    """Names of the files that nobody works on yet."""
    with os.scandir(inbox) as entries:
        return [
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False)
        ]


def claimed(inbox: Path) -> list[Path]:
    """Files that some daemon, alive or dead, works on."""
    return list(inbox.glob(".claimed/*/*/*"))


@dataclass(frozen=True, slots=True)
class Report:
    kills: int
    files: int
    recount: Recount
    seconds: float
    violations: list[str]

    def __str__(self) -> str:
        return (
            f"kills {self.kills}  files {self.files}  records {self.recount.records}"
            f"  lost {self.recount.lost}  duplicated {self.recount.duplicated}"
            f"  seconds {self.seconds:.0f}  violations {len(self.violations)}"
        )


class Torture:
    """One inbox, one outbox, one daemon at a time that does not live long."""

    def __init__(
        self, daemons: Daemons, folder: Path, seed: int, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._daemons = daemons
        self._rng = random.Random(seed)
        self._say = say
        self._log = folder / "log"
        self._outbox = folder / "outbox"
        self._feed = Feed(folder / "inbox", self._rng)

    def run(self, kills: int) -> Report:
        """Kill so many times, let a last daemon drain what is left, and check all of it."""
        began = time.monotonic()
        wrong: list[str] = []
        killed = 0
        while killed < kills and not wrong:
            self._feed.top_up(WAITING)
            code = self._start_and_kill()
            if code in (-signal.SIGKILL, -signal.SIGALRM):
                killed += 1
            else:
                wrong.append(f"a daemon ended by itself with exit code {code}: see {self._log}")
            if killed % 20 == 0:
                self._say(f"{killed} kills, {len(self._feed.dropped)} files, {self._feed.waiting()} waiting")
        code = self._daemons.run(self._job(once=True))
        unusable = any(entry.records is None for entry in self._feed.dropped.values())
        if code not in ((0, 1) if unusable else (0,)):
            wrong.append(f"the last daemon ended with exit code {code}: see {self._log}")
        wrong += violations(self._feed.inbox, self._outbox, self._feed.dropped)
        return Report(
            kills=killed,
            files=len(self._feed.dropped),
            recount=recount(self._outbox, self._feed.dropped),
            seconds=time.monotonic() - began,
            violations=wrong,
        )

    def _start_and_kill(self) -> int:
        (moment,) = self._rng.choices(list(MOMENTS), list(MOMENTS.values()))
        if moment == "step":
            step = round(10 ** self._rng.uniform(0, 2.5))
            return self._daemons.wait(self._daemons.start(self._job(step=step)))
        pid = self._daemons.start(self._job())
        time.sleep(self._rng.uniform(*DELAYS[moment]))
        return self._daemons.kill(pid)

    def _job(self, *, once: bool = False, step: int | None = None) -> Job:
        return Job(
            self._feed.inbox,
            self._outbox,
            self._log,
            once=once,
            flags=SETTINGS,
            hook=None if step is None else "tests.reliability.torture:dying_at",
            hook_args=None if step is None else {"step": step},
        )


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def finish(wrong: list[str], folder: Path) -> int:
    """An exit code. The first violations are shown and the folder is left where there are any."""
    for line in wrong[:20]:
        say(f"VIOLATION {line}")
    if wrong:
        say(f"left for a look: {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="lensd-torture-"))
    with Daemons(folder / "tiny") as daemons:
        report = Torture(daemons, folder, args.seed, say).run(args.kills)
    say(str(report))
    return finish(report.violations, folder)


if __name__ == "__main__":
    sys.exit(main())
