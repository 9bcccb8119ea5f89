"""Power fails after each operation in turn: what was not flushed is gone, and nothing that was promised."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path

import pytest

from daemon.fs import durable
from tests.reliability import disk_model, faults
from tests.reliability.daemons import Daemons
from tests.reliability.disk_model import LOSSES, Found, Loss, Recording
from tests.reliability.faults import STRIDE, Trial, Workers

pytestmark = pytest.mark.timeout(1800)  # for LENSD_CRASH_STRIDE=1; a daemon that hangs is killed long before


@pytest.fixture(scope="module")
def workers(request, tmp_path_factory) -> Workers:
    return faults.shared_workers(request, tmp_path_factory)


@dataclass(frozen=True, slots=True)
class Failure:
    """A moment at which power fails, and what that leaves."""

    description: str
    left: dict[str, Found]


def recorded(workers: Workers, folder: Path, crash_at: int | None = None) -> tuple[Trial, Recording]:
    """A recorded run of the job; with `crash_at`, of the daemon that comes after a crash there."""

    def run(daemons: Daemons, folder: Path) -> Trial:
        trial = Trial.make(folder)
        if crash_at is not None:
            trial.run(daemons, faults.exit_at, n=crash_at)
            assert trial.runs == [faults.KILLED]
        trial.run(daemons, faults.record, recording=str(folder / "recording"), root=str(folder))
        assert trial.runs[-1] in (0, 1)
        return trial

    (trial,) = workers.map(run, [folder])
    return trial, Recording(folder / "recording")


def power_failures(recording: Recording, stride: int) -> list[Failure]:
    """Every disk, different from all others, that a power failure after one of the operations leaves."""
    failures: list[Failure] = []
    known: set[frozenset[tuple[str, Found]]] = set()
    total = len(recording.operations)
    for k in sorted({*range(0, total + 1, STRIDE or stride), total}):
        for loss in LOSSES:
            left = recording.after_power_loss(k, loss)
            fingerprint = frozenset(left.items())
            if fingerprint not in known:
                known.add(fingerprint)
                failures.append(Failure(f"{loss} after {recording.describe(k)}", left))
    return failures


def survive(workers: Workers, trial: Trial, failures: list[Failure], folder: Path) -> list[str]:
    """The violations before, or after, a daemon runs on the files that each power failure left."""

    def run(daemons: Daemons, numbered: tuple[int, Failure]) -> list[str]:
        number, failure = numbered
        left = Trial(folder / str(number), trial.dropped)
        disk_model.write(failure.left, left.folder)
        found = [f"before the restart: {wrong}" for wrong in left.published()]
        found += left.drain(daemons)[1]
        if not found:
            shutil.rmtree(left.folder)
        return [f"{failure.description}: {wrong} ({left.folder})" for wrong in found]

    return [wrong for found in workers.map(run, enumerate(failures)) for wrong in found]


def test_power_failing_at_any_moment_loses_and_corrupts_nothing(workers, tmp_path):
    trial, recording = recorded(workers, tmp_path / "job")
    failures = power_failures(recording, stride=6)
    faults.log.info("operations: %s", len(recording.operations))
    faults.log.info("failures: %s", len(failures))
    faults.check(survive(workers, trial, failures, tmp_path / "left"))
    assert len(failures) > len(LOSSES)


def test_power_failing_during_recovery_loses_and_corrupts_nothing(workers, tmp_path):
    _, undisturbed = recorded(workers, tmp_path / "undisturbed")
    middle = len(undisturbed.operations) // 2
    trial, recording = recorded(workers, tmp_path / "job", crash_at=middle)
    failures = power_failures(recording, stride=12)
    faults.log.info("operations: %s", len(recording.operations))
    faults.log.info("failures: %s", len(failures))
    faults.check(survive(workers, trial, failures, tmp_path / "left"))


# Of the model itself


def left_by(root: Path, act: Callable[[Path, Path], object], loss: Loss) -> dict[str, bytes]:
    """The files left where power fails once `act` is done with an inbox, holding `a`, and an outbox."""
    for name in ("inbox", "outbox"):
        (root / name).mkdir(parents=True)
    (root / "inbox" / "a").write_bytes(b"dropped")
    with faults.record(str(root / "recording"), str(root)):
        act(root / "inbox", root / "outbox")
    recording = Recording(root / "recording")
    found = recording.after_power_loss(len(recording.operations), loss)
    disk_model.write(found, root / "left")
    for path, thing in found.items():
        assert thing.kind != "file" or (root / "left" / path).read_bytes() == thing.content
    return {path: thing.content for path, thing in found.items() if thing.kind != "folder"}


def publish(inbox: Path, outbox: Path, *, flush: Container[str]) -> None:
    """A folder of one file made in hiding, then given its name; flushes only what is named."""
    staging, target = outbox / ".staging", outbox / "a-0"
    durable.make_new_folder(staging)
    with durable.create(staging / "rows") as file:
        file.write(b"results")
    if "file" in flush:
        durable.fsync_file(staging / "rows")
    if "folder" in flush:
        durable.fsync_folder(staging)
    durable.rename(staging, target)
    if "outbox" in flush:
        durable.fsync_folder(outbox)


@pytest.mark.parametrize(
    ("flush", "loss", "left"),
    [
        (("file", "folder", "outbox"), "unsynced", {"outbox/a-0/rows": b"results"}),
        (("folder", "outbox"), "unsynced", {"outbox/a-0/rows": b""}),
        (("file", "outbox"), "unsynced", {}),
        (("file", "folder"), "unsynced", {}),
        (("file",), "zeroed", {"outbox/a-0/rows": b"results"}),
        (("outbox",), "zeroed", {"outbox/a-0/rows": b""}),
        (("outbox",), "halved", {"outbox/a-0/rows": b"res"}),
    ],
)
def test_the_disk_keeps_what_was_flushed(tmp_path, flush, loss, left):
    found = left_by(tmp_path, functools.partial(publish, flush=flush), loss)
    assert found == {"inbox/a": b"dropped", **left}


def test_a_rename_is_undone_until_the_folder_it_went_into_is_flushed(tmp_path):
    def claim(inbox: Path, outbox: Path) -> None:
        durable.make_new_folder(inbox / "held")
        durable.rename(inbox / "a", inbox / "held" / "a")
        durable.fsync_folder(inbox)

    assert left_by(tmp_path, claim, "unsynced") == {"inbox/a": b"dropped"}


def test_a_flushed_rename_takes_the_renames_before_it_along(tmp_path):
    def claim_and_retire(inbox: Path, outbox: Path) -> None:
        for name in ("held", "done"):
            durable.make_new_folder(inbox / name)
        durable.fsync_folder(inbox)
        durable.rename(inbox / "a", inbox / "held" / "a")
        durable.rename(inbox / "held" / "a", inbox / "done" / "a")
        durable.fsync_folder(inbox / "done")

    assert left_by(tmp_path, claim_and_retire, "unsynced") == {"inbox/done/a": b"dropped"}


def test_a_rename_into_a_folder_that_was_not_flushed_itself_is_undone(tmp_path):
    def retire(inbox: Path, outbox: Path) -> None:
        durable.make_new_folder(inbox / "done")
        durable.rename(inbox / "a", inbox / "done" / "a")
        durable.fsync_folder(inbox / "done")

    assert left_by(tmp_path, retire, "unsynced") == {"inbox/a": b"dropped"}


def test_a_removal_counts_once_its_folder_is_flushed(tmp_path):
    def remove(inbox: Path, outbox: Path, *, flush: bool) -> None:
        durable.unlink(inbox / "a")
        if flush:
            durable.fsync_folder(inbox)

    assert left_by(tmp_path / "0", functools.partial(remove, flush=False), "unsynced") == {
        "inbox/a": b"dropped"
    }
    assert left_by(tmp_path / "1", functools.partial(remove, flush=True), "unsynced") == {}


def test_operations_that_change_nothing_change_nothing_in_the_model(tmp_path):
    def collide(inbox: Path, outbox: Path) -> None:
        durable.write_whole(outbox / "a", b"there first")
        durable.fsync_file(outbox / "a")
        assert not durable.move_without_replacing(inbox / "a", outbox / "a")
        durable.write_whole(outbox / "note", b"somewhere")
        with contextlib.suppress(FileExistsError):
            durable.write_whole(outbox / "a", b"too late")
        assert not durable.remove_empty_folder(outbox)
        durable.fsync_folder(outbox)

    notes = {"unsynced": b"", "zeroed": b"", "halved": b"some"}  # never flushed
    for loss in LOSSES:
        assert left_by(tmp_path / loss, collide, loss) == {
            "inbox/a": b"dropped",
            "outbox/a": b"there first",
            "outbox/note": notes[loss],
        }
