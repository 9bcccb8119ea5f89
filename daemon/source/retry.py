"""Puts files that failed back into the inbox. Safe beside running daemons; does not know why they failed.

Functions block.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import ConfigError
from daemon.escaping import escape_name
from daemon.fs import durable
from daemon.source.claims import CLAIMED, FAILED, FAILING
from daemon.source.failed import reason_of
from daemon.source.formats import is_input
from daemon.source.names import ENDING, NAME_BYTES, cut, move_to_free

NUMBER = re.compile(r"\.[0-9]+\Z")  # that keeps files of one name apart in `failed/`


@dataclass(frozen=True, slots=True)
class FailedFile:
    """A file in `failed/` and what its reason says."""

    path: Path
    dropped_as: str  # its name in the inbox
    reason: str
    message: str
    failed_at: str

    @property
    def name(self) -> str:
        """Its name there, for people."""
        return escape_name(self.path.name)


def failed_files(inbox: Path) -> list[FailedFile]:
    """Every file in `failed/` that has its reason beside it, by name."""
    folder = inbox / FAILED
    if not folder.is_dir():
        return []
    paths = set(folder.iterdir())
    return [described(path) for path in sorted(paths) if reason_of(path) in paths]


def described(path: Path) -> FailedFile:
    try:
        content = json.loads(reason_of(path).read_bytes())
    except (OSError, ValueError):
        content = None
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    dropped_as = old_name(path, str(fields.get("name", "")))
    texts = (str(fields.get(key, "")) for key in ("reason", "message", "failed_at"))
    return FailedFile(path, dropped_as, *texts)


def old_name(path: Path, noted: str) -> str:
    """The name in the inbox of a file in `failed/`, of which its reason says that it was `noted`."""
    if is_file_name(noted):
        return noted
    name = path.name if is_input(path.name) else NUMBER.sub("", path.name)
    ending = ENDING.search(noted)
    if ending is None or is_input(name) or not is_input(noted):
        return name
    return cut(name, NAME_BYTES - len(ending[0])) + ending[0]  # it was cut to make room for the reason's


def is_file_name(name: str) -> bool:
    """Whether a name out of a reason would be taken up, and is no rendering of bytes that are no text."""
    return name != "" and not name.startswith(".") and not any(char in name for char in "/\0\\")


def retry(inbox: Path, names: Sequence[str]) -> list[tuple[FailedFile, Path]]:
    """Put the named files, or all, back under their old name or the nearest free one; where each lies now.

    Raises ConfigError, and moves nothing, where a name is not in `failed/`; OSError where the disk refuses.
    """
    if not chosen(inbox, names):
        return []
    durable.make_folder(inbox / CLAIMED)
    with durable.locked(inbox / CLAIMED / FAILING):
        done = [(failed, put_back(failed, inbox)) for failed in chosen(inbox, names)]
        durable.fsync_folder(inbox)
        durable.fsync_folder(inbox / FAILED)
    return done


def chosen(inbox: Path, names: Sequence[str]) -> list[FailedFile]:
    known = failed_files(inbox)
    if not names:
        return known
    found = (the_one(known, name, inbox / FAILED) for name in names)
    return list({failed.path: failed for failed in found}.values())


def the_one(known: Sequence[FailedFile], name: str, folder: Path) -> FailedFile:
    """The file of this name, or else the only one that is shown under it. Raises ConfigError."""
    bare = name.removeprefix("./")
    exact = [failed for failed in known if failed.path.name == bare]
    found = exact or [failed for failed in known if name in (failed.name, failed.name.removeprefix("./"))]
    if not found:
        raise ConfigError(f"{escape_name(name)}: no such file in {folder}: `lensd retry --list` shows them")
    if len(found) > 1:
        raise ConfigError(f"{escape_name(name)}: {len(found)} files in {folder} are shown so: give the bytes")
    return found[0]


def put_back(failed: FailedFile, inbox: Path) -> Path:
    """The file first, then its reason: what a crash leaves is a reason without its file."""
    target = move_to_free(failed.path, inbox, failed.dropped_as)
    durable.unlink(reason_of(failed.path))
    return target
