"""Makes the page of findings of a folder of results, by `lensd report` in a process of its own.

So its memory and its crashes stay out of the daemon's. Knows nothing about what the page says. Functions
block.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from daemon.escaping import cut_short, escape_control
from daemon.records import FileTotals

REPORT = "report.html"
PARTIAL = f".{REPORT}.*.partial"  # as `daemon.findings.whole_files` names a file for a moment
COMMAND = (sys.executable, "-m", "daemon.cli", "report")
LIMIT_SECONDS = 900.0  # after which a report is given up
NICENESS = 10  # the model goes before it
MESSAGE_CHARS = 300


class ReportFailed(Exception):
    """A folder has no report; its results are whole."""


class ReportMaker:
    """Makes reports, several at a time; `close` ends those that are being made."""

    def __init__(
        self,
        command: Sequence[str] = COMMAND,
        limit_seconds: float = LIMIT_SECONDS,
        plot_cache: Path | None = None,
    ) -> None:
        """`plot_cache` is where the library that plots keeps its fonts, unless the environment says where."""
        self._command = tuple(command)
        self._environment = dict(os.environ)
        if plot_cache is not None:
            self._environment.setdefault("MPLCONFIGDIR", os.fspath(plot_cache))
        self._limit_seconds = limit_seconds
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def make(self, folder: Path) -> FileTotals:
        """Write `report.html` into a folder that holds results and their manifest. It is not flushed.

        Raises ReportFailed with one line; nothing of the file is left then, half-written or whole.
        """
        path = folder / REPORT
        remove_partial(folder)  # of an earlier attempt, which a crash ended
        try:
            self._run([*self._command, os.fspath(folder), "--output", os.fspath(path)])
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            return FileTotals(REPORT, rows=0, bytes=path.stat().st_size, sha256=digest)
        except (ReportFailed, OSError) as error:
            path.unlink(missing_ok=True)
            raise ReportFailed(str(error)) from None
        finally:
            remove_partial(folder)

    def close(self) -> None:
        """End what is running; nothing starts any more. Safe to repeat."""
        with self._lock:
            self._closed = True
            for process in self._running:
                process.kill()

    def _run(self, command: list[str]) -> None:
        with self._lock:
            if self._closed:
                raise ReportFailed("the daemon is stopping")
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is the daemon's, which finishes its files
            )
            self._running.add(process)
        try:
            os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
            _, said = process.communicate(timeout=self._limit_seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise ReportFailed(f"not done after {self._limit_seconds:g} s") from None
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            raise ReportFailed(last_line(said) or f"ended with exit code {process.returncode}")


def remove_partial(folder: Path) -> None:
    """Remove what a report that was killed may have left of its page."""
    for path in folder.glob(PARTIAL):
        path.unlink(missing_ok=True)


def last_line(said: bytes) -> str:
    lines = said.decode("utf-8", "backslashreplace").strip().splitlines()
    return cut_short(escape_control(lines[-1]), MESSAGE_CHARS) if lines else ""
