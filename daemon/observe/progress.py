"""How far a run is: a live line on a terminal, now and then a log line elsewhere.

Knows counts of samples and the clock, nothing else.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable

import structlog
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

RATE_WINDOW_SECONDS = 30.0
LOG_SECONDS = 10.0

log = structlog.get_logger()


def standard_error() -> Console:
    """A console there; rich alone would take a pipe for a terminal where FORCE_COLOR is set."""
    return Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)


class Progress:
    """Samples done of those read so far; a context manager around a run.

    The rate is that of the last RATE_WINDOW_SECONDS. The total grows as files are read.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.done = 0
        self.total = 0
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque()
        self._logged_at = clock()
        console = standard_error() if console is None else console
        self._bar: RichProgress | None = None
        if console.is_interactive:
            self._bar = RichProgress(TextColumn("{task.description}"), BarColumn(), console=console)
            self._task = self._bar.add_task(self.line(), total=None, visible=False)

    def __enter__(self) -> Progress:
        self._marks.append((self._clock(), self.done))
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add_total(self, samples: int) -> None:
        """More samples were read."""
        if self.done == self.total:  # the rate must not count the time spent waiting for files
            self._marks.clear()
            self._marks.append((self._clock(), self.done))
        self.total += samples
        self._show()

    def advance(self, samples: int) -> None:
        """Samples came to their end, computed or rejected."""
        if not samples:
            return
        self.done += samples
        now = self._clock()
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and now - self._marks[0][0] > RATE_WINDOW_SECONDS:
            self._marks.popleft()
        self._show()

    @property
    def rate(self) -> float:
        """Samples per second, 0 while unknown."""
        if len(self._marks) < 2:
            return 0.0
        (then, before), (now, done) = self._marks[0], self._marks[-1]
        return (done - before) / (now - then) if now > then else 0.0

    @property
    def eta_seconds(self) -> float | None:
        rate = self.rate
        return (self.total - self.done) / rate if rate else None

    def line(self) -> str:
        eta = self.eta_seconds
        left = "?" if eta is None else f"{eta:.0f}s"
        return f"Progress: {self.done}/{self.total} samples | Rate: {self.rate:.1f} samples/sec | ETA: {left}"

    def _show(self) -> None:
        if self._bar is not None:
            self._bar.update(
                self._task, description=self.line(), completed=self.done, total=self.total, visible=True
            )
            return
        now = self._clock()
        if now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            eta = self.eta_seconds
            log.info(
                "progress",
                done=self.done,
                total=self.total,
                rate=round(self.rate, 1),
                eta_seconds=None if eta is None else round(eta),
            )
