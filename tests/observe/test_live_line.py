from __future__ import annotations

import io
import logging

import structlog
from rich.console import Console
from structlog.testing import capture_logs

from daemon.observe import progress as progress_module
from daemon.observe.logs import configure
from daemon.observe.progress import Progress


def terminal(screen: io.StringIO, term: str = "xterm") -> Console:
    return Console(file=screen, force_terminal=True, width=120, _environ={"TERM": term})


def test_a_log_line_is_printed_above_the_live_line():
    screen = io.StringIO()
    configure("console", "info")
    with Progress(terminal(screen)) as progress:
        progress.add_total(4)
        structlog.get_logger().info("file.settled")
        logging.getLogger("some.library").warning("careful")
        progress.advance(4)
    shown = screen.getvalue()
    assert shown.index("file.settled") < shown.index("careful") < shown.rindex("Progress: 4/4")


def test_a_terminal_that_cannot_redraw_gets_log_lines():
    screen = io.StringIO()
    now = [0.0]
    with capture_logs() as logs, Progress(terminal(screen, "dumb"), lambda: now[0]) as progress:
        progress.add_total(4)
        now[0] += 60.0
        progress.advance(1)
    assert [line["event"] for line in logs] == ["progress"]
    assert screen.getvalue() == ""


def test_forced_colour_does_not_make_a_pipe_a_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(progress_module.sys, "stderr", io.StringIO())
    assert not progress_module.standard_error().is_terminal
