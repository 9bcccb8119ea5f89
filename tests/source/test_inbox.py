from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from daemon.errors import FileError
from daemon.fs import durable
from daemon.records import Claim
from daemon.source import inbox as inbox_module
from daemon.source.inbox import Inbox
from daemon.source.names import numbered
from daemon.source.scan import count_waiting


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def inbox_at(path: Path, **settings: object) -> Inbox:
    defaults = {"settle_seconds": 0.0, "rescan_seconds": 0.05, "on_success": "move"}
    return Inbox(path, **{**defaults, **settings})


@contextlib.asynccontextmanager
async def opened(path: Path, **settings: object) -> AsyncIterator[Inbox]:
    inbox = inbox_at(path, **settings)
    await inbox.open()
    try:
        yield inbox
    finally:
        await inbox.close()


async def drained(inbox: Inbox) -> list[Claim]:
    """Every claim, retired at once."""
    claims = []
    async for batch in inbox.claims(asyncio.Event(), once=True):
        claims += batch
        await inbox.retire(batch)
    return claims


def settled_names(inbox: Inbox) -> list[str]:
    return [found.name for found, remaining in inbox._scanner.scan() if remaining <= 0]


async def test_a_claim_replaces_nothing_in_the_lease(tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        (tmp_path / "a.json").write_text("2")
        raise OSError(errno.EIO, "the disk is at fault")

    async with opened(tmp_path, rescan_seconds=0.0) as inbox:
        (tmp_path / "a.json").write_text("1")
        with monkeypatch.context() as faulty:
            faulty.setattr(inbox_module, "identity_of", fail)
            with pytest.raises(OSError, match="at fault"):
                inbox._next()  # moved, and its place is taken
        assert await drained(inbox) == []
        assert (tmp_path / "a.json").read_text() == "2"
    async with opened(tmp_path) as later:
        assert len(await drained(later)) == 2
    assert sorted(path.read_text() for path in (tmp_path / "done").iterdir()) == ["1", "2"]


@pytest.mark.parametrize("ignores_case", [True, False])
async def test_a_name_in_another_case_is_another_file_unless_the_file_system_takes_both_for_one(
    tmp_path, monkeypatch, ignores_case
):
    """As on macOS, where a rename to the one would replace the other."""
    there = os.path.lexists

    def lexists(path: Path) -> bool:
        return there(path) or (ignores_case and Path(path).name.lower() in os.listdir(Path(path).parent))

    async with opened(tmp_path, rescan_seconds=0.0) as inbox:
        (tmp_path / "a.json").write_text("1")
        (first,) = inbox._next()[0]
        monkeypatch.setattr(os.path, "lexists", lexists)
        (tmp_path / "A.json").write_text("2")
        claims = inbox._next()[0]
        assert [claim.name for claim in claims] == ([] if ignores_case else ["A.json"])
        await inbox.retire([first, *claims])
        monkeypatch.setattr(os.path, "lexists", there)
        await drained(inbox)
    assert {path.name: path.read_text() for path in (tmp_path / "done").iterdir()} == {
        "a.json": "1",
        "A.json": "2",
    }


async def test_what_is_not_known_to_be_claimed_goes_back(tmp_path, monkeypatch):
    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "the disk is at fault")

    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    async with opened(tmp_path, rescan_seconds=0.0) as inbox:
        with monkeypatch.context() as faulty:
            faulty.setattr(inbox_module, "identity_of", fail)
            with pytest.raises(OSError, match="at fault"):
                inbox._next()
        assert {path.name for path in tmp_path.glob("*.json")} == {"a.json", "b.json"}
        assert len(await drained(inbox)) == 2


async def test_a_claim_that_the_machine_refuses_keeps_no_other_back(tmp_path):
    def observe(operation: durable.Operation) -> None:
        if operation.name == "rename" and operation.path.name == "b.json":
            raise OSError(errno.EDQUOT, "no room")

    for name in ("a.json", "b.json", "c.json"):
        (tmp_path / name).write_text("[]")
    async with opened(tmp_path) as inbox:
        with durable.watch_operations(observe):
            claims, _ = inbox._next()
            assert [claim.name for claim in claims] == ["a.json", "c.json"]
            assert inbox.backlog
            with pytest.raises(OSError, match="no room"):
                inbox._next()
        claims, _ = inbox._next()
        assert [claim.name for claim in claims] == ["b.json"]
        await inbox.release_all()


