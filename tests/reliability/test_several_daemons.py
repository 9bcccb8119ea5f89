"""Several real processes on one inbox and one outbox."""

from __future__ import annotations

import json
import os
import signal

from tests.reliability.daemons import Job
from tests.reliability.handling import claimed, end, ended, events, retired, wait_until
from tests.reliability.ledger import drop, violations
from tests.reliability.several import Several
from tests.support import tiny


def gated_job(tmp_path, name: str) -> Job:
    return Job(
        tmp_path / "inbox",
        tmp_path / "outbox",
        tmp_path / "log",
        hook="tests.reliability.hooks:gated",
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


def test_a_file_that_kills_whoever_works_on_it_takes_no_other_along(daemons, tmp_path):
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    dropped = {}
    for number in range(40):
        name, records = (f"poison-{number}.json", None) if number == 5 else (f"fine-{number:02}.json", 2)
        content = [{**record, "id": f"{name}-{record['id']}"} for record in tiny.contrast_records(2)]
        dropped[name] = drop(inbox, name, json.dumps(content).encode(), records)
    poisoned = Job(
        inbox,
        outbox,
        tmp_path / "log",
        once=False,
        hook="tests.reliability.hooks:poisoned",
        hook_args={"prefix": "poison"},
    )
    alive = [daemons.start(poisoned) for _ in range(3)]
    deaths = []

    def drained() -> bool:
        for place, pid in enumerate(alive):
            if ended(pid):
                deaths.append(daemons.wait(pid))
                alive[place] = daemons.start(poisoned)
        return retired(inbox) == len(dropped)

    wait_until(drained, "an empty inbox")
    ends = {end(daemons, pid) for pid in alive}
    assert ends <= {0, -signal.SIGTERM}  # the last may not have come so far as to handle it
    assert deaths == [-signal.SIGKILL] * 3
    assert violations(inbox, outbox, dropped) == []
