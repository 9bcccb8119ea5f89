"""Files that lie claimed: where they are, and whether they are still what they were."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from daemon.records import Claim, FileIdentity, Presence
from daemon.source.filestatus import identity_of


def presences(claims: Sequence[Claim]) -> list[Presence]:
    """Whether each file is still what it was when it was claimed."""
    return [presence(claim, identity_of(claim.path)) for claim in claims]


def presence(claim: Claim, now: FileIdentity | None) -> Presence:
    if now is None:
        return "gone"
    return "same" if now == claim.identity else "changed"


def claimed_files(lease: Path) -> list[tuple[Path, int]]:
    """The regular files that lie claimed in a lease, and how often work on each has begun."""
    folders = [folder for folder in lease.iterdir() if folder.name.isdecimal() and folder.is_dir()]
    return [
        (path, int(folder.name))
        for folder in sorted(folders)
        for path in sorted(folder.iterdir())
        if identity_of(path) is not None
    ]
