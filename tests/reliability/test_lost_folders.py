"""A folder is taken away under a running daemon and comes back, or another in its place: work goes on."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.reliability.daemons import Job
from tests.reliability.handling import events, wait_until
from tests.support import tiny


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


@pytest.mark.parametrize("lost", ["inbox/done", "inbox/failed"])
def test_a_sub_folder_that_was_cleared_away_is_made_again(daemons, tmp_path, lost):
    inbox, outbox, log = tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log"
    inbox.mkdir()
    pid = daemons.start(Job(inbox, outbox, log, once=False))
    tiny.write_json(inbox / "first.json", tiny.contrast_records(3))
    (inbox / "bad.json").write_text("[{")
    wait_until(lambda: len(events(log, "file.settled")) == 2, "the first files", pid)
    shutil.rmtree(tmp_path / lost)
    tiny.write_json(inbox / "second.json", tiny.contrast_records(4))
    (inbox / "worse.json").write_text("[{,")
    wait_until(lambda: len(events(log, "file.settled")) == 4, "the others", pid)
    os.kill(pid, signal.SIGTERM)
    assert daemons.wait(pid) == 0
    assert (inbox / "done/second.json").is_file()
    assert (inbox / "failed/worse.json").is_file()
    assert events(log, "service.folders_lost") == []


def test_a_sub_folder_that_leads_elsewhere_later_pauses_and_charges_nothing(daemons, tmp_path, elsewhere):
    inbox, outbox, log = tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log"
    inbox.mkdir()
    pid = daemons.start(Job(inbox, outbox, log, once=False, flags={"inbox.max_attempts": 1}))
    wait_until(lambda: (inbox / "done").is_dir() and (outbox / ".units").is_dir(), "the start", pid)
    (inbox / "done").rmdir()
    (inbox / "done").symlink_to(elsewhere)
    tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
    wait_until(lambda: bool(events(log, "service.paused")), "the pause to be told", pid)
    (paused, *_) = events(log, "service.paused")
    assert paused["reason"] == "folders"
    assert f"{inbox}/done" in paused["message"]  # seen by a look, or met by the move
    assert re.search("(different|another) file system", paused["message"])
    (inbox / "done").unlink()
    wait_until(lambda: (inbox / "done/study.json").is_file(), "the file to be done with", pid)
    os.kill(pid, signal.SIGTERM)
    assert daemons.wait(pid) == 0
    assert published(outbox) == {"study"}
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("once", [True, False])
def test_a_sub_folder_on_another_file_system_is_refused_at_the_start(daemons, tmp_path, elsewhere, once):
    inbox, outbox, log = tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log"
    inbox.mkdir()
    (inbox / "done").symlink_to(elsewhere)
    tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
    assert daemons.run(Job(inbox, outbox, log, once=once)) == 2
    assert f"lensd: {inbox}/done, a link to {elsewhere}, is on another file system" in log.read_text()
    assert (inbox / "study.json").is_file()
    assert list(elsewhere.iterdir()) == list(outbox.iterdir()) == []


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
