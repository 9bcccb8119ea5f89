"""Names of files that others dropped, as they reach a terminal: shown, never obeyed."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import structlog

from daemon.cli import main
from daemon.errors import ConfigError, FileError
from daemon.escaping import escape_control, escape_lines, escape_name
from daemon.observe.logs import configure
from daemon.observe.status import from_json, to_json
from daemon.source.claims import CLAIMED, FAILED
from daemon.source.failed import reason_of
from daemon.source.inbox import Inbox
from daemon.source.retry import chosen, retry
from tests.observe.test_status import INFO, Daemon
from tests.support import tiny

HOSTILE = {
    "new\nline.json": r"new\nline.json",
    "over\rwrite.json": r"over\rwrite.json",
    "tab\t.json": r"tab\t.json",
    "clear\x1b[2J\x1b[H.json": r"clear\x1b[2J\x1b[H.json",
    "title\x1b]0;owned\x07.json": r"title\x1b]0;owned\x07.json",
    "c1\x9b31m.json": r"c1\x9b31m.json",
    "del\x7f.json": r"del\x7f.json",
    "turned\u202enosj.json": r"turned\u202enosj.json",
    "raw\udcff\udc9b.json": r"raw\xff\x9b.json",
    "-rf.json": "./-rf.json",
    "--inbox=elsewhere.json": "./--inbox=elsewhere.json",
    "[red]markup[bold].json": "[red]markup[bold].json",
    "ünï😀.json": "ünï😀.json",
}
FORGED = "message \x1b[31m\nFORGED LINE \x9bm"


def lensd(*args: str | Path, **env: str) -> subprocess.CompletedProcess[bytes]:
    root = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "daemon.cli", *args],
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **env},
        timeout=100,
    )


def assert_obeyed_by_nothing(output: bytes, encoding: str = "utf-8") -> str:
    """The output, which must be text without control characters but for the line ends."""
    text = output.decode(encoding)
    odd = {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs")} - {"\n"}
    assert not odd, text
    return text


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    """One whose `failed/` holds every hostile name, set aside by the daemon's own code."""
    for name in HOSTILE:
        (tmp_path / name).write_bytes(b"[1]")

    async def fail_all() -> None:
        box = Inbox(tmp_path, settle_seconds=0.0, rescan_seconds=0.05, on_success="move")
        await box.open()
        async for claims in box.claims(asyncio.Event(), once=True):
            for claim in claims:
                await box.fail(claim, FileError("bad", FORGED), None)
        await box.close()

    asyncio.run(fail_all())
    return tmp_path


