"""Types of single settings, with the checks that pydantic makes of them. Knows no sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator


def check_path(value: Any) -> Any:
    """Raises ValueError for a text that names no place: `Path("")` would be the working folder."""
    if isinstance(value, str):
        if not value.strip():
            raise ValueError("an empty path is no path: name one, or leave the setting out")
        if "\0" in value:
            raise ValueError("a path can't hold a NUL character")
        if value == "~" or value.startswith("~/"):
            raise ValueError("~ is not expanded in settings: write the whole path")
    return value


def check_name(value: Any) -> Any:
    """Raises ValueError for a text that names nothing."""
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ValueError("an empty name is no name: give one, or leave the setting out")
    return value


SettingPath = Annotated[Path, BeforeValidator(check_path)]
SettingName = Annotated[str, BeforeValidator(check_name)]


def check_pattern(value: str) -> str:
    """Raises ValueError for a pattern that no file name can match."""
    if not value.strip() or "/" in value or "\0" in value:
        raise ValueError("expected a pattern of file names, such as *.bak.json, without a folder")
    return value


def check_list(value: Any) -> Any:
    """Raises ValueError for one text where a list of them is due."""
    if isinstance(value, str):
        raise ValueError('expected a list of patterns, such as ["*.bak.json"]')
    return value


NamePattern = Annotated[str, AfterValidator(check_pattern)]
NamePatterns = Annotated[tuple[NamePattern, ...], BeforeValidator(check_list)]


def check_batch_tokens(value: Any) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError("expected a number of tokens above 0, or auto")
    return number


BatchTokens = Annotated[int | Literal["auto"], BeforeValidator(check_batch_tokens)]
