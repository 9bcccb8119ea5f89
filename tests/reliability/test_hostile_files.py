"""People and other programs put files into an inbox, and change it, while a real daemon works there."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.daemons import Daemons, Job
from tests.reliability.feed import Content, Feed, as_json, joined
from tests.reliability.handling import claimed, end, events, running, wait_until, waiting
from tests.reliability.hooks import CODE_OWNER
from tests.reliability.ledger import Dropped, drop, sha256_of, violations
from tests.support import tiny

MANY_FILES = int(os.environ.get("HOSTILE_FILES", "2000"))  # 50000 is the big variant
OTHER_USER = 48_213
NAMES = {
    "newline": b"two\nlines.json",
    "not-utf-8": b"caf\xe9-\xff.json",
    "255-bytes": b"n" * 250 + b".json",
    "leading-dash": b"-rf.json",
    "emoji": "\N{GHOST}\N{SNOWMAN}.json".encode(),
    "spaces": b" a b .json",
    "glob": b"[*?].json",
    "quotes": b'it\'s "it" $(x).json',
    "percent": b"%s%00%n{0}.json",
    "separators": "a\u2028b\u202ec.json".encode(),
}


@dataclass(slots=True)
class Place:
    """An inbox and an outbox, and what was dropped into one to come out of the other."""

    folder: Path
    dropped: dict[str, Dropped] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.inbox.mkdir()

    @property
    def inbox(self) -> Path:
        return self.folder / "inbox"

    @property
    def outbox(self) -> Path:
        return self.folder / "outbox"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def job(self, *, once: bool = True, hook: str | None = None, **settings: Any) -> Job:
        """`settings`: hook_args, or dotted flags with `__` for the dot."""
        hook_args = settings.pop("hook_args", None)
        flags = {name.replace("__", "."): value for name, value in settings.items()}
        hook = hook and f"tests.reliability.hooks:{hook}"
        return Job(self.inbox, self.outbox, self.log, once=once, flags=flags, hook=hook, hook_args=hook_args)

    def drop(self, name: str, content: bytes, records: int | None) -> Path:
        self.dropped[name] = drop(self.inbox, name, content, records)
        return self.inbox / name

    def drop_good(self, name: str, serial: int = 0) -> Path:
        return self.drop(name, as_json(serial, 0).encode(), 1)

    def gated(self, daemons: Daemons, **settings: Any) -> int:
        """A daemon that stands still at its first batch, until `open_gate`."""
        args = {"reached": str(self.folder / "reached"), "go": str(self.folder / "go")}
        pid = daemons.start(self.job(hook="gated", hook_args=args, **settings))
        wait_until((self.folder / "reached").exists, "the first batch", pid)
        return pid

    def open_gate(self) -> None:
        (self.folder / "go").touch()

    def violations(self) -> list[str]:
        return violations(self.inbox, self.outbox, self.dropped)

    def outcomes(self) -> list[str]:
        return [event["outcome"] for event in events(self.log, "file.settled")]

    def reason(self, name: str) -> str:
        reason: str = json.loads((self.inbox / "failed" / f"{name}.reason.json").read_bytes())["reason"]
        return reason

    def settled(self) -> bool:
        return not waiting(self.inbox) and not claimed(self.inbox)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_what_is_no_regular_file_is_reported_and_left_alone(daemons, place):
    target = place.folder / "target.json"
    target.write_text(as_json(9, 9))
    os.mkfifo(place.inbox / "pipe.json")
    (place.inbox / "link.json").symlink_to(target)
    (place.inbox / "dangling.json").symlink_to("/nowhere")
    (place.inbox / "folder.json").mkdir()
    home = Path.cwd()
    os.chdir(place.inbox)  # a socket's path may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.json")
        os.chdir(home)
        place.drop_good("good.json")
        assert daemons.run(place.job()) == 0
    assert place.violations() == []
    left = {path.name for path in place.inbox.iterdir() if not path.name.startswith(".")}
    odd = {"pipe.json", "link.json", "dangling.json", "socket.json"}
    assert left - {"done", "failed"} == {*odd, "folder.json"}
    reported = {event["file"]: event["kind"] for event in events(place.log, "inbox.ignored")}
    assert reported == {
        "pipe.json": "fifo",
        "link.json": "symlink",
        "dangling.json": "symlink",
        "socket.json": "socket",
    }
    assert target.exists()


def test_unfinished_names_wait_for_their_writer(daemons, place):
    unfinished = ["half.json.tmp", "half.json.part", "half.json~", ".hidden.json"]
    for name in unfinished:
        (place.inbox / name).write_text(as_json(1, 1))
    place.drop_good("good.json")
    assert daemons.run(place.job()) == 0
    assert place.violations() == []
    assert all((place.inbox / name).exists() for name in unfinished)
    (place.inbox / "half.json.tmp").rename(place.inbox / "whole.json")
    raw = (place.inbox / "whole.json").read_bytes()
    place.drop("whole.json", raw, 1)
    assert daemons.run(place.job()) == 0
    assert place.violations() == []


OTHERS = [
    *("table.xlsx", "notes.txt", "photo.png", "README", "x.jsonl.926A3cE2", "x.jsonl.926A3cE2.partial"),
    *(".x.jsonl.AbCdEf", "x.json.crdownload", "x.json.filepart", "#x.json#", "4913", "~$x.json", "Thumbs.db"),
    *(".DS_Store", "._x.json", ".syncthing.x.json.tmp", "x.json.swp", "x.json.1", "x.json.gz.txt"),
]


def test_files_of_others_are_left_where_they_are_and_told_once(daemons, place):
    contents = {name: as_json(1, number) for number, name in enumerate(OTHERS)}
    for name, content in contents.items():
        (place.inbox / name).write_text(content)
    (place.inbox / "sub").mkdir()
    (place.inbox / "sub" / "x.jsonl").write_text(as_json(2, 0))
    place.drop_good("good (copy).json")
    assert daemons.run(place.job()) == 0
    assert place.violations() == []
    assert {name: (place.inbox / name).read_text() for name in OTHERS} == contents
    assert (place.inbox / "sub" / "x.jsonl").read_text() == as_json(2, 0)
    assert list((place.inbox / "failed").iterdir()) == []
    told = [event["file"] for event in events(place.log, "inbox.left")]
    assert sorted(told) == sorted(name for name in OTHERS if not name.startswith("."))
    assert [event["folders"] for event in events(place.log, "inbox.subfolders_ignored")] == [["sub"]]


def test_a_download_that_stalls_keeps_its_temporary_file(daemons, place):
    draft = place.inbox / "upload.jsonl.926A3cE2"
    with running(daemons, place.job(once=False)) as pid, draft.open("w") as writer:
        writer.write(as_json(0, 0) + "\n")
        writer.flush()
        told = lambda: [event["file"] for event in events(place.log, "inbox.left")]  # noqa: E731
        wait_until(told, "the daemon to see it", pid)
        place.drop_good("other.json", 1)
        wait_until(lambda: place.outcomes() == ["committed"] and place.settled(), "another file done", pid)
        writer.write(as_json(0, 1) + "\n")
        writer.close()
        place.dropped["upload.jsonl"] = Dropped(2, sha256_of(draft))
        draft.rename(place.inbox / "upload.jsonl")
        wait_until(lambda: len(place.outcomes()) == 2 and place.settled(), "the download done", pid)
        assert told() == [draft.name]
    assert place.violations() == []
    assert place.outcomes() == ["committed", "committed"]


def test_files_that_the_settings_ignore_are_left_and_not_told(daemons, place):
    (place.inbox / "draft-1.json").write_text(as_json(1, 1))
    (place.inbox / "old").mkdir()
    place.drop_good("good.json")
    assert daemons.run(place.job(inbox__ignore=["draft-*", "ol?"])) == 0
    assert (place.inbox / "draft-1.json").read_text() == as_json(1, 1)
    assert events(place.log, "inbox.left") == events(place.log, "inbox.subfolders_ignored") == []
    assert {path.name for path in (place.inbox / "done").iterdir()} == {"good.json"}


def test_a_sparse_file_fails_or_rejects_and_its_neighbours_go_through(daemons, place):
    place.drop_good("before.json", 1)
    place.drop_good("middle.jsonl", 2)
    for name, head, size in (
        ("hole.jsonl", b"", 64 << 20),
        ("hole.json", b"", (256 << 20) + 1),
        ("record-then-hole.jsonl", as_json(3, 0).encode() + b"\n" + b" " * 9000, 64 << 20),
    ):
        path = place.inbox / name
        path.write_bytes(head)
        os.truncate(path, size)
    assert daemons.run(place.job()) == 1
    assert place.reason("hole.jsonl") == "binary"
    assert place.reason("hole.json") in ("binary", "too_large")
    manifests = [json.loads(path.read_bytes()) for path in place.outbox.glob("*/manifest.json")]
    counts = {entry["input"]["name"]: (entry["rows"], entry["rejects"]) for entry in manifests}
    assert counts == {"before.json": (1, 0), "middle.jsonl": (1, 0), "record-then-hole.jsonl": (1, 1)}


def test_a_file_that_grows_is_taken_when_it_has_stopped(daemons, place):
    path = place.inbox / "growing.jsonl"
    lines = [as_json(0, number) + "\n" for number in range(30)]
    with (
        running(daemons, place.job(once=False, inbox__settle_seconds=1.0)) as pid,
        path.open("w") as file,
    ):
        for line in lines:
            file.write(line)
            file.flush()
            assert path.exists(), "taken while it grew"
            time.sleep(0.05)
        file.close()
        place.dropped[path.name] = Dropped(30, sha256_of(path))
        wait_until(place.settled, "the file taken", pid)
    assert place.violations() == []
    assert place.outcomes() == ["committed"]


def test_a_writer_that_keeps_the_file_open_makes_it_start_again(daemons, place):
    path = place.inbox / "open.jsonl"
    with path.open("w") as writer:
        writer.write(as_json(0, 0) + "\n")
        writer.flush()
        pid = place.gated(daemons)
        writer.write(as_json(0, 1) + "\n")
        writer.flush()
        place.open_gate()
        assert daemons.wait(pid) == 0
    place.dropped[path.name] = Dropped(2, sha256_of(place.inbox / "done" / path.name))
    assert place.violations() == []
    assert place.outcomes() == ["requeued", "committed"]


def test_a_file_replaced_where_it_is_claimed_is_read_again(daemons, place):
    (place.inbox / "study.json").write_text(as_json(0, 0))
    pid = place.gated(daemons)
    (held,) = claimed(place.inbox)
    content = json.dumps(tiny.contrast_records(3)).encode()
    other = place.folder / "other"
    other.write_bytes(content)
    other.rename(held)
    place.open_gate()
    assert daemons.wait(pid) == 0
    place.dropped["study.json"] = Dropped(3, sha256_of(place.inbox / "done" / "study.json"))
    assert place.violations() == []
    assert place.outcomes() == ["requeued", "committed"]


def test_a_new_file_of_the_name_of_one_under_way_gets_its_own_results(daemons, place):
    first = place.drop_good("study.json", 1)
    pid = place.gated(daemons, once=False)
    assert not first.exists()
    place.drop_good("study.json", 2)
    place.open_gate()
    wait_until(lambda: place.outcomes() == ["committed", "committed"] and place.settled(), "both done", pid)
    assert end(daemons, pid) == 0
    assert sorted(path.name for path in (place.inbox / "done").iterdir()) == ["study.json", "study.json.1"]
    assert len(list(place.outbox.glob("*/manifest.json"))) == 2


def test_a_file_deleted_where_it_is_claimed_fails_as_vanished(daemons, place):
    place.drop_good("gone.json", 1)
    place.drop_good("stays.json", 2)
    pid = place.gated(daemons)
    wait_until(lambda: len(claimed(place.inbox)) == 2, "both files claimed", pid)
    (held,) = place.inbox.glob(".claimed/*/*/gone.json")
    held.unlink()
    place.open_gate()
    assert daemons.wait(pid) == 1
    assert place.reason("gone.json") == "vanished"
    assert place.violations() == []
    assert sorted(place.outcomes()) == ["committed", "failed"]


def test_a_file_deleted_while_it_settles_is_nobodys_loss(daemons, place):
    with running(daemons, place.job(once=False, inbox__settle_seconds=0.5)) as pid:
        for number in range(20):
            path = place.inbox / f"brief-{number}.json"
            path.write_text(as_json(number, 0))
            path.unlink()
        place.drop_good("good.json", 99)
        wait_until(lambda: place.settled() and place.outcomes(), "the good file done", pid)
    assert place.violations() == []


@pytest.fixture
def public_place() -> Iterator[Place]:
    """Owned by an ordinary user, whom pytest's own folders may keep out."""
    folder = Path(tempfile.mkdtemp(prefix="lensd-"))
    place = Place(folder)
    place.outbox.mkdir()
    for path in (place.folder, place.inbox, place.outbox):
        os.chown(path, CODE_OWNER, -1)
    yield place
    shutil.rmtree(folder)


