from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from daemon.observe.progress import Progress


class FakeClock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def on_paper(clock: FakeClock) -> Progress:
    return Progress(Console(file=io.StringIO(), force_terminal=False), clock)


def test_the_line_says_done_rate_and_time_left():
    clock = FakeClock()
    with on_paper(clock) as progress:
        progress.add_total(200)
        clock.now += 10.0
        progress.advance(80)
        assert progress.line() == "Progress: 80/200 samples | Rate: 8.0 samples/sec | ETA: 15s"


def test_before_anything_is_done_the_time_left_is_unknown():
    with on_paper(FakeClock()) as progress:
        progress.add_total(10)
        assert progress.line() == "Progress: 0/10 samples | Rate: 0.0 samples/sec | ETA: ?"


def test_the_rate_is_of_the_recent_past():
    clock = FakeClock()
    with on_paper(clock) as progress:
        progress.add_total(1000)
        for _ in range(20):
            clock.now += 10.0
            progress.advance(10)
        for _ in range(10):
            clock.now += 10.0
            progress.advance(30)
        assert progress.rate == pytest.approx(3.0)


def test_waiting_for_files_does_not_slow_the_rate():
    clock = FakeClock()
    with on_paper(clock) as progress:
        progress.add_total(10)
        clock.now += 1.0
        progress.advance(10)
        clock.now += 3600.0
        progress.add_total(10)
        clock.now += 1.0
        progress.advance(10)
        assert progress.rate == pytest.approx(10.0)


def test_without_a_terminal_a_line_is_logged_now_and_then():
    clock = FakeClock()
    with capture_logs() as logs, on_paper(clock) as progress:
        progress.add_total(100)
        for _ in range(25):
            clock.now += 1.0
            progress.advance(2)
    assert [(line["event"], line["done"], line["total"]) for line in logs] == [
        ("progress", 20, 100),
        ("progress", 40, 100),
    ]
    assert logs[0]["rate"] == pytest.approx(2.0)
    assert logs[0]["eta_seconds"] == 40


def test_on_a_terminal_a_bar_is_drawn():
    clock = FakeClock()
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    with Progress(console, clock) as progress:
        progress.add_total(4)
        clock.now += 1.0
        progress.advance(4)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "Progress: 4/4 samples | Rate: 4.0 samples/sec | ETA: 0s" in shown
    assert "━" in shown