async def test_a_file_is_ready_once_it_stayed_the_same_for_long_enough(tmp_path):
    clock = Clock()
    inbox = inbox_at(tmp_path, settle_seconds=5.0, clock=clock)
    path = tmp_path / "a.json"
    path.write_text("[")
    assert settled_names(inbox) == []
    clock.now += 4.9
    assert settled_names(inbox) == []
    path.write_text("[]")  # still growing: the wait begins anew
    clock.now += 4.9
    assert settled_names(inbox) == []
    clock.now += 5.0
    assert settled_names(inbox) == ["a.json"]


async def test_a_replaced_file_settles_anew(tmp_path):
    clock = Clock()
    inbox = inbox_at(tmp_path, settle_seconds=5.0, clock=clock)
    (tmp_path / "a.json").write_text("[]")
    settled_names(inbox)
    clock.now += 6.0
    (tmp_path / "new").write_text("[]")
    (tmp_path / "new").rename(tmp_path / "a.json")
    assert "a.json" not in settled_names(inbox)


async def test_only_regular_files_with_finished_names_are_taken(tmp_path):
    (tmp_path / "good.json").write_text("[]")
    for name in (".hidden.json", "backup.json~", "half.json.tmp", "half.json.part"):
        (tmp_path / name).write_text("[]")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "good.json")
    os.mkfifo(tmp_path / "pipe.json")
    async with opened(tmp_path) as inbox:
        assert [claim.name for claim in await drained(inbox)] == ["good.json"]
    assert {path.name for path in tmp_path.iterdir()} == {
        ".claimed", ".hidden.json", "backup.json~", "done", "failed", "folder.json", "half.json.part",
        "half.json.tmp", "link.json", "pipe.json",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        b"-rf.json",
        b"new\nline.json",
        b"caf\xe9.json",
        b"x" * 250 + b".json",
        "🧪.json".encode(),
    ],
)
async def test_hostile_names_pass_through(tmp_path, name):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_text("[]")
    async with opened(tmp_path) as inbox:
        (claim,) = await drained(inbox)
    assert os.fsencode(claim.name) == name
    assert os.listdir(os.fsencode(tmp_path / "done")) == [name]


