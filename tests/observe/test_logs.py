from __future__ import annotations

import errno
import io
import json
import logging

import pytest
import structlog

from daemon.errors import MachineError
from daemon.observe.logs import configure, failed


class Utf8(io.StringIO):
    encoding = "utf-8"


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_has_one_event_and_its_fields_a_line():
    stream = Utf8()
    configure("json", "info", stream)
    structlog.get_logger().info("file.settled", file="a.json", rows=3)
    (line,) = lines(stream)
    assert (line["event"], line["file"], line["rows"], line["level"]) == ("file.settled", "a.json", 3, "info")
    assert str(line["timestamp"]).endswith("Z")


def test_auto_is_json_where_there_is_no_terminal():
    stream = Utf8()
    configure("auto", "info", stream)
    structlog.get_logger().info("hello")
    assert lines(stream)[0]["event"] == "hello"


def test_console_reads_as_a_line():
    stream = Utf8()
    configure("console", "info", stream)
    structlog.get_logger().info("file.settled", file="a.json")
    assert "file.settled" in stream.getvalue()
    assert "file=a.json" in stream.getvalue()


def test_lines_below_the_level_are_left_out():
    stream = Utf8()
    configure("json", "warning", stream)
    structlog.get_logger().info("quiet")
    structlog.get_logger().warning("loud")
    assert [line["event"] for line in lines(stream)] == ["loud"]


def test_libraries_come_out_the_same_way():
    stream = Utf8()
    configure("json", "info", stream)
    logging.getLogger("some.library").warning("watch %s", "out")
    logging.getLogger("some.library").info("chatter")
    assert [(line["event"], line["level"]) for line in lines(stream)] == [("watch out", "warning")]


def test_a_name_that_is_not_utf8_does_not_break_the_line():
    for format in ("json", "console"):
        stream = Utf8()
        configure(format, "info", stream)
        structlog.get_logger().info("file.settled", file="caf\udce9.json")
        assert "caf" in stream.getvalue()
        stream.getvalue().encode("utf-8")


class Gone(Utf8):
    """A log on a full disk, or whose reader left."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_log_that_can_not_be_written_stops_nothing():
    configure("json", "info", Gone())
    structlog.get_logger().info("file.settled", file="a.json")
    logging.getLogger("some.library").warning("careful")


@pytest.mark.parametrize(
    ("error", "said", "traced"),
    [(MachineError("the disk is gone"), "the disk is gone", False), (KeyError("a bug"), "KeyError", True)],
    ids=["the machine", "a bug"],
)
def test_the_last_line_of_a_failure_is_a_line_as_any_other(error, said, traced):
    stream = Utf8()
    configure("json", "info", stream)
    failed(error)
    (line,) = map(json.loads, stream.getvalue().splitlines())
    assert (line["event"], line["level"], line["message"]) == ("service.failed", "error", said)
    assert ("exception" in line) is traced