def test_a_file_that_the_user_may_not_read_fails_alone(daemons, public_place):
    place = public_place
    place.drop("secret.json", as_json(1, 0).encode(), None).chmod(0)
    place.drop_good("good.json", 2)
    assert daemons.run(place.job(hook="bound_by_modes")) == 1
    assert place.violations() == []
    assert place.reason("secret.json") == "unreadable"


@pytest.fixture
def sticky_place(public_place: Place) -> Place:
    """Everybody may write into the inbox, and nobody may move what is another's."""
    if os.geteuid() != 0:
        pytest.skip("only root gives files to others")
    os.chown(public_place.inbox, OTHER_USER, -1)
    public_place.inbox.chmod(0o1777)
    return public_place


def test_a_drain_that_may_not_move_a_file_says_so_by_its_exit_code(daemons, sticky_place):
    place = sticky_place
    theirs = place.inbox / "theirs.json"
    theirs.write_text(as_json(1, 0))
    os.chown(theirs, OTHER_USER, -1)
    good = place.drop_good("good.json", 2)
    os.chown(good, CODE_OWNER, -1)
    assert daemons.run(place.job(hook="bound_by_modes")) == 1
    assert place.outcomes() == ["committed"]
    assert [event["file"] for event in events(place.log, "inbox.unclaimable")] == ["theirs.json"]
    (stopped,) = events(place.log, "service.stopped")
    assert (stopped["committed"], stopped["failed"], stopped["left"]) == (1, 0, 1)
    assert theirs.exists()
    os.chown(theirs, CODE_OWNER, -1)
    assert daemons.run(place.job(hook="bound_by_modes")) == 0
    assert not theirs.exists()


