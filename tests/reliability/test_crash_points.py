"""A daemon is stopped at each of its operations on files in turn; the next one finishes its work."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability import faults, ledger
from tests.reliability.daemons import Daemons
from tests.reliability.faults import KILLED, STRIDE, Trial, Workers

pytestmark = pytest.mark.timeout(1800)  # for LENSD_CRASH_STRIDE=1; a daemon that hangs is killed long before

PAIRS = 60  # of two crashes in a row
SEED = 0
SHORTEST = 30  # operations of a daemon that finds nearly nothing left to do
SLACK = 20  # operations by which runs of one job differ, as threads meet differently


@pytest.fixture(scope="module")
def workers(request, tmp_path_factory) -> Workers:
    return faults.shared_workers(request, tmp_path_factory)


@pytest.fixture(scope="module")
def operations(workers, tmp_path_factory) -> int:
    """How many operations the job takes when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def drain(daemons: Daemons, folder: Path) -> int:
        trace, found = Trial.make(folder).drain(daemons)
        faults.check(found)
        return len(trace.operations)

    (total,) = workers.map(drain, [folder / "job"])
    return total


class Crashes:
    """Daemons stopped at given operations, one after the other, on one inbox; then one that is not."""

    def __init__(self, folder: Path, at: tuple[int, ...]) -> None:
        self.at = at
        self.trial = Trial.make(folder)
        self.found: list[str] = []
        self.stopped_before: list[str] = []
        self.kept_samples = 0  # that lay in part files when a daemon was started

    def run(self, daemons: Daemons) -> Crashes:
        for n in self.at:
            self._next(daemons, n)
            self.found += self.trial.published()
        self._next(daemons, None)
        if not self.found:
            shutil.rmtree(self.trial.folder)
        return self

    def _next(self, daemons: Daemons, n: int | None) -> None:
        kept = self.trial.checkpointed()
        if n is None:
            trace, found = self.trial.drain(daemons)
            self.found += found
        else:
            trace = self.trial.run(daemons, faults.exit_at, n=n)
            if self.trial.runs[-1] == KILLED:
                self.stopped_before.append(trace.last())
        self.kept_samples += len(kept)
        if again := kept & trace.computed:
            self.found.append(f"computed again though checkpointed: {sorted(again)}")

    @property
    def problems(self) -> list[str]:
        """Everything wrong, with the operations that it takes to see it again."""
        return [f"{self.stopped_before}: {problem} ({self.trial.folder})" for problem in self.found]


def crash(workers: Workers, folder: Path, points: list[tuple[int, ...]]) -> list[Crashes]:
    def run(daemons: Daemons, at: tuple[int, ...]) -> Crashes:
        return Crashes(folder / "-".join(map(str, at)), at).run(daemons)

    return workers.map(run, points)


def test_a_crash_before_any_operation_loses_and_repeats_nothing(workers, operations, tmp_path):
    stride = STRIDE or 4
    crashes = crash(workers, tmp_path, [(n,) for n in range(1, operations + SLACK, stride)])
    stopped = [crash for crash in crashes if crash.stopped_before]
    faults.log.info("operations: %s", operations)
    faults.log.info("points: %s", len(stopped))
    faults.check(problem for crash in crashes for problem in crash.problems)
    assert len(stopped) >= (operations - SLACK) // stride
    assert any(crash.kept_samples for crash in crashes), "no crash left a part file: nothing was resumed"


def test_a_crash_while_recovering_from_a_crash_loses_and_repeats_nothing(workers, operations, tmp_path):
    chance = random.Random(SEED)
    firsts = [chance.randint(1, operations) for _ in range(PAIRS)]
    pairs = [(first, chance.randint(1, max(SHORTEST, operations - first))) for first in firsts]
    crashes = crash(workers, tmp_path, pairs)
    twice = [crash for crash in crashes if len(crash.stopped_before) == 2]
    faults.log.info("pairs: %s", len(twice))
    faults.check(problem for crash in crashes for problem in crash.problems)
    assert len(twice) >= PAIRS // 2


@pytest.fixture(scope="module")
def drained(workers, tmp_path_factory) -> Trial:
    """The job's folders after an undisturbed run."""

    def drain(daemons: Daemons, folder: Path) -> Trial:
        trial = Trial.make(folder)
        trial.drain(daemons)
        return trial

    return workers.map(drain, [tmp_path_factory.mktemp("drained") / "job"])[0]


