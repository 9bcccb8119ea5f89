"""People and machines are shown the course of a run, never the text of samples."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
import structlog

from daemon.observe.logs import configure
from tests.reliability.daemons import Job
from tests.reliability.handling import events, running, wait_until
from tests.reliability.test_disk_full import get, url_of
from tests.support import tiny

SECRET = "xyzzy"
GOOD = {"id": "a", "prompt": f"{SECRET} is", "fact": f" {SECRET}", "hallucination": f" not {SECRET}"}
BAD_RECORDS = (
    f'{{"prompt": "{SECRET}", "fact": "{SECRET}"}}',
    f'{{"prompt": "{SECRET}", "fact": "{SECRET}", "hallucination": ["{SECRET}"]}}',
    f'{{"prompt": "{SECRET}", "prompt": "{SECRET}", "fact": "", "hallucination": ""}}',
    f'{{"prompt": "{SECRET}", "fact": "{SECRET}", "hallucination": NaN}}',
    f'{{"prompt": "{SECRET}\\ud800", "fact": "{SECRET}", "hallucination": "{SECRET}"}}',
    f'{{"prompt": "{SECRET}", "fact": "{SECRET * 9000}", "hallucination": "{SECRET}"}}',
    f'{{"prompt": "{SECRET}", {SECRET}',
    f'"{SECRET}"',
    f'["{SECRET}"]',
    SECRET,
)
BAD_FILES = {
    "cut.json": f'[{{"prompt": "{SECRET}',
    "text.json": f'"{SECRET}"',
    "words.json": SECRET,
    "list.json": f'["{SECRET}"]',
    "samples.json": f'{{"samples": "{SECRET}"}}',
    "latin.json": f'[{{"prompt": "{SECRET}\udce9"}}]',
    "zipped.jsonl.gz": SECRET,
    "zipped.jsonl.zst": SECRET,
    "other.json": f'[{{"{SECRET}": "{SECRET}"}}]',
}


class Utf8(io.StringIO):
    encoding = "utf-8"


def fail_over(words: list[str]) -> None:
    text = " ".join(words)
    raise RuntimeError(str(len(text)))


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_traceback_does_not_show_local_variables(format):
    stream = Utf8()
    configure(format, "info", stream)
    for logger in (structlog.get_logger(), logging.getLogger("some.library")):
        try:
            fail_over(["what", "the", "sample", "said"])
        except RuntimeError:
            logger.exception("broken")
    assert stream.getvalue().count("in fail_over") == 2
    assert "what the sample said" not in stream.getvalue()


@pytest.mark.slow
def test_nothing_that_is_shown_of_a_run_holds_text_of_its_samples(daemons, tmp_path):
    inbox, log = tmp_path / "inbox", tmp_path / "log"
    inbox.mkdir()
    lines = [*map(json.dumps, [GOOD, *tiny.contrast_records(3)]), *BAD_RECORDS]
    contents = BAD_FILES | {"study.jsonl": "".join(f"{line}\n" for line in lines)}
    for name, content in contents.items():
        (inbox / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    flags = {"http.enabled": True, "http.address": "127.0.0.1:0", "log.level": "debug"}
    with running(daemons, Job(inbox, tmp_path / "outbox", log, once=False, flags=flags)) as pid:
        url = url_of(log, pid)
        wait_until(lambda: len(events(log, "file.settled")) == len(contents), "every file", pid)
        wait_until(
            lambda: len(json.loads(get(f"{url}/status.json")[1])["files"]) == len(contents), "the page", pid
        )
        shown = {path: get(url + path)[1] for path in ("/", "/status.json", "/metrics", "/livez", "/readyz")}
    shown["the log"] = log.read_text()
    shown |= {path.name: path.read_text() for path in inbox.glob("failed/*.reason.json")}
    shown |= {path.name: path.read_text() for path in (tmp_path / "outbox").glob("*/rejects.jsonl")}
    assert len(shown) == 6 + len(BAD_FILES) + 1
    assert shown["rejects.jsonl"].count("\n") == len(BAD_RECORDS)
    assert [name for name, text in shown.items() if SECRET in text] == []
    assert_every_line_has_its_unit(log)


def assert_every_line_has_its_unit(log: Path) -> None:
    """Of those about a file; the unit is the hash of its content, as in the name of its folder."""
    about_files = [line for line in map(json.loads, log.read_text().splitlines()) if "file" in line]
    assert {line["event"] for line in about_files} == {"file.settled"}
    assert [line["file"] for line in about_files if not line.get("unit")] == []
