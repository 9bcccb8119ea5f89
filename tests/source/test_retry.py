"""`lensd retry`: failed files go back into the inbox, and nothing is lost or replaced on the way."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from daemon.cli import main
from daemon.errors import ConfigError, FileError
from daemon.source.inbox import Inbox
from daemon.source.retry import failed_files, retry

HOSTILE = [
    "a.json",
    "new\nline.json",
    "-rf.json",
    "a..json",
    "ünï😀.json",
    "x" * 250 + ".json",
    "raw\udcff.json",
    "raw\udcff" + "x" * 245 + ".json",
]


async def fail_all(inbox: Path) -> list[str]:
    """Claim whatever lies in the inbox and set it aside; the names in `failed/`."""
    box = Inbox(inbox, settle_seconds=0.0, rescan_seconds=0.05, on_success="move")
    await box.open()

    async for claims in box.claims(asyncio.Event(), once=True):
        for claim in claims:
            await box.fail(claim, FileError("bad", f"it is bad: attempt {claim.attempt}"), "0" * 64)
    await box.close()
    return [failed.path.name for failed in failed_files(inbox)]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_failed_file_comes_back_under_its_name(name, tmp_path):
    (tmp_path / name).write_bytes(b"[1]")
    await fail_all(tmp_path)
    assert listed(tmp_path) == []
    ((failed, target),) = retry(tmp_path, [])
    assert failed.reason == "bad"
    assert listed(tmp_path / "failed") == []
    assert target.read_bytes() == b"[1]"
    assert os.fsencode(target.name).endswith(b".json")
    if len(name) < 200:
        assert target.name == name


async def test_a_file_with_a_number_gets_its_name_back(tmp_path):
    for content in ("[1]", "[2]"):
        (tmp_path / "a.json").write_text(content)
        failed = await fail_all(tmp_path)
    assert failed == ["a.json", "a.json.1"]
    ((_, target),) = retry(tmp_path, ["a.json.1"])
    assert target == tmp_path / "a.json"
    assert target.read_text() == "[2]"
    assert [failed.name for failed in failed_files(tmp_path)] == ["a.json"]


async def test_a_file_without_a_legible_reason_gets_an_inputs_name(tmp_path):
    (tmp_path / "failed").mkdir()
    for name in ("a.json.1", "b.jsonl.gz", "notes.txt.2"):
        (tmp_path / "failed" / name).write_text("[1]")
        (tmp_path / "failed" / f"{name}.reason.json").write_text("cut o")
    assert [target.name for _, target in retry(tmp_path, [])] == ["a.json", "b.jsonl.gz", "notes.txt"]


async def test_a_name_that_is_taken_is_left_alone(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    await fail_all(tmp_path)
    (tmp_path / "a.json").write_text("[2]")
    ((_, target),) = retry(tmp_path, ["a.json"])
    assert target == tmp_path / "a.1.json"
    assert (tmp_path / "a.json").read_text() == "[2]"


async def test_attempts_are_counted_anew(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    for _ in range(3):
        await fail_all(tmp_path)
        (failed,) = failed_files(tmp_path)
        assert failed.message == "it is bad: attempt 1"
        retry(tmp_path, [])


async def test_an_unknown_name_moves_nothing(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    await fail_all(tmp_path)
    with pytest.raises(ConfigError, match=r"b\.json: no such file in .*failed: `lensd retry --list`"):
        retry(tmp_path, ["a.json", "b.json"])
    assert [failed.name for failed in failed_files(tmp_path)] == ["a.json"]


@pytest.mark.parametrize("name", ["../evil.json", "/etc/passwd", "..", "", "a\0b"])
async def test_a_reason_cannot_send_a_file_elsewhere(name, tmp_path):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    (inbox / "a.json").write_text("[1]")
    await fail_all(inbox)
    reason = inbox / "failed" / "a.json.reason.json"
    reason.write_text(json.dumps({"name": name}))
    ((_, target),) = retry(inbox, [])
    assert target == inbox / "a.json"


async def test_a_failed_file_that_looks_like_a_reason_is_a_file(tmp_path):
    (tmp_path / "a.json.reason.json").write_text("[1]")
    assert await fail_all(tmp_path) == ["a.json.reason.json"]
    ((_, target),) = retry(tmp_path, [])
    assert target.name == "a.json.reason.json"


async def test_the_command_lists_and_puts_back(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[1]")
    await fail_all(tmp_path)
    assert main(["retry", "--list", "--inbox", str(tmp_path)]) == 0
    assert "a.json  20" in (shown := capsys.readouterr().out)
    assert "bad: it is bad" in shown
    assert main(["retry", "nope", "--inbox", str(tmp_path)]) == 2
    assert main(["retry", "--inbox", str(tmp_path)]) == 0
    assert f"a.json -> {tmp_path}/a.json\n1 put back into {tmp_path}" in capsys.readouterr().out
    assert main(["retry", "--inbox", str(tmp_path)]) == 0
    assert "0 put back" in capsys.readouterr().out
    assert main(["retry", "--inbox", str(tmp_path / "nowhere")]) == 2
