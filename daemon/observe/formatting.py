"""Formats numbers and times as people read them, on the page and in the terminal."""

from __future__ import annotations

from datetime import UTC, datetime

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def count(number: float) -> str:
    return f"{number:,.0f}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 file`, `2 files`."""
    return f"{count(number)} {plural(number, noun)}"


def plural(number: int, noun: str, several: str | None = None) -> str:
    return noun if number == 1 else several or f"{noun}s"


def rate(number: float) -> str:
    """Return a number to about three digits."""
    if number == 0:
        return "0"
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else count(number)


def duration(seconds: float) -> str:
    """Return a time's two largest units: `8 s`, `3 min 20 s`, `2 h 5 min`, `4 d 3 h`."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 10 or seconds == int(seconds) else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def period(seconds: float) -> str:
    """Return a duration as it follows "the last": `minute`, `5 min`."""
    return "minute" if seconds == 60 else duration(seconds)


def ago(seconds: float) -> str:
    """Return how long ago something was, in one unit, so that the text changes seldom."""
    if seconds < 5:
        return "just now"
    if seconds < 60:
        return f"{seconds // 5 * 5:.0f} s ago"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min ago"
    return f"{duration(seconds // 3600 * 3600)} ago"


def size(number: float) -> str:
    power = 0
    while number >= 1024 and power < len(UNITS) - 1:
        number /= 1024
        power += 1
    return f"{number:.{1 if power and number < 100 else 0}f} {UNITS[power]}"


def eta(seconds: float | None, *, estimated: bool) -> str:
    if seconds is None:
        return "not known yet"
    text = duration(round(seconds)) if seconds >= 1 else "under 1 s"
    return f"about {text}" if estimated else text


def iso_time(at: float) -> str:
    """Return a Unix time as ISO 8601 in UTC, to the second."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")


def utc_minute(at: float) -> str:
    """Return a Unix time as people read it: `2026-01-31 09:05 UTC`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
