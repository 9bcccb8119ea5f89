from __future__ import annotations

import io
import logging

import pytest
import structlog

from daemon.observe.logs import configure


@pytest.fixture(autouse=True)
def restore():
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


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
