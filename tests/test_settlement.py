"""How each file ends, by what arrives of it and by what became of it meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from daemon.errors import FileError
from daemon.fs import durable
from daemon.pause import Pause
from daemon.recipes import BUILT_IN_RECIPES, CONTRAST_RECIPE
from daemon.records import Claim, FileFailed, FinishedPart, InputFile, KeptPart, Outcome, Part
from daemon.settlement import Settlement
from daemon.sink.folder import FolderSink
from daemon.sink.outbox import Outbox
from daemon.sink.parts import StoredPart
from daemon.sink.report import ReportMaker
from daemon.sink.writer import UnitWriter
from daemon.source.folder import FolderSource
from daemon.source.formats import without_suffix
from daemon.source.inbox import Inbox
from tests.support.handmade import INFO, finish, make_part
from tests.support.sources import LIMITS

BROKEN = FileError("malformed_json", "it ends in the middle: export it again")


class Work:
    """An inbox and an outbox in a folder, and what claims from the one for the other."""

    def __init__(self, folder: Path, reports: ReportMaker | None = None) -> None:
        self.now = 100.0
        self.inbox = Inbox(folder / "inbox", settle_seconds=0.0, rescan_seconds=0.05, on_success="move")
        self.outbox = Outbox(folder / "outbox")
        pause = Pause(retry_seconds=0.0)
        self.sink = FolderSink(
            self.outbox,
            info=INFO,
            values="float32",
            settings={},
            pause=pause,
            reports=reports,
            clock=lambda: self.now,
        )
        self.source = FolderSource(
            self.inbox, recipes=BUILT_IN_RECIPES, limits=LIMITS, results_key="key", pause=pause
        )
        self.settlement = Settlement(self.source, self.sink)

    async def files(self, *names: str) -> list[InputFile]:
        """Claimed files, each of a unit of its own."""
        for name in names:
            (self.inbox.path / name).write_text("[]")
        claims: list[Claim] = []
        async for some in self.inbox.claims(asyncio.Event(), once=True):
            claims += some
        by_name = {claim.name: claim for claim in claims}
        return [
            InputFile(by_name[name], "c" * 64, 2, f"{number:012x}", self.now - 1.5, without_suffix(name))
            for number, name in enumerate(names)
        ]

    async def settle(self, arrivals: Sequence[FinishedPart | KeptPart | FileFailed]) -> list[Outcome]:
        return await self.settlement.publish(await self.sink.write(arrivals))

    @property
    def results(self) -> set[str]:
        """Names of what is published."""
        return {path.name for path in self.outbox.path.iterdir() if not path.name.startswith(".")}

    @property
    def stored(self) -> list[Path]:
        """Folders that are half-made or kept for another attempt."""
        return [path for path in self.outbox.path.glob(".staging/*/*") if path.is_dir()]


@contextlib.asynccontextmanager
async def working(folder: Path, reports: ReportMaker | None = None) -> AsyncIterator[Work]:
    for name in ("inbox", "outbox"):
        (folder / name).mkdir(exist_ok=True)
    work = Work(folder, reports)
    await work.inbox.open()
    work.outbox.open()
    try:
        yield work
    finally:
        work.sink.close()
        work.outbox.close()
        await work.inbox.close()


def part_of(file: InputFile, number: int, **options: object) -> FinishedPart:
    """The `number`th part of a file, of 3 records."""
    return finish(make_part(number, 3 * number, 3, file=file, **options))


async def test_a_file_is_committed_with_its_last_part_whatever_the_order(tmp_path):
    async with working(tmp_path) as work:
        (file,) = await work.files("a.json")
        parts = [part_of(file, 0, rejected=(1,)), part_of(file, 1), part_of(file, 2, last=True)]
        assert await work.sink.write([parts[2]]) == []
        assert await work.sink.write([parts[0]]) == []
        (unit,) = await work.sink.write([parts[1]])
        assert unit.nbytes == sum(part.nbytes for part in parts)
        assert work.results == set()
        (outcome,) = await work.settlement.publish([unit])
        assert (outcome.kind, outcome.rows, outcome.rejects, outcome.readings) == ("committed", 8, 1, 8)
        assert (outcome.mean_l0, outcome.seconds) == ((6.0, 6.0), 1.5)
        assert work.results == {outcome.folder.name} == {f"a-{file.unit}"}
        assert work.stored == []
        assert json.loads((outcome.folder / "manifest.json").read_text())["seconds"] == 1.5
        assert [path.name for path in (work.inbox.path / "done").iterdir()] == ["a.json"]


SEES_THE_FOLDER = (
    "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]);"
    " rows = json.loads((folder / 'manifest.json').read_text())['rows'];"
    " pathlib.Path(sys.argv[3]).write_text(f'{rows} rows')"
)


async def test_a_page_of_findings_is_published_with_its_folder_and_named_in_the_manifest(tmp_path):
    async with working(tmp_path, ReportMaker((sys.executable, "-c", SEES_THE_FOLDER))) as work:
        (file,) = await work.files("a.json")
        (outcome,) = await work.settle([part_of(file, 0, last=True)])
        assert (outcome.report, outcome.report_failed) == ("report.html", None)
        assert (outcome.folder / "report.html").read_text() == "3 rows"
        listed = json.loads((outcome.folder / "manifest.json").read_text())["files"]
        page = next(entry for entry in listed if entry["name"] == "report.html")
        assert page["sha256"] == hashlib.sha256(b"3 rows").hexdigest()
        assert {entry["name"] for entry in listed} | {"manifest.json"} == {
            path.name for path in outcome.folder.iterdir()
        }


async def test_a_folder_whose_page_fails_is_published_without_it(tmp_path):
    async with working(tmp_path, ReportMaker((sys.executable, "-c", "raise SystemExit('no words')"))) as work:
        (file,) = await work.files("a.json")
        (outcome,) = await work.settle([part_of(file, 0, last=True)])
        assert (outcome.kind, outcome.report, outcome.report_failed) == ("committed", None, "no words")
        assert not (outcome.folder / "report.html").exists()
        listed = json.loads((outcome.folder / "manifest.json").read_text())["files"]
        assert "report.html" not in {entry["name"] for entry in listed}


async def test_a_part_that_an_earlier_attempt_stored_counts_and_another_of_it_does_not(tmp_path):
    async with working(tmp_path) as work:
        (file,) = await work.files("a.json")
        first, last = part_of(file, 0), part_of(file, 1, last=True)
        assert await work.sink.write([first]) == []
        work.sink._units.clear()
        extents = (await work.sink.stored(file.unit)).extents
        assert extents == {0: first.part.part.extent}
        kept = KeptPart(file, extents[0], False, CONTRAST_RECIPE)
        (unit,) = await work.sink.write([kept, last])
        assert unit.nbytes == last.nbytes
        (outcome,) = await work.settlement.publish([unit])
        assert (outcome.kind, outcome.rows) == ("committed", 6)
        assert work.stored == []


async def test_a_part_stored_before_the_disk_was_full_is_not_stored_again(tmp_path, monkeypatch):
    write_part = UnitWriter.write_part
    tried: list[int] = []

    def full_once(writer: UnitWriter, part: Part, stored: StoredPart) -> None:
        tried.append(part.number)
        if tried == [0, 1]:
            raise OSError(errno.ENOSPC, "no space left")
        write_part(writer, part, stored)

    monkeypatch.setattr(UnitWriter, "write_part", full_once)
    async with working(tmp_path) as work:
        (file,) = await work.files("a.json")
        (outcome,) = await work.settle([part_of(file, 0), part_of(file, 1, last=True)])
        assert tried == [0, 1, 1]
        assert (outcome.kind, outcome.rows) == ("committed", 6)


async def test_a_file_that_broke_fails_when_all_parts_on_their_way_have_come(tmp_path):
    async with working(tmp_path) as work:
        broken, fine = await work.files("broken.json", "fine.json")
        failed = FileFailed(broken, BROKEN, parts=2)
        assert await work.sink.write([part_of(broken, 0)]) == []
        assert await work.sink.write([failed]) == []
        units = await work.sink.write([part_of(broken, 1), part_of(fine, 0, last=True)])
        assert {unit.file.claim.name for unit in units} == {"fine.json", "broken.json"}
        outcomes = await work.settlement.publish(units)
        assert {(one.name, one.kind, one.reason) for one in outcomes} == {
            ("broken.json", "failed", BROKEN.reason),
            ("fine.json", "committed", None),
        }
        assert work.results == {f"fine-{fine.unit}"}
        assert work.stored == []
        assert (work.inbox.path / "failed/broken.json").is_file()


async def test_a_file_that_broke_before_its_first_part_fails(tmp_path):
    async with working(tmp_path) as work:
        (file,) = await work.files("a.json")
        (outcome,) = await work.settle([FileFailed(file, BROKEN, parts=0)])
        assert (outcome.kind, outcome.unit, outcome.message) == ("failed", file.unit, str(BROKEN))


async def test_a_file_of_rejects_alone_fails_beside_one_with_a_row(tmp_path):
    async with working(tmp_path) as work:
        none, one = await work.files("none.json", "one.json")
        outcomes = await work.settle(
            [
                part_of(none, 0, rejected=(0, 1, 2)),
                part_of(none, 1, rejected=(3, 4, 5), last=True),
                part_of(one, 0, rejected=(0, 1)),
                part_of(one, 1, rejected=(3, 4, 5), last=True),
            ]
        )
        assert {(out.name, out.kind, out.reason, out.rows) for out in outcomes} == {
            ("none.json", "failed", "no_usable_record", 0),
            ("one.json", "committed", None, 1),
        }
        assert work.stored == []


async def test_results_of_a_file_that_changed_or_is_gone_are_not_published(tmp_path):
    async with working(tmp_path) as work:
        gone, changed, same = await work.files("gone.json", "changed.json", "same.json")
        units = await work.sink.write(
            [part_of(file, number, last=number == 1) for file in (gone, changed, same) for number in (0, 1)]
        )
        gone.claim.path.unlink()
        changed.claim.path.write_text("[1, 2]")
        outcomes = await work.settlement.publish(units)
        assert {(one.name, one.kind, one.reason) for one in outcomes} == {
            ("gone.json", "failed", "vanished"),
            ("changed.json", "requeued", "changed"),
            ("same.json", "committed", None),
        }
        assert work.results == {f"same-{same.unit}"}
        assert work.stored == []
        assert (work.inbox.path / "changed.json").read_text() == "[1, 2]"


async def test_of_two_processes_with_one_content_the_second_has_a_duplicate(tmp_path):
    async with working(tmp_path) as first, working(tmp_path) as second:
        (file,) = await first.files("a.json")
        (same,) = await second.files("b.json")
        assert same.unit == file.unit
        (theirs,) = await first.sink.write([part_of(file, 0, last=True)])
        (ours,) = await second.sink.write([part_of(same, 0, last=True)])
        (committed,) = await first.settlement.publish([theirs])
        (duplicate,) = await second.settlement.publish([ours])
        assert (committed.kind, duplicate.kind, duplicate.name) == ("committed", "duplicate", "b.json")
        assert first.results == {duplicate.folder.name} == {committed.folder.name}
        assert first.stored == []
        assert {path.name for path in (tmp_path / "inbox/done").iterdir()} == {"a.json", "b.json"}


async def test_a_file_that_changed_is_no_duplicate_and_no_failure_but_read_again(tmp_path):
    async with working(tmp_path) as work:
        known, bad = await work.files("known.json", "bad.json")
        for file in (known, bad):
            file.claim.path.write_text("[1, 2]")
        outcomes = [
            await work.settlement.duplicate(known, tmp_path),
            await work.settlement.fail(bad, BROKEN),
        ]
        assert [(one.kind, one.reason) for one in outcomes] == [("requeued", "changed")] * 2
        assert {path.name for path in work.inbox.path.glob("*.json")} == {"known.json", "bad.json"}


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "not flushed"])
async def test_a_forced_stop_puts_files_back_and_keeps_their_parts(tmp_path, flush):
    operations: list[str] = []
    async with working(tmp_path) as work:
        (file,) = await work.files("a.json")
        await work.sink.write([part_of(file, 0)])
        with durable.watch_operations(lambda operation: operations.append(operation.name)):
            work.sink.close()
            await work.source.give_back_all(flush=flush)
        assert ("fsync_folder" in operations) == flush
        assert (work.inbox.path / "a.json").is_file()
        assert [path.suffix for path in work.stored] == [".parts"]


def test_the_log_says_of_an_outcome_what_there_is_to_say():
    failed = Outcome("failed", "a.json", reason="vanished", message="it is gone")
    assert failed.log_fields() == {
        "outcome": "failed",
        "file": "a.json",
        "rows": 0,
        "rejects": 0,
        "seconds": 0.0,
        "reason": "vanished",
        "message": "it is gone",
    }
    committed = Outcome("committed", "a.json", "unit", Path("out/a"), rows=3, clipped=2, seconds=1.23456)
    assert committed.log_fields() == {
        "outcome": "committed",
        "file": "a.json",
        "unit": "unit",
        "rows": 3,
        "rejects": 0,
        "clipped": 2,
        "seconds": 1.23,
        "folder": "out/a",
    }