def many(trial: Trial) -> Path:
    """The published folder of the file of many parts, under whichever of its two names."""
    return next(iter([*trial.outbox.glob("many-*"), *trial.outbox.glob("same-*")]))


def forget_a_reject(trial: Trial) -> None:
    lines = (many(trial) / "rejects.jsonl").read_bytes().splitlines(keepends=True)
    (many(trial) / "rejects.jsonl").write_bytes(b"".join(lines[:-1]))


def count_another_record(trial: Trial) -> None:
    manifest = json.loads((many(trial) / "manifest.json").read_text())
    (many(trial) / "manifest.json").write_text(json.dumps(manifest | {"records": 14}))


def flip_a_bit(trial: Trial) -> None:
    path = many(trial) / "features.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def swap_rows(trial: Trial) -> None:
    other = next(trial.outbox.glob("packed-*"))
    shutil.copy(other / "metrics.parquet", many(trial) / "metrics.parquet")


def swap_texts(trial: Trial) -> None:
    """With a manifest that knows of it."""
    folder, other = many(trial), next(trial.outbox.glob("packed-*"))
    shutil.copy(other / "texts.parquet", folder / "texts.parquet")
    manifest, its = (json.loads((one / "manifest.json").read_text()) for one in (folder, other))
    (texts,) = [file for file in its["files"] if file["name"] == "texts.parquet"]
    files = [texts if file["name"] == texts["name"] else file for file in manifest["files"]]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))


def publish_twice(trial: Trial) -> None:
    unit = many(trial).name.rpartition("-")[2]
    shutil.copytree(many(trial), trial.outbox / f"again-{unit}")


def move(source: str, target: str) -> Callable[[Trial], None]:
    return lambda trial: shutil.move(trial.folder / source, trial.folder / target)


WRONGS: dict[str, tuple[Callable[[Trial], object], str]] = {
    "a reject is missing": (forget_a_reject, "not 10 and 3"),
    "a record too many": (count_another_record, "10 rows + 3 rejects != 14 records"),
    "a bit flipped": (flip_a_bit, "features.parquet: sha256"),
    "rows of another file": (swap_rows, "is not each of 0..12 once"),
    "texts of another file": (swap_texts, "texts.parquet is not about the records"),
    "a table is missing": (lambda trial: (many(trial) / "metrics.parquet").unlink(), "its manifest lists"),
    "no manifest": (lambda trial: (many(trial) / "manifest.json").unlink(), "not readable as results"),
    "published twice": (publish_twice, "2 folders"),
    "no results": (lambda trial: shutil.rmtree(many(trial)), "in done/ without results"),
    "a source is gone": (
        lambda trial: (trial.inbox / "done/same.jsonl").unlink(),
        "dropped 2 times, 1 in done/",
    ),
    "a source is back": (move("inbox/done/array.json", "inbox/array.json"), "inbox/array.json: not taken up"),
    "no reason": (
        lambda trial: (trial.inbox / "failed/broken.json.reason.json").unlink(),
        "failed/broken.json: no reason",
    ),
    "a reason alone": (
        lambda trial: (trial.inbox / "failed/broken.json").unlink(),
        "failed/broken.json.reason.json: its file is not there",
    ),
    "a bad file accepted": (move("inbox/failed/broken.json", "inbox/done/broken.json"), "must fail"),
    "a good file failed": (move("inbox/done/array.json", "inbox/failed/array.json"), "not in done/"),
    "a claim left": (lambda trial: (trial.inbox / ".claimed/host-1/1").mkdir(parents=True), "left over"),
    "staging left": (lambda trial: (trial.outbox / ".staging/host-1").mkdir(parents=True), "left over"),
}


@pytest.mark.parametrize("wrong", WRONGS)
def test_the_ledger_sees_what_is_wrong(drained, tmp_path, wrong):
    spoil, expected = WRONGS[wrong]
    trial = Trial(tmp_path / "job", drained.dropped)
    shutil.copytree(drained.folder, trial.folder, symlinks=True)
    assert ledger.violations(trial.inbox, trial.outbox, trial.dropped) == []
    spoil(trial)
    found = ledger.violations(trial.inbox, trial.outbox, trial.dropped)
    assert any(expected in violation for violation in found), found
