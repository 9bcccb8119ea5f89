from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.reliability.daemons import Job
from tests.reliability.handling import events, wait_until
from tests.support import tiny


@pytest.fixture(scope="module")
def last_words(daemons, tmp_path_factory) -> dict[tuple[str, ...], float]:
    """The metrics of a daemon at its end, by name and values of labels."""
    folder = tmp_path_factory.mktemp("troubled")
    inbox, outbox, bad_disk, words = (folder / name for name in ("inbox", "outbox", "bad_disk", "words"))
    inbox.mkdir()
    tiny.write_json(inbox / "a.json", tiny.contrast_records(30))
    hook_args = {"bad_disk": str(bad_disk), "last_words": str(words)}
    job = Job(inbox, outbox, folder / "log", False, None, "tests.deploy.troubles:troubled", hook_args)
    pid = daemons.start(job)
    wait_until(lambda: events(job.log, "file.settled"), "a.json settled", pid)
    bad_disk.touch()
    (inbox / "b.json").write_bytes(b"[")
    assert daemons.wait(pid) == 3
    families = text_string_to_metric_families(words.read_text())
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_batches_beyond_memory_are_counted_and_so_is_their_repetition(last_words):
    oom = last_words["lensd_oom_total",]
    assert oom > 0
    assert last_words["lensd_retries_total", "forward"] == oom
    assert last_words["lensd_samples_total", "committed"] == 30


def test_a_claim_that_the_machine_refused_is_counted_as_repeated(last_words):
    assert last_words["lensd_retries_total", "claim"] == 1


def test_a_refused_fsync_is_counted_before_the_process_ends(last_words):
    assert last_words["lensd_sync_errors_total",] == 1
