"""How far a report is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from daemon.observe.progress import standard_error


class ReportProgress:
    """Steps of a report, each of about as many rows as features.parquet has; a context manager."""

    def __init__(self) -> None:
        console = standard_error()
        self._bar: Progress | None = None
        if console.is_interactive:
            columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("opening folders", total=None)

    def __enter__(self) -> ReportProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, step: str, rows: int | None = None) -> None:
        """Show a step, which reads so many rows."""
        if self._bar is not None:
            self._bar.reset(self._task, description=step, total=rows)

    def advance(self, rows: int) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, rows)
