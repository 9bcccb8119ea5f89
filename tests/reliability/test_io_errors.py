"""An operation on files fails once: the daemon says so or carries on, and the next one finishes its work."""

from __future__ import annotations

import errno
import random
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.reliability import faults
from tests.reliability.daemons import Daemons
from tests.reliability.faults import STRIDE, Trace, Trial, Workers

pytestmark = pytest.mark.timeout(1800)  # for LENSD_CRASH_STRIDE=1; a daemon that hangs is killed long before

ERRORS = (errno.ENOSPC, errno.EIO, errno.EMFILE, errno.EACCES)
SEED = 0
SAMPLE = 1  # operations of one kind tried with each error
MACHINE_FAILED = 3


@dataclass(frozen=True, slots=True)
class IoError:
    """The n-th operation of a kind fails."""

    name: str
    n: int
    error: int

    def __str__(self) -> str:
        return f"{errno.errorcode[self.error]} at {self.name} {self.n}"


@pytest.fixture(scope="module")
def workers(request, tmp_path_factory) -> Workers:
    return faults.shared_workers(request, tmp_path_factory)


@pytest.fixture(scope="module")
def kinds(workers, tmp_path_factory) -> Counter[str]:
    """How many operations of each kind the job takes when nothing fails."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def drain(daemons: Daemons, folder: Path) -> Trace:
        return Trial.make(folder).run(daemons)

    (trace,) = workers.map(drain, [folder / "job"])
    return Counter(operation["name"] for operation in trace.operations)


def chosen(kinds: Counter[str]) -> list[IoError]:
    """A sample of each kind for each error; every operation with LENSD_CRASH_STRIDE=1."""
    chance = random.Random(SEED)
    return [
        IoError(name, n, error)
        for name, total in sorted(kinds.items())
        for error in ERRORS
        for n in sorted(chance.sample(range(1, total + 1), total if STRIDE == 1 else min(SAMPLE, total)))
    ]


def test_an_operation_that_fails_once_loses_and_repeats_nothing(workers, kinds, tmp_path):
    def run(daemons: Daemons, fault: IoError) -> tuple[list[str], bool]:
        trial = Trial.make(tmp_path / f"{fault.name}-{fault.n}-{fault.error}")
        trace = trial.run(daemons, faults.fail_at, n=fault.n, errno=fault.error, name=fault.name)
        same = [operation for operation in trace.operations if operation["name"] == fault.name]
        failed = same[fault.n - 1] if len(same) >= fault.n else None
        found = [f"after the fault: {wrong}" for wrong in trial.published()]
        if trial.runs[-1] not in (0, 1, MACHINE_FAILED):
            found.append(f"exit code {trial.runs[-1]}")
        if failed is not None and fault.name.startswith("fsync"):
            later = same[fault.n :]
            if any(operation["path"] == failed["path"] for operation in later):
                found.append("flushed again after that failed")
            if trial.runs[-1] != MACHINE_FAILED:
                found.append(f"exit code {trial.runs[-1]} after a failed flush")
        found += trial.drain(daemons)[1]
        if not found:
            shutil.rmtree(trial.folder)
        where = failed["path"] if failed else "not reached"
        return [f"{fault} ({where}): {wrong}" for wrong in found], failed is not None

    all_of_them = chosen(kinds)
    results = workers.map(run, all_of_them)
    reached = sum(reached for _, reached in results)
    faults.log.info("kinds: %s", dict(kinds))
    faults.log.info("faults: %s", reached)
    faults.check(wrong for found, _ in results for wrong in found)
    assert reached >= 0.9 * len(all_of_them)
    assert kinds.keys() >= {
        "create",
        "write",
        "fsync_file",
        "fsync_folder",
        "mkdir",
        "rename",
        "unlink",
        "rmdir",
    }
