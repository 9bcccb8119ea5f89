"""A process that dies, by chance or because of one file, does no harm to the other files."""

from __future__ import annotations

import json
import random
import signal

from tests.reliability.daemons import Job
from tests.reliability.feed import Feed, Recount, recount
from tests.reliability.ledger import drop, violations
from tests.reliability.torture import Torture
from tests.support import tiny


def test_no_record_is_lost_or_doubled_by_kills_at_random_moments(daemons, tmp_path):
    report = Torture(daemons, tmp_path, seed=1).run(kills=15)
    assert report.violations == []
    assert report.kills == 15
    assert (report.recount.lost, report.recount.duplicated) == (0, 0)
    assert report.recount.records > 300


def test_a_file_that_kills_each_process_fails_after_three_and_takes_no_other_along(daemons, tmp_path):
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    dropped = {}
    for number in range(25):
        kind = "poison" if number == 7 else "fine"
        records = [{**record, "id": f"{kind}-{number}-{record['id']}"} for record in tiny.contrast_records(2)]
        content = json.dumps(records).encode()
        expected = None if kind == "poison" else 2
        name = f"{kind}-{number:02}.json"
        dropped[name] = drop(inbox, name, content, expected)
    job = Job(
        inbox,
        outbox,
        tmp_path / "log",
        hook="tests.reliability.hooks:poisoned",
        hook_args={"prefix": "poison"},
    )
    codes = []
    while not codes or codes[-1] < 0:
        codes.append(daemons.run(job))
        assert len(codes) < 8, "the file is tried for ever"

    assert codes == [*[-signal.SIGKILL] * 3, 1]
    assert violations(inbox, outbox, dropped) == []
    reason = json.loads((inbox / "failed" / "poison-07.json.reason.json").read_text())
    assert (reason["reason"], reason["attempt"]) == ("attempts_exhausted", 3)


def test_the_recount_sees_a_lost_and_a_doubled_record(daemons, tmp_path):
    feed = Feed(tmp_path / "inbox", random.Random(0))
    for kind in ("json", "bad_records"):
        feed.drop(kind)
    outbox = tmp_path / "outbox"
    assert daemons.run(Job(feed.inbox, outbox, tmp_path / "log")) == 0
    counted = recount(outbox, feed.dropped)
    assert counted == Recount(feed.records, 0, 0)

    first, second = sorted(path.parent for path in outbox.glob("*/manifest.json"))
    records = feed.dropped[sorted(feed.dropped)[0]].records
    first.rename(tmp_path / "elsewhere")
    assert recount(outbox, feed.dropped) == Recount(feed.records, records, 0)
    copy = outbox / f"again-{second.name}"
    copy.mkdir()
    for path in second.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert recount(outbox, feed.dropped).duplicated == feed.records - records
