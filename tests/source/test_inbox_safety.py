"""When things go wrong the inbox replaces no file, loses none and follows no link."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.errors import FileError
from daemon.fs import durable
from daemon.fs.lease import Lease, dead_leases, open_lock
from daemon.records import Claim
from daemon.source import inbox as inbox_module
from daemon.source.inbox import Candidate, Inbox


@contextlib.asynccontextmanager
async def opened(path: Path, **settings: object) -> AsyncIterator[Inbox]:
    defaults = {"settle_seconds": 0.0, "rescan_seconds": 0.05, "on_success": "move"}
    inbox = Inbox(path, **{**defaults, **settings})
    await inbox.open()
    try:
        yield inbox
    finally:
        await inbox.close()


async def all_claims(inbox: Inbox) -> list[Claim]:
    return [claim async for claims in inbox.claims(asyncio.Event(), once=True) for claim in claims]


def leave_in_dead_lease(inbox: Path, lease: str, attempt: int, name: str, content: str) -> Path:
    path = inbox / ".claimed" / lease / str(attempt) / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    (inbox / ".claimed" / lease / ".lock").touch()
    return path


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture(params=["renameat2", "link"])
def either_move(request, monkeypatch):
    """Both ways to move without replacing: file systems differ."""
    if request.param == "link":
        monkeypatch.setattr(durable, "rename_without_replacing", lambda source, target: None)


async def test_two_dead_leases_with_files_of_one_name_lose_neither(tmp_path):
    leave_in_dead_lease(tmp_path, "host-1-aa", 1, "a.json", "[1]")
    leave_in_dead_lease(tmp_path, "host-2-bb", 1, "a.json", "[2]")
    async with opened(tmp_path) as inbox:
        attempts = {}
        async for (claim,) in inbox.claims(asyncio.Event(), once=True):
            attempts[claim.path.read_text()] = claim.attempt
            await inbox.retire([claim])
        assert attempts == {"[1]": 2, "[2]": 2}
        assert inbox.take_recovered() == 2
        assert inbox.take_recovered() == 0
    assert sorted(contents(tmp_path / "done").values()) == ["[1]", "[2]"]
    assert list((tmp_path / ".claimed").iterdir()) == []


async def test_work_begun_before_is_counted_again_and_begun_alone(tmp_path):
    leave_in_dead_lease(tmp_path, "host-1-aa", 3, "a.json", "[1]")
    leave_in_dead_lease(tmp_path, "host-2-bb", 2, "b.json", "[2]")
    for name in ("c.json", "d.json"):
        (tmp_path / name).write_text("[3]")
    batches = []
    async with opened(tmp_path) as inbox:
        async for claims in inbox.claims(asyncio.Event(), once=True):
            batches.append([(claim.name, claim.attempt) for claim in claims])
            assert all(claim.path.parent.name == str(claim.attempt) for claim in claims)
    assert batches == [[("a.json", 4)], [("b.json", 3)], [("c.json", 1), ("d.json", 1)]]


async def test_what_a_process_held_when_it_died_is_taken_over_while_others_run(tmp_path):
    stop = asyncio.Event()
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(stop, once=False)
        waiting = asyncio.create_task(anext(claims))
        await until(lambda: inbox.pending() is not None)
        leave_in_dead_lease(tmp_path, "host-1-aa", 1, "a.json", "[1]")
        ((claim,), *_) = [await waiting]
        assert (claim.name, claim.attempt) == ("a.json", 2)
        stop.set()
        await claims.aclose()


async def test_what_an_earlier_version_claimed_and_lensd_does_not_read_goes_back(tmp_path):
    leave_in_dead_lease(tmp_path, "host-1-aa", 2, "notes.txt", "mine")
    leave_in_dead_lease(tmp_path, "host-1-bb", 1, "a.json", "[1]")
    (tmp_path / "notes.txt").write_text("newer")
    async with opened(tmp_path) as inbox:
        assert [claim.name for claim in await all_claims(inbox)] == ["a.json"]
        await inbox.release_all()
    assert contents(tmp_path) == {"notes.txt": "newer", "notes.1.txt": "mine", "a.json": "[1]"}


async def test_what_is_no_file_in_a_dead_lease_is_kept_where_it_is(tmp_path):
    path = leave_in_dead_lease(tmp_path, "host-1-aa", 1, "a.json", "[1]")
    (path.parent / "folder.json").mkdir()
    (path.parent / "folder.json" / "inner").write_text("x")
    async with opened(tmp_path) as inbox:
        assert [claim.name for claim in await all_claims(inbox)] == ["a.json"]
    assert (path.parent / "folder.json" / "inner").read_text() == "x"


def test_a_lease_that_was_taken_for_dead_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    make = durable.make_new_folder
    made: list[Path] = []

    def make_and_lose(path: Path) -> None:
        make(path)
        made.append(path)
        if len(made) == 1:
            path.rmdir()

    monkeypatch.setattr(durable, "make_new_folder", make_and_lose)
    lease = Lease(tmp_path)
    assert lease.folder == made[1]
    assert list(dead_leases(tmp_path, tmp_path / "own")) == []
    lease.close()


def test_a_lease_is_locked_while_its_process_lives(tmp_path):
    lease = Lease(tmp_path)
    assert open_lock(lease.folder) is None
    lease.close()
    assert list(tmp_path.iterdir()) == []
    assert open_lock(lease.folder) is None


def test_a_lock_whose_lease_was_removed_meanwhile_is_not_a_lock(tmp_path, monkeypatch):
    folder = tmp_path / "lease"
    folder.mkdir()
    (folder / ".lock").touch()
    flock = open_lock.__globals__["fcntl"].flock

    def removed_meanwhile(lock: int, operation: int) -> None:
        (folder / ".lock").unlink()
        flock(lock, operation)

    monkeypatch.setattr("daemon.fs.lease.fcntl.flock", removed_meanwhile)
    assert open_lock(folder) is None


async def test_a_release_does_not_replace_a_newer_file(tmp_path, either_move):
    (tmp_path / "a.json.gz").write_text("old")
    async with opened(tmp_path) as inbox:
        (claim,) = await all_claims(inbox)
        (tmp_path / "a.json.gz").write_text("new")
        await inbox.release([claim])
    assert contents(tmp_path) == {"a.json.gz": "new", "a.1.json.gz": "old"}


async def test_failures_replace_neither_files_nor_notes(tmp_path, either_move):
    async with opened(tmp_path) as inbox:
        for name, content in (("a.json.reason.json", "0"), ("a.json", "1"), ("a.json", "2")):
            (tmp_path / name).write_text(content)
            (claim,) = await all_claims(inbox)
            await inbox.fail(claim, FileError("empty", "nothing"), None)
    failed = contents(tmp_path / "failed")
    files = {name: text for name, text in failed.items() if not text.startswith("{")}
    notes = {name: json.loads(text)["name"] for name, text in failed.items() if text.startswith("{")}
    assert files == {"a.json.reason.json": "0", "a.json.1": "1", "a.json.2": "2"}
    assert notes == {
        "a.json.reason.json.reason.json": "a.json.reason.json",
        "a.json.1.reason.json": "a.json",
        "a.json.2.reason.json": "a.json",
    }


async def test_a_name_without_room_for_the_note_is_cut(tmp_path):
    name = "x" * 250 + ".json"
    (tmp_path / name).write_text("[")
    async with opened(tmp_path) as inbox:
        (claim,) = await all_claims(inbox)
        await inbox.fail(claim, FileError("empty", "nothing"), None)
    (file, note) = sorted(contents(tmp_path / "failed"))
    assert note == f"{file}.reason.json"
    assert json.loads((tmp_path / "failed" / note).read_text())["name"] == name


async def test_sources_can_be_deleted(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    async with opened(tmp_path, on_success="delete") as inbox:
        (claim,) = await all_claims(inbox)
        await inbox.retire([claim])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_file_swapped_for_a_link_after_the_look_is_put_back(tmp_path, monkeypatch):
    secret = tmp_path / ".secret"
    secret.write_text("s")
    (tmp_path / "a.json").symlink_to(secret)
    async with opened(tmp_path) as inbox:
        monkeypatch.setattr(inbox._scanner, "scan", lambda: [(Candidate("a.json", (0, 0, 0, 0)), 0.0)])
        assert await all_claims(inbox) == []
    assert (tmp_path / "a.json").readlink() == secret
    assert secret.read_text() == "s"


async def test_a_link_that_can_not_be_put_back_keeps_no_other_file_back(tmp_path, monkeypatch):
    def refuse(source: Path, target: Path) -> bool:
        raise OSError(errno.EIO, "no luck")

    (tmp_path / "a.json").symlink_to("nowhere")
    (tmp_path / "b.json").write_text("[]")
    async with opened(tmp_path) as inbox:
        found = [(Candidate(name, (0, 0, 0, 0)), 0.0) for name in ("a.json", "b.json")]
        monkeypatch.setattr(inbox._scanner, "scan", lambda: found)
        with monkeypatch.context() as patch:
            patch.setattr(durable, "move_without_replacing", refuse)
            claims, _ = inbox._next()
        assert [claim.name for claim in claims] == ["b.json"]
        await inbox.release_all()
    assert contents(tmp_path) == {"b.json": "[]"}


async def test_odd_things_are_reported_once_by_kind(tmp_path):
    (tmp_path / "link.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe\udce9.json")
    async with opened(tmp_path) as inbox:
        with capture_logs() as logs:
            inbox._scanner.scan()
            inbox._scanner.scan()
    found = sorted((entry["event"], entry["file"], entry["kind"]) for entry in logs)
    assert found == [
        ("inbox.ignored", "link.json", "symlink"),
        ("inbox.ignored", "pipe\\xe9.json", "fifo"),
    ]


async def test_a_file_rewritten_after_the_look_settles_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(inbox_module, "BATCH_FILES", 1)
    now = 0.0
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    os.utime(tmp_path / "a.json", (1, 1))
    async with opened(tmp_path, settle_seconds=5.0, rescan_seconds=0.02, clock=lambda: now) as inbox:
        looks = []
        scan = inbox._scanner.scan
        monkeypatch.setattr(inbox._scanner, "scan", lambda: looks.append(now) or scan())
        claims = inbox.claims(asyncio.Event(), once=True)
        waiting = asyncio.create_task(anext(claims))
        await until(lambda: looks)
        now = 5.0
        assert [claim.name for claim in await waiting] == ["a.json"]
        (tmp_path / "b.json").write_text("[1]")
        waiting = asyncio.create_task(anext(claims))
        seen = len(looks)
        await until(lambda: len(looks) > seen + 2)
        assert not waiting.done()
        now = 10.0
        assert [claim.path.read_text() for claim in await waiting] == ["[1]"]
        await claims.aclose()


async def test_many_files_are_claimed_from_few_looks(tmp_path, monkeypatch):
    for number in range(50):
        (tmp_path / f"{number}.json").write_text("[]")
    async with opened(tmp_path, rescan_seconds=3600.0) as inbox:
        looks = []
        scan = inbox._scanner.scan
        monkeypatch.setattr(inbox._scanner, "scan", lambda: looks.append(1) or scan())
        assert len(await all_claims(inbox)) == 50
    assert len(looks) == 2


async def test_a_claim_that_a_cancelled_reader_left_half_made_is_released_too(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[]")
    reached, go_on = threading.Event(), threading.Event()
    async with opened(tmp_path) as inbox:
        rename = durable.rename

        def slow(source: Path, target: Path) -> None:
            reached.set()
            go_on.wait(60)
            rename(source, target)

        monkeypatch.setattr(durable, "rename", slow)
        claims = inbox.claims(asyncio.Event(), once=True)
        reading = asyncio.create_task(anext(claims))
        await until(reached.is_set)
        reading.cancel()
        releasing = asyncio.create_task(inbox.release_all())
        await asyncio.sleep(0)
        go_on.set()
        await releasing
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert (tmp_path / "a.json").read_text() == "[]"
    assert list((tmp_path / ".claimed").iterdir()) == []


async def test_a_file_that_someone_else_took_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "b.json").write_text("[]")
    async with opened(tmp_path) as inbox:
        scan = inbox._scanner.scan
        gone = (Candidate("a.json", (0, 0, 0, 0)), 0.0)
        monkeypatch.setattr(inbox._scanner, "scan", lambda: [gone, *scan()])
        assert [claim.name for claim in await all_claims(inbox)] == ["b.json"]
