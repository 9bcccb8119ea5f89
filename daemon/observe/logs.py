"""One event name plus fields per line, for people on a terminal and JSON elsewhere.

`configure` is called once, by the command. Modules log through `structlog.get_logger()`. Logs never carry
the text of samples.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo

from daemon.errors import LensdError
from daemon.escaping import escape_control, escape_lines

Format = Literal["auto", "console", "json"]


def configure(format: Format, level: str, stream: TextIO | None = None) -> None:
    """Send every log line to `stream` (standard error). `auto` is console on a terminal, else JSON.

    Libraries that use the standard logging come out the same way, from warnings on.
    """
    target = SafeStream(stream)
    console = for_people(format, stream)
    shared: list[Any] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=not console),
    ]
    renderer: list[Any] = (
        # The default formatter shows local variables, and with them the text of samples.
        [
            visible_fields,
            structlog.dev.ConsoleRenderer(colors=target.isatty(), exception_formatter=visible_traceback),
        ]
        if console
        else [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    )
    structlog.configure(
        processors=[*shared, *renderer],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=target),  # type: ignore[arg-type]
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *shared],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderer],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)


def visible_fields(_logger: Any, _method: str, fields: EventDict) -> EventDict:
    """Names of files that others dropped are obeyed by no terminal; JSON escapes them by itself."""
    return {
        name: escape_control(value) if isinstance(value, str) else value for name, value in fields.items()
    }


def visible_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    text = io.StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    stream.write(escape_lines(text.getvalue()))


def for_people(format: Format, stream: TextIO | None = None) -> bool:
    """Whether lines are for a console, and not JSON."""
    return format == "console" or (format == "auto" and SafeStream(stream).isatty())


def failed(error: Exception) -> None:
    """The last line of a command that failed: in words, for a bug with its traceback."""
    log = structlog.get_logger()
    if isinstance(error, LensdError | OSError):
        log.error("service.failed", message=str(error))
    else:
        log.error("service.failed", message=type(error).__name__, exc_info=error)


class SafeStream:
    """A text stream that never refuses: file names may hold what UTF-8 can't, and work goes on without a log.

    Without a stream it is standard error as it is at each write, so that a live progress line, which
    takes the place of standard error, can keep itself below the log.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    @property
    def _target(self) -> TextIO:
        return sys.stderr if self._stream is None else self._stream

    def write(self, text: str) -> int:
        encoding = self._target.encoding or "utf-8"
        with contextlib.suppress(OSError):  # a full disk, a reader or a terminal that is gone
            self._target.write(text.encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._target.flush()

    def isatty(self) -> bool:
        return self._target.isatty()
