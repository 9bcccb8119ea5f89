"""Which names in an inbox are inputs. Whatever has another name belongs to somebody else. Opens no files."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Sequence
from typing import Literal

from daemon.source.claims import DONE, FAILED
from daemon.source.formats import ENDING, is_input

Owner = Literal["input", "temporary", "other", "hidden"]

# Of office programs and of Syncthing, where the end of the name is the finished file's.
TEMPORARY_PREFIXES = ("~$", "~syncthing~")
# Of browsers, rclone, rsync, WinSCP, cloud tools, torrent clients, editors, version control and patch.
TEMPORARY_SUFFIXES = (
    *("~", "#", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".opdownload"),
    *(".filepart", ".aria2", ".incomplete", ".uploading", "_.gstmp", "._copying_", ".!ut", ".!qb", ".!sync"),
    *(".swp", ".swo", ".swx", ".bak", ".orig", ".rej", ".lock", "___jb_tmp___", "___jb_old___"),
)
# An uploaded file under way: its name and random characters, as of the AWS command line.
UPLOADING = re.compile(ENDING + r"\.[0-9A-Za-z]{6,8}\Z", re.IGNORECASE)
CONTROL_SUFFIXES = (".aria2", ".lftp-pget-status", ".st")  # beside a download that has its final name already
PLACEHOLDER_SUFFIXES = (".part", ".crdownload", ".partial", ".download")  # beside an empty file in its place
KNOWN_FOLDERS = frozenset({DONE, FAILED, "lost+found"})


class InputNames:
    """Tells inputs from what is somebody else's."""

    def __init__(self, ignore: Sequence[str] = (), *, folders: Collection[str] = ()) -> None:
        """`ignore` are patterns of names to be passed over; `folders` are known sub-folders of the inbox."""
        self._ignored = re.compile("|".join(map(fnmatch.translate, ignore))) if ignore else None
        self._folders = KNOWN_FOLDERS | set(folders)

    def owner(self, name: str) -> Owner:
        """Whose a file of this name is. Hidden and ignored names are passed over in silence."""
        if name.startswith(".") or (self._ignored is not None and self._ignored.match(name)):
            return "hidden"
        if name.startswith(TEMPORARY_PREFIXES):
            return "temporary"
        if is_input(name):
            return "input"
        return "temporary" if looks_temporary(name) else "other"

    def is_foreign_folder(self, name: str) -> bool:
        """Whether a sub-folder is worth a word, since somebody may expect its files to be read."""
        return name not in self._folders and self.owner(name) != "hidden"


def looks_temporary(name: str) -> bool:
    """Whether a name is one of those that programs give to files that they are still writing."""
    return name.lower().endswith(TEMPORARY_SUFFIXES) or UPLOADING.search(name) is not None


def is_unfinished(name: str, size: int, others: Collection[str]) -> bool:
    """Whether a file under its final name is still being fetched, by what lies beside it."""
    if any(name + suffix in others for suffix in CONTROL_SUFFIXES):
        return True
    if size:
        return False
    stem = name.partition(".")[0]  # Firefox puts random characters between it and the suffix
    return any(other.startswith(f"{stem}.") and other.endswith(PLACEHOLDER_SUFFIXES) for other in others)
