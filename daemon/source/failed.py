"""The folder of files that can't be used, each beside its reason. Does not know why. Functions block."""

from __future__ import annotations

import json
import os
from pathlib import Path

from daemon.escaping import printable_name
from daemon.fs import durable
from daemon.records import Claim
from daemon.source.names import MAX_NUMBER, NAME_BYTES, no_free_name, numbered

REASON_SUFFIX = ".reason.json"


def set_aside(claim: Claim, folder: Path, reason: bytes, draft: Path) -> None:
    """Move a file into `folder`, and its reason beside it. Replaces no file.

    `draft` is where the reason may be written first. The caller keeps other processes out of `folder`. The
    reason comes first, so that no file lies there without one. What a crash leaves is a reason without its
    file; the next of that name to fail replaces it.
    """
    durable.make_folder(draft.parent)
    if draft.exists():
        durable.unlink(draft)
    durable.write_whole(draft, reason)
    durable.fsync_file(draft)
    target = free_name(claim, folder)
    durable.rename(draft, reason_of(target))
    if os.path.lexists(claim.path):
        durable.rename(claim.path, target)


def reason_of(path: Path) -> Path:
    return path.with_name(f"{path.name}{REASON_SUFFIX}")


def free_name(claim: Claim, folder: Path) -> Path:
    """A name in `folder` that is free, as is its reason's."""
    for number in range(MAX_NUMBER):
        target = folder / numbered(claim.name, number, NAME_BYTES - len(REASON_SUFFIX))
        if os.path.lexists(target):
            continue
        if not os.path.lexists(reason_of(target)) or is_orphaned(reason_of(target), claim.name):
            return target
    raise no_free_name(claim.name, folder)


def is_orphaned(reason: Path, name: str) -> bool:
    """Whether this is the reason of a file of that name which a crash kept from following.

    And not a file that itself failed, and looks so: that one has a reason of its own.
    """
    if os.path.lexists(reason_of(reason)):
        return False
    try:
        content = json.loads(reason.read_bytes())
    except (OSError, ValueError):
        return False
    return (
        isinstance(content, dict) and content.get("name") == printable_name(name) and "failed_at" in content
    )
