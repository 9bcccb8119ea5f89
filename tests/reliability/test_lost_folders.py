"""A folder is taken away under a running daemon and comes back, or another in its place: work goes on."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from tests import tiny
from tests.reliability.daemons import Daemons, Job
from tests.reliability.handling import events, shared_daemons, wait_until


@pytest.fixture
def daemons(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Daemons:
    return shared_daemons(request, tmp_path_factory)


def published(outbox: Path) -> set[str]:
    return {path.parent.name.rpartition("-")[0] for path in outbox.glob("*/manifest.json")}


@pytest.mark.parametrize("lost", ["inbox", "outbox"])
def test_a_folder_removed_and_made_again_is_worked_with_again(daemons, tmp_path, lost):
    inbox, outbox, log = tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log"
    inbox.mkdir()
    pid = daemons.start(Job(inbox, outbox, log, once=False))
    tiny.write_json(inbox / "first.json", tiny.contrast_records(3))
    wait_until(lambda: published(outbox) == {"first"}, "the first file to be published")

    shutil.rmtree(tmp_path / lost)
    if lost == "outbox":
        tiny.write_json(inbox / "second.json", tiny.contrast_records(4))
    wait_until(lambda: bool(events(log, "service.paused")), "the pause to be told")
    (tmp_path / lost).mkdir()
    if lost == "inbox":
        tiny.write_json(inbox / "second.json", tiny.contrast_records(4))
    wait_until(lambda: "second" in published(outbox), "the second file to be published")
    os.kill(pid, signal.SIGTERM)
    assert daemons.wait(pid) == 0
    assert (inbox / "done/second.json").is_file()
    assert list((inbox / ".claimed").glob("*/")) == []
    assert list((outbox / ".staging").glob("*/")) == []
    assert "Traceback" not in log.read_text()


def test_a_folder_that_may_not_be_written_is_waited_for(daemons, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    inbox, outbox, log = tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log"
    inbox.mkdir()
    outbox.mkdir()
    pid = daemons.start(Job(inbox, outbox, log, once=False))
    wait_until(lambda: (outbox / ".staging").is_dir(), "the daemon to start")
    outbox.chmod(0o500)
    tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
    wait_until(lambda: bool(events(log, "service.paused")), "the pause to be told")
    outbox.chmod(0o700)
    wait_until(lambda: published(outbox) == {"study"}, "the file to be published")
    os.kill(pid, signal.SIGTERM)
    assert daemons.wait(pid) == 0
