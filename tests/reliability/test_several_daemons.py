"""Several real processes on one inbox and one outbox."""

from __future__ import annotations

import json
import os
import signal

import pytest

from tests import tiny
from tests.reliability.daemons import Daemons, Job
from tests.reliability.ledger import drop, violations
from tests.reliability.several import Several
from tests.reliability.torture import claimed, events, shared_daemons, wait_until


@pytest.fixture
def daemons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Daemons:
    return shared_daemons(request, tmp_path_factory)


def gated_job(tmp_path, name: str) -> Job:
    return Job(
        tmp_path / "inbox",
        tmp_path / "outbox",
        tmp_path / "log",
        hook="tests.reliability.torture:gated",
        hook_args={"reached": str(tmp_path / f"{name}-reached"), "go": str(tmp_path / "go")},
    )


def test_three_that_are_killed_now_and_then_publish_each_record_once(daemons, tmp_path):
    report = Several(daemons, tmp_path, processes=3, seed=1).run(files=150, kills=5)
    assert report.violations == []
    assert (report.files, report.recount.lost, report.recount.duplicated) == (150, 0, 0)
    assert report.recount.records > 120


def test_one_content_computed_by_two_at_the_same_time_is_published_once(daemons, tmp_path):
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    content = json.dumps(tiny.contrast_records(5)).encode()
    dropped = {"first.json": drop(inbox, "first.json", content, 5)}
    first = daemons.start(gated_job(tmp_path, "first"))
    wait_until((tmp_path / "first-reached").exists, "the first at its batch")
    os.kill(first, signal.SIGSTOP)  # so that it does not take the second file too
    dropped["second.json"] = drop(inbox, "second.json", content, 5)
    second = daemons.start(gated_job(tmp_path, "second"))
    wait_until((tmp_path / "second-reached").exists, "the second at its batch")
    (tmp_path / "go").touch()
    os.kill(first, signal.SIGCONT)
    assert [daemons.wait(first), daemons.wait(second)] == [0, 0]
    assert violations(inbox, outbox, dropped) == []
    outcomes = [event["outcome"] for event in events(tmp_path / "log", "file.settled")]
    assert sorted(outcomes) == ["committed", "duplicate"]


def test_a_file_stays_with_a_process_that_stands_still_and_leaves_one_that_died(daemons, tmp_path):
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    dropped = {"slow.json": drop(inbox, "slow.json", json.dumps(tiny.contrast_records(3)).encode(), 3)}
    slow = daemons.start(gated_job(tmp_path, "slow"))
    wait_until((tmp_path / "slow-reached").exists, "the first at its batch")
    os.kill(slow, signal.SIGSTOP)
    (held,) = claimed(inbox)

    plain = Job(inbox, outbox, tmp_path / "log")
    assert daemons.run(plain) == 0
    assert claimed(inbox) == [held]

    assert daemons.kill(slow) == -signal.SIGKILL
    assert daemons.run(plain) == 0
    assert violations(inbox, outbox, dropped) == []