def test_a_drain_leaves_a_download_under_its_final_name_and_says_so(daemons, place):
    (place.inbox / "half.json").write_text(as_json(1, 0)[:9])
    (place.inbox / "half.json.aria2").touch()
    place.drop_good("good.json", 2)
    assert daemons.run(place.job()) == 1
    assert place.outcomes() == ["committed"]
    assert (place.inbox / "half.json").exists()
    (place.inbox / "half.json.aria2").unlink()
    (place.inbox / "half.json").write_text(as_json(1, 0))
    assert daemons.run(place.job()) == 0


def test_a_drain_that_is_told_to_stop_says_what_it_left(daemons, place):
    place.drop_good("young.json", 1)
    (place.inbox / "notes.txt").touch()
    pid = daemons.start(place.job(inbox__settle_seconds=3600))
    wait_until(lambda: events(place.log, "inbox.left"), "the first look", pid)
    os.kill(pid, signal.SIGTERM)
    assert daemons.wait(pid) == 1
    (stopped,) = events(place.log, "service.stopped")
    assert (stopped["committed"], stopped["left"]) == (0, 1)
    assert daemons.run(place.job()) == 0
    assert place.violations() == []


@pytest.mark.parametrize("which", ["inbox", "outbox"])
def test_a_folder_that_may_not_be_written_for_a_while_pauses(daemons, public_place, which):
    place = public_place
    folder = place.folder / which
    job = place.job(once=False, hook="bound_by_modes", http__enabled=True, http__address="127.0.0.1:0")
    with running(daemons, job) as pid:
        place.drop_good("first.json", 1)
        wait_until(lambda: place.outcomes() == ["committed"] and place.settled(), "the first file", pid)
        folder.chmod(0o555)
        place.drop_good("second.json", 2)
        wait_until(lambda: "paus" in place.log.read_text(), "an event that says so", pid)
        folder.chmod(0o755)
        wait_until(place.settled, "the second file", pid)
    assert place.violations() == []