def listed(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize(("name", "shown"), HOSTILE.items(), ids=map(ascii, HOSTILE))
def test_a_name_is_shown_so_that_nothing_obeys_it_and_once_only(name, shown):
    assert escape_name(name) == shown
    assert escape_name(shown) == shown
    assert escape_name(name).isprintable()
    assert not escape_name(name).startswith("-")


def test_a_text_of_lines_keeps_them():
    assert escape_lines("a\x1b\nb\n") == "a\\x1b\nb\n"
    assert escape_control("plain") == "plain"


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_failed_files_are_listed_a_line_each(inbox, encoding):
    result = lensd("retry", "--list", "--inbox", inbox, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"")
    text = assert_obeyed_by_nothing(result.stdout, encoding)
    lines = text.splitlines()
    assert len(lines) == len(HOSTILE)
    for shown in HOSTILE.values():
        written = shown.encode(encoding, "backslashreplace").decode(encoding)
        assert [line for line in lines if line.startswith(f"{written}  ")], shown
    assert all(r"bad: message \x1b[31m\nFORGED LINE \x9bm" in line for line in lines)


@pytest.mark.slow
def test_what_was_put_back_is_listed_and_has_its_name(inbox):
    result = lensd("retry", "--inbox", inbox)
    assert (result.returncode, result.stderr) == (0, b"")
    lines = assert_obeyed_by_nothing(result.stdout).splitlines()
    assert lines[-1] == f"{len(HOSTILE)} put back into {inbox}"
    assert sorted(line.partition(" -> ")[0] for line in lines[:-1]) == sorted(HOSTILE.values())
    assert listed(inbox) == set(HOSTILE)


@pytest.mark.slow
@pytest.mark.parametrize("told", ["as it is", "as it is shown"])
def test_one_file_is_named_by_its_bytes_or_as_it_was_listed(inbox, told):
    name = "clear\x1b[2J\x1b[H.json"
    result = lensd("retry", "--inbox", inbox, name if told == "as it is" else HOSTILE[name])
    assert result.returncode == 0, result.stderr
    assert_obeyed_by_nothing(result.stdout)
    assert listed(inbox) == {name}


@pytest.mark.slow
def test_a_name_like_an_option_is_one_as_it_was_listed(inbox):
    assert lensd("retry", "--inbox", inbox, "./-rf.json").returncode == 0
    assert listed(inbox) == {"-rf.json"}


def test_two_names_that_are_shown_alike_are_told_apart_by_their_bytes(tmp_path):
    folder = tmp_path / FAILED
    folder.mkdir()
    (tmp_path / CLAIMED).mkdir()
    for name in ("a\x1b.json", "a\x1b\udc9b.json", r"a\x1b\x9b.json", "b\n.json", r"b\n.json"):
        (folder / name).write_bytes(b"[1]")
        reason_of(folder / name).write_text("{}")
    assert [failed.path.name for failed in chosen(tmp_path, [r"a\x1b\x9b.json"])] == [r"a\x1b\x9b.json"]
    (folder / r"a\x1b\x9b.json").unlink()
    (folder / "a\x1b\x9b.json").write_bytes(b"[1]")
    reason_of(folder / "a\x1b\x9b.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"2 files in .* are shown so: give the bytes"):
        retry(tmp_path, [r"a\x1b\x9b.json"])
    ((failed, _),) = retry(tmp_path, ["b\n.json"])
    assert failed.path.name == "b\n.json"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gone\x1b[2J\n.json", "--gone\x1b[2J\n"], ids=["a file", "an option"])
def test_a_complaint_is_obeyed_by_nothing(inbox, name):
    result = lensd("retry", "--inbox", inbox, name)
    assert result.returncode == 2
    assert r"gone\x1b[2J\n" in assert_obeyed_by_nothing(result.stderr)
    assert not listed(inbox)


def test_who_may_not_put_files_back_is_told_so_in_a_line(inbox, monkeypatch, capsys):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("daemon.fs.durable.locked", refuse)
    assert main(["retry", "--inbox", str(inbox)]) == 3
    said = capsys.readouterr().err
    assert said == f"lensd: {inbox}/.claimed/.failing: Permission denied: retry as the daemon's user\n"


def test_a_daemon_that_is_asked_can_not_write_to_the_terminal():
    daemon = Daemon()
    daemon.board.describe(INFO, 4096)
    settled = {"name": "\x1b[2J", "outcome": "failed", "rows": 0, "rejects": 0, "seconds": 0.0, "unit": None}
    answer = json.loads(to_json(daemon.status())) | {
        "host": "\x9bm",
        "files": [settled | {"reason": "a\nb", "message": None, "at": 1.5}],
    }
    told = from_json(json.dumps(answer).encode())
    (file,) = told.files
    assert (told.host, file.name, file.reason) == (r"\x9bm", r"\x1b[2J", r"a\nb")
    assert (file.message, file.at) == (None, 1.5)


def test_a_bug_s_traceback_on_a_console_is_obeyed_by_nothing():
    stream = io.StringIO()
    configure("console", "info", stream)
    try:
        raise KeyError(FORGED)
    except KeyError:
        structlog.get_logger().exception("bug\x1b[2J", file="a\x1b]0;x\x07")
    text = assert_obeyed_by_nothing(stream.getvalue().encode())
    assert r"a\x1b]0;x\x07" in text
    assert "Traceback" in text


@pytest.mark.slow
@pytest.mark.parametrize("format", ["console", "json"])
def test_the_daemon_s_log_is_obeyed_by_nothing(tmp_path, format):
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.make_tiny(tmp_path).toml() + "[inbox]\nsettle_seconds = 0\n")
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    for name in HOSTILE:
        (inbox / name).write_text("[{")
    os.mkfifo(inbox / "pipe\x1b[2J")
    folders = ("--inbox", inbox, "--outbox", tmp_path / "outbox")
    result = lensd("run", "--once", "--no-http", "--config", toml, *folders, "--log-format", format)
    assert result.returncode == 1, result.stderr
    assert_obeyed_by_nothing(result.stdout)
    text = assert_obeyed_by_nothing(result.stderr)
    assert "title" in text
    assert r"\x1b" in text if format == "console" else r"\u001b" in text
    assert listed(inbox / FAILED) >= set(HOSTILE)
