"""Claimed files are opened, each by itself, whatever is wrong with another."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
from pathlib import Path

import pytest

from daemon.pause import Pause
from daemon.recipes import BUILT_IN_RECIPES
from daemon.records import Claim
from daemon.source import content
from daemon.source.folder import FolderSource, OpenedFile
from daemon.source.inbox import Inbox
from tests.support.sources import LIMITS, NO_IDENTITY

DESCRIPTORS = Path("/proc/self/fd")  # of this process
LINE = json.dumps({"text": "fine"}) + "\n"


def source_of(folder: Path, results_key: str = "key") -> FolderSource:
    inbox = Inbox(folder, settle_seconds=0.0, rescan_seconds=1.0, on_success="move")
    return FolderSource(
        inbox,
        recipes=BUILT_IN_RECIPES,
        limits=LIMITS,
        results_key=results_key,
        pause=Pause(retry_seconds=0.0),
        clock=lambda: 7.0,
    )


def claim_of(folder: Path, name: str, raw: bytes | None = LINE.encode()) -> Claim:
    """A claim of a file that was written just now, or is gone."""
    if raw is not None:
        (folder / name).write_bytes(raw)
    return Claim(name, str(folder / name), 1, NO_IDENTITY)


async def texts(file: OpenedFile) -> list[tuple[str, ...]]:
    return [sample.texts async for part in file.parts({}) for sample in part.samples]


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "compressed"])
async def test_a_file_is_known_by_its_bytes_as_they_lie_there(tmp_path, pack):
    raw = pack(LINE.encode())
    (opened,) = await source_of(tmp_path).open([claim_of(tmp_path, "f.jsonl", raw)])
    assert (opened.file.sha256, opened.file.size) == (hashlib.sha256(raw).hexdigest(), len(raw))
    assert opened.file.opened_at == 7.0
    assert await texts(opened) == [("fine",)]
    opened.close()


async def test_a_file_that_is_gone_or_unusable_costs_itself_alone(tmp_path):
    gone, good, other, last = await source_of(tmp_path).open(
        [
            claim_of(tmp_path, "gone.jsonl", None),
            claim_of(tmp_path, "good.jsonl"),
            claim_of(tmp_path, "other.xlsx"),
            claim_of(tmp_path, "last.jsonl"),
        ]
    )
    assert [opened.error and opened.error.reason for opened in (gone, other)] == [
        "vanished",
        "unsupported_format",
    ]
    assert (gone.file, other.file) == (None, None)
    for opened in (good, last):
        assert opened.error is None
        assert await texts(opened) == [("fine",)]
        opened.close()


async def test_a_unit_is_content_under_settings_read_as_a_format(tmp_path):
    claims = [claim_of(tmp_path, name) for name in ("a.jsonl", "b.NDJSON", "a.json")]
    claims.append(claim_of(tmp_path, "c.jsonl", LINE.encode() * 2))
    opened = [*await source_of(tmp_path).open(claims), *await source_of(tmp_path, "other").open(claims[:1])]
    lines, lines_too, document, other, with_other_settings = (one.file.unit for one in opened)
    assert lines == lines_too
    assert len({lines, document, other, with_other_settings}) == 4
    assert len(lines) == 12  # as folders are named by it, for the next version too
    for one in opened:
        one.close()


async def test_where_the_machine_refuses_nothing_stays_open_and_it_is_tried_again(tmp_path, monkeypatch):
    claims = [claim_of(tmp_path, "f.jsonl"), claim_of(tmp_path, "g.jsonl")]
    open_content, calls = content.open_content, []
    before = len(list(DESCRIPTORS.iterdir()))
    still_open: list[int] = []

    def refused_once(path: Path) -> content.Content:
        calls.append(path.name)
        if calls == ["f.jsonl", "g.jsonl"]:
            raise OSError(errno.EMFILE, "too many open files")
        if len(calls) == 3:
            still_open.append(len(list(DESCRIPTORS.iterdir())))
        return open_content(path)

    monkeypatch.setattr("daemon.source.folder.open_content", refused_once)
    opened = await source_of(tmp_path).open(claims)
    assert calls == ["f.jsonl", "g.jsonl", "f.jsonl", "g.jsonl"]
    assert still_open == [before]
    for one in opened:
        one.close()
