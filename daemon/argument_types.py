"""Types of arguments of the command line, with what is said of those that are none."""

from __future__ import annotations

import argparse
from pathlib import Path

from daemon.errors import ConfigError


def path(text: str) -> Path:
    """A path given on the command line. Raises ConfigError where it is empty."""
    if not text.strip():
        raise ConfigError("an empty path is no path: name one, or leave the argument out")
    return Path(text)


def input_file(text: str) -> Path:
    """A file given on the command line. Raises ConfigError where there is none."""
    file = path(text)
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder: name a file in it")
    if not file.is_file():
        raise ConfigError(f"{file}: no such file")
    return file


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 (got {text!r})")
    return value


def sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(positive(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected numbers above 0, such as 1,8,32 (got {text!r})") from None


def baseline_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(
            f"an empty name names none: expected names, such as sequential,original (got {text!r})"
        )
    return names
