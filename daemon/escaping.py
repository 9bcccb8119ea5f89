"""Text made fit for a page, a terminal and a line of a log. Knows neither."""

from __future__ import annotations

ESCAPED_BYTES = range(0xDC80, 0xDD00)  # what Python makes of bytes of a file name that are not UTF-8


def escape_control(text: str) -> str:
    """Nothing that a terminal obeys: control characters, line ends, bytes that are no text become escapes.

    So do characters that change the direction of others. What is visible already stays as it is.
    """
    return text if text.isprintable() else "".join(map(_visible, text))


def _visible(char: str) -> str:
    if char.isprintable():
        return char
    if ord(char) in ESCAPED_BYTES:
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape", "backslashreplace").decode()


def escape_lines(text: str) -> str:
    """The same of a text whose line ends are its own, as a traceback's."""
    return "\n".join(map(escape_control, text.split("\n")))


def escape_name(name: str) -> str:
    """A file name, such that no command takes it for an option either."""
    return f"./{escape_control(name)}" if name.startswith("-") else escape_control(name)


def cut_short(text: str, most: int = 60) -> str:
    """Not longer than `most` characters."""
    return text if len(text) <= most else text[: most - 3] + "..."


def printable_name(name: str) -> str:
    """A file name for JSON and logs: bytes that are not UTF-8 as escapes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
