"""Publishes a staged folder: whole under its final name, or not at all.

The order is what makes it safe: manifest, sync of every file and of the folder, rename, sync of the
outbox. Knows nothing about what the files hold. Functions block.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.durable import fsync_file, fsync_folder, remove_folder, rename, write_file
from daemon.errors import MachineError
from daemon.output.jsontext import to_json
from daemon.records import Source

STAGING = ".staging"
MANIFEST = "manifest.json"
NAME_BYTES = 255  # of a folder name, on every Linux file system

SUFFIXES = re.compile(r"\.(json|jsonl|ndjson)(\.(gz|zst))?$", re.IGNORECASE)
# In a folder's name these break a reader: `*?[]{}` are patterns, DuckDB's glob skips a backslash and takes
# `a=b` for a partition, and one name that is not UTF-8 fails DuckDB's glob over the whole outbox.
UNREADABLE = re.compile(r"[\x00-\x1f\x7f*?\[\]{}\\/=\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Publication:
    """Where a unit's results are; `fresh` unless they were there before."""

    folder: Path
    fresh: bool


def output_folder_name(name: str, unit: str) -> str:
    """`<stem>-<unit>`: the input's name without its known suffixes, made safe for every reader.

    Always valid UTF-8, at most 255 bytes, never hidden.
    """
    stem = UNREADABLE.sub("_", SUFFIXES.sub("", name)).lstrip(".") or "input"
    room = NAME_BYTES - len(f"-{unit}".encode())
    return f"{stem.encode()[:room].decode(errors='ignore')}-{unit}"


def staging_folder(outbox: Path, unit: str) -> Path:
    return outbox / STAGING / unit


def find_published(outbox: Path, unit: str) -> Path | None:
    """The folder with the unit's results, under whatever name its content was dropped first."""
    for folder in outbox.glob(f"*-{unit}"):
        if not folder.name.startswith(".") and (folder / MANIFEST).is_file():
            return folder
    return None


def publish(staging: Path, outbox: Path, source: Source, content: dict[str, Any]) -> Publication:
    """Give a staged folder its manifest and its final name; `content` is `manifest`'s.

    Where the unit is already published, the staged folder is removed instead. Raises MachineError where a
    sync fails or something else has the name.
    """
    if content["records"] != content["rows"] + content["rejects"]:
        raise AssertionError(f"unit {source.unit}: records != rows + rejects: {content['records']}")
    if (published := find_published(outbox, source.unit)) is not None:
        remove_folder(staging)
        return Publication(published, fresh=False)
    write_file(staging / MANIFEST, to_json(content, indent=2) + b"\n")
    for path in sorted(staging.iterdir()):
        fsync_file(path)
    fsync_folder(staging)
    target = outbox / output_folder_name(source.claim.name, source.unit)
    if not rename_to_free(staging, target):
        remove_folder(staging)
        return Publication(target, fresh=False)
    fsync_folder(outbox)
    return Publication(target, fresh=True)


def rename_to_free(staging: Path, target: Path) -> bool:
    """Rename unless the target is already published: False, and nothing moved, where it is."""
    try:
        rename(staging, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        if (target / MANIFEST).is_file():
            return False
        raise MachineError(
            f"{target} exists and is no output of lensd: move it away, then restart"
        ) from error
    return True


def clear_staging(outbox: Path) -> int:
    """Remove what an earlier process left half-written; how many folders.

    Only where no other process writes into this outbox.
    """
    staging = outbox / STAGING
    leftovers = [path for path in staging.iterdir() if path.is_dir()] if staging.is_dir() else []
    for folder in leftovers:
        remove_folder(folder)
    return len(leftovers)