@pytest.mark.parametrize("raw", NAMES.values(), ids=NAMES)
def test_hostile_names_come_out(daemons, place, raw):
    name = os.fsdecode(raw)
    place.drop_good(name)
    assert daemons.run(place.job()) == 0
    assert place.violations() == []
    (folder,) = (path.parent for path in place.outbox.glob("*/manifest.json"))
    folder.name.encode()  # every reader can name it
    assert json.loads((folder / "manifest.json").read_text())["records"] == 1
    assert [os.fsencode(path.name) for path in (place.inbox / "done").iterdir()] == [raw]


def test_a_failing_file_of_the_longest_name_lies_beside_its_reason(daemons, place):
    name = "n" * 250 + ".json"
    place.drop(name, b"[", None)
    assert daemons.run(place.job()) == 1
    assert place.violations() == []


def test_a_stream_that_ends_early_after_many_parts_fails_alone(daemons, place):
    lines = [as_json(0, number) for number in range(300)]
    place.drop("short.jsonl.gz", gzip.compress(joined(lines))[:-20], None)
    place.drop_good("good.json", 1)
    assert daemons.run(place.job(inbox__part_records=4)) == 1
    assert place.violations() == []
    assert place.reason("short.jsonl.gz") == "corrupt_compression"


@pytest.mark.timeout(120 + MANY_FILES // 20)
def test_many_files_at_once_are_found_though_the_watcher_reports_nothing(daemons, place):
    settings = {"hook": "blind_watcher", "hook_args": {}, "batching__max_batch_tokens": 4096}
    with running(daemons, place.job(once=False, **settings)) as pid:
        wait_until(lambda: events(place.log, "model.loaded"), "the model", pid)
        feed = Feed(place.inbox, random.Random(0))
        for number in range(MANY_FILES):
            feed.place(Content(".json", as_json(number, 0).encode(), 1))
        wait_until(place.settled, "all files done", pid, seconds=60 + MANY_FILES / 20)
    place.dropped = feed.dropped
    assert place.violations() == []
    assert len(place.outcomes()) == MANY_FILES