@pytest.mark.parametrize(("limit", "value"), [("BATCH_FILES", 2), ("BATCH_BYTES", 3), ("BATCH_BYTES", 4)])
async def test_claims_are_made_a_few_at_a_time_oldest_first(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(inbox_module, limit, value)
    for age, name in ((10, "b.json"), (30, "c.json"), (20, "a.json")):
        (tmp_path / name).write_text("[]")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        first = await anext(claims)
        assert [claim.name for claim in first] == ["c.json", "a.json"]
        assert [path.name for path in tmp_path.glob("*.json")] == ["b.json"]
        await inbox.retire(first)
        await claims.aclose()


@pytest.mark.parametrize(("content", "look_in"), [("[1]", 5.0), (None, None)])
async def test_a_file_that_was_ready_and_then_changed_or_went_is_not_claimed(
    tmp_path, monkeypatch, content, look_in
):
    monkeypatch.setattr(inbox_module, "BATCH_FILES", 1)
    clock = Clock()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    async with opened(tmp_path, settle_seconds=5.0, rescan_seconds=60.0, clock=clock) as inbox:
        assert inbox._next() == ([], 5.0)
        clock.now += 5.0
        (first,) = inbox._next()[0]
        assert first.name == "a.json"
        if content is None:
            (tmp_path / "b.json").unlink()
        else:
            (tmp_path / "b.json").write_text(content)
        assert inbox._next() == ([], look_in)


async def test_a_name_that_is_under_way_waits_for_its_predecessor(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        first = await anext(claims)
        (tmp_path / "a.json").write_text("[2]")
        second = asyncio.create_task(anext(claims))
        await asyncio.sleep(0.2)  # some rescans
        assert not second.done()
        await inbox.retire(first)
        (claim,) = await second
        assert claim.path.read_text() == "[2]"
        await inbox.retire([claim])
        await claims.aclose()
    assert sorted(path.name for path in (tmp_path / "done").iterdir()) == ["a.json", "a.json.1"]


async def test_files_dropped_later_are_noticed_and_stop_ends_the_wait(tmp_path):
    stop = asyncio.Event()
    async with opened(tmp_path, rescan_seconds=3600.0) as inbox:
        claims = inbox.claims(stop, once=False)
        waiting = asyncio.create_task(anext(claims))
        await asyncio.sleep(0.3)  # let the watcher start
        staged = tmp_path / ".a"
        staged.write_text("[]")
        staged.rename(tmp_path / "a.json")
        await inbox.retire(await asyncio.wait_for(waiting, 60))
        ending = asyncio.create_task(anext(claims))
        stop.set()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(ending, 60)


async def test_a_missed_event_is_found_by_the_rescan(tmp_path, monkeypatch):
    async def deaf(*_: object, **__: object) -> AsyncIterator[object]:
        raise OSError("no inotify here")
        yield

    monkeypatch.setattr("daemon.source.watch.watchfiles.awatch", deaf)
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=False)
        waiting = asyncio.create_task(anext(claims))
        await asyncio.sleep(0)
        (tmp_path / "a.json").write_text("[]")
        assert [claim.name for claim in await asyncio.wait_for(waiting, 60)] == ["a.json"]
        await claims.aclose()


async def test_a_change_while_claimed_is_seen(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        (claim,) = await anext(claims)
        assert await inbox.recheck([claim]) == ["same"]
        with claim.path.open("a") as file:  # a writer that kept the file open
            file.write(" ")
        assert await inbox.recheck([claim]) == ["changed"]
        await inbox.release([claim])
        assert (tmp_path / "a.json").read_text() == "[] "
        await claims.aclose()


async def test_a_failed_file_lies_beside_its_reason(tmp_path):
    (tmp_path / "a.json").write_text("[")
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        (claim,) = await anext(claims)
        await inbox.fail(claim, FileError("malformed_json", "what happened"), "ab12")
        await claims.aclose()
    reason = json.loads((tmp_path / "failed/a.json.reason.json").read_text())
    assert (reason["name"], reason["reason"], reason["message"]) == (
        "a.json",
        "malformed_json",
        "what happened",
    )
    assert (reason["attempt"], reason["sha256"]) == (1, "ab12")
    assert (tmp_path / "failed/a.json").read_text() == "["


async def test_nothing_in_done_or_failed_is_ever_replaced(tmp_path):
    async with opened(tmp_path) as inbox:
        for text in ("1", "2", "3"):
            (tmp_path / "a.json").write_text(text)
            await drained(inbox)
    assert {path.name: path.read_text() for path in (tmp_path / "done").iterdir()} == {
        "a.json": "1",
        "a.json.1": "2",
        "a.json.2": "3",
    }


async def test_a_dead_process_gives_its_files_back_with_the_attempt_counted(tmp_path):
    program = """
import asyncio, sys, os
from pathlib import Path
from daemon.source.inbox import Inbox
async def main():
    inbox = Inbox(Path(sys.argv[1]), settle_seconds=0, rescan_seconds=1, on_success="move")
    await inbox.open()
    claim, = await anext(inbox.claims(asyncio.Event(), once=True))
    print(claim.attempt, flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""
    (tmp_path / "a.json").write_text("[]")
    for attempt in (1, 2):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        with child:
            assert child.stdout is not None
            assert child.stdout.readline().strip() == str(attempt).encode()
            child.send_signal(signal.SIGKILL)
    async with opened(tmp_path) as inbox:
        (claim,) = await drained(inbox)
        assert claim.attempt == 3
    assert list((tmp_path / ".claimed").iterdir()) == []


def claimed_by_the_dead(inbox: Path, lease: str, *names: str) -> None:
    """Files as a process leaves them that was killed while it worked on them for the first time."""
    folder = inbox / ".claimed" / lease / "1"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("[]")


async def test_each_file_of_the_dead_is_taken_over_once_its_name_is_free(tmp_path):
    claimed_by_the_dead(tmp_path, "one", "a.json")
    claimed_by_the_dead(tmp_path, "two", "a.json", "b.json")
    async with opened(tmp_path) as inbox:
        assert inbox.take_recovered() == 2  # a.json and b.json
        assert [claim.name for claim in await drained(inbox)] == ["a.json", "b.json", "a.json"]
    assert list((tmp_path / ".claimed").iterdir()) == []


async def test_a_file_of_the_dead_waits_for_one_of_its_name_that_is_under_way(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        first = await anext(claims)
        claimed_by_the_dead(tmp_path, "one", "a.json")
        second = asyncio.create_task(anext(claims))
        await asyncio.sleep(0.2)  # some rescans
        assert not second.done()
        await inbox.retire(first)
        assert [claim.attempt for claim in await second] == [2]
        await claims.aclose()


async def test_living_leases_keep_none_of_the_dead_behind(tmp_path):
    async with opened(tmp_path):
        claimed_by_the_dead(tmp_path, "~last", "a.json")
        async with opened(tmp_path) as inbox:
            assert inbox.take_recovered() == 1
            assert [claim.name for claim in await drained(inbox)] == ["a.json"]


async def test_a_hidden_folder_beside_the_leases_is_left_alone(tmp_path):
    hidden = tmp_path / ".claimed" / ".somebody"
    hidden.mkdir(parents=True)
    async with opened(tmp_path) as inbox:
        assert await drained(inbox) == []
    assert list(hidden.iterdir()) == []


async def test_what_is_no_input_goes_back_and_keeps_nothing_of_the_dead_behind(tmp_path):
    claimed_by_the_dead(tmp_path, "one", "a.crdownload", "b.json")
    async with opened(tmp_path) as inbox:
        assert inbox.take_recovered() == 1
        assert [claim.name for claim in await drained(inbox)] == ["b.json"]
    assert (tmp_path / "a.crdownload").exists()


async def test_a_file_taken_over_is_not_one_that_changed(tmp_path):
    claimed_by_the_dead(tmp_path, "one", "a.json")
    async with opened(tmp_path) as inbox:
        async for claims in inbox.claims(asyncio.Event(), once=True):
            assert [claim.attempt for claim in claims] == [2]
            assert await inbox.recheck(claims) == ["same"]
            await inbox.retire(claims)


async def test_a_file_is_taken_when_it_settles_and_not_at_the_next_rescan(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    async with asyncio.timeout(60), opened(tmp_path, settle_seconds=0.2, rescan_seconds=3600.0) as inbox:
        assert [claim.name for claim in await drained(inbox)] == ["a.json"]


async def test_a_name_that_is_under_way_keeps_no_other_file_waiting(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    async with asyncio.timeout(60), opened(tmp_path, settle_seconds=0.2, rescan_seconds=3600.0) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        first = await anext(claims)
        (tmp_path / "a.json").write_text("[2]")
        (tmp_path / "b.json").write_text("[]")
        second = await anext(claims)
        assert [claim.name for claim in second] == ["b.json"]
        await inbox.retire([*first, *second])
        assert [claim.name for claim in await drained(inbox)] == ["a.json"]
        await claims.aclose()


async def test_a_living_process_keeps_its_claims(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    async with opened(tmp_path) as first:
        claims = first.claims(asyncio.Event(), once=True)
        (claim,) = await anext(claims)
        async with opened(tmp_path) as second:
            assert second.take_recovered() == 0
            assert await drained(second) == []
        assert claim.path.exists()
        await first.retire([claim])
        await claims.aclose()


async def test_an_orderly_stop_gives_everything_back_without_charging_an_attempt(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    async with opened(tmp_path) as inbox:
        claims = inbox.claims(asyncio.Event(), once=True)
        await anext(claims)
        await claims.aclose()
        await inbox.release_all()
    async with opened(tmp_path) as inbox:
        (claim,) = await drained(inbox)
    assert claim.attempt == 1


async def test_the_load_counts_what_waits(tmp_path):
    (tmp_path / "a.json").write_text("12345")
    (tmp_path / "b.json").write_text("123")
    os.utime(tmp_path / "b.json", (0, 0))
    inbox = inbox_at(tmp_path)
    inbox._scanner.scan()
    load = inbox.pending()
    assert (load.files, load.bytes) == (2, 8)
    assert load.oldest_at == 0
    assert load.oldest_seconds(now=5.0) == 5
    assert load.oldest_seconds(now=-5.0) == 0
    other = count_waiting(tmp_path)
    assert (other.files, other.bytes, other.oldest_at) == (2, 8, 0)


def test_numbered_names_fit_the_file_system():
    assert numbered("a.json", 0, 255) == "a.json"
    assert numbered("a.json", 3, 255) == "a.json.3"
    assert len(os.fsencode(numbered("é" * 127 + ".json", 12, 255))) == 255


@pytest.mark.parametrize("told", [True, False], ids=["told by an event", "told by none"])
async def test_files_that_no_event_told_of_are_counted(tmp_path, monkeypatch, told):
    dropped = asyncio.Event()

    async def watch(folder, wake, ended, retry_seconds):
        await dropped.wait()
        if told:
            wake.set()
        await ended.wait()

    monkeypatch.setattr("daemon.source.watch.watch", watch)
    (tmp_path / "early.json").write_text("[]")  # found by the first look, of which no event could tell
    stop = asyncio.Event()
    async with opened(tmp_path, rescan_seconds=1000 if told else 0.02) as inbox:
        claims = inbox.claims(stop, once=False)
        (early,) = await anext(claims)
        coming = asyncio.create_task(anext(claims))
        while inbox.pending().files:  # until a look saw the inbox empty
            await asyncio.sleep(0)
        (tmp_path / "late.json").write_text("[]")
        dropped.set()
        (late,) = await coming
        assert (early.name, late.name) == ("early.json", "late.json")
        assert inbox.take_found() == (0 if told else 1)
        assert inbox.take_found() == 0
        stop.set()
        await claims.aclose()
