"""Types of single settings, with the checks that pydantic makes of them. Knows no sections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


REVISION = re.compile(
    r"(?!.*\.\.)[^\s/\x00-\x1f~^:?*\[\\][^\s\x00-\x1f~^:?*\[\\]*(?<!/)"
)  # as git names them


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


def check_revision(value: Any) -> Any:
    """Raises ValueError for a text that is no branch, tag or commit."""
    if isinstance(value, str) and not REVISION.fullmatch(value):
        raise ValueError("expected a branch, a tag or a commit of the hub")
    return value


SettingPath = Annotated[Path, BeforeValidator(check_path)]
SettingName = Annotated[str, BeforeValidator(check_name)]
SettingRevision = Annotated[str, BeforeValidator(check_revision)]


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


def number_or_auto(kind: type[int] | type[float], what: str) -> BeforeValidator:
    """A check for "auto" or a number above 0, which a flag or a variable gives as text."""

    def check(value: Any) -> Any:
        if value == "auto":
            return "auto"
        number = value
        if isinstance(value, str):
            try:
                number = kind(value)
            except ValueError:
                number = None
        if isinstance(number, bool) or not isinstance(number, int | kind) or not 0 < number < float("inf"):
            raise ValueError(f"expected {what} above 0, or auto")
        return number

    return BeforeValidator(check)


BatchTokens = Annotated[int | Literal["auto"], number_or_auto(int, "a number of tokens")]
Workers = Annotated[int | Literal["auto"], number_or_auto(int, "a number of workers")]


def check_gpus(value: float | str) -> float | str:
    """Raises ValueError for one GPU and a part of another."""
    if isinstance(value, float) and value > 1 and not value.is_integer():
        raise ValueError("expected whole GPUs, or a share of one, such as 0.5")
    return value


WorkerGpus = Annotated[
    float | Literal["auto"],
    AfterValidator(check_gpus),
    number_or_auto(float, "a number of GPUs, such as 1 or 0.5,"),
]
