"""Checks the folders that lensd works in: their places, their owners, and whether a rename moves files there.

Makes and changes nothing. Each function returns one line for people, with the remedy, or None where all is
well. Functions block.
"""

from __future__ import annotations

import errno
import os
import pwd
import secrets
import shlex
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from daemon.escaping import escape_control
from daemon.fs.lease import LOCK
from daemon.sink.outbox import PUBLISHED, PUBLISHING, STAGING, UNITS
from daemon.source.claims import CLAIMED, DONE, FAILED, FAILING

INBOX_FOLDERS = (DONE, FAILED, CLAIMED)
OUTBOX_FOLDERS = (STAGING, UNITS)
CHECKOUTS = (".git", ".hg", ".svn")  # in folders whose files are somebody's work
ALL = os.R_OK | os.W_OK | os.X_OK


def place_trouble(inbox: Path, outbox: Path, taken: Mapping[str, Path]) -> str | None:
    """Whether the two are at places where they would take or spoil what is not theirs.

    `taken` are folders of other use, by what they are. Neither folder needs to exist.
    """
    for key, folder in (("inbox.path", inbox), ("outbox.path", outbox)):
        if folder.resolve() == Path("/"):
            return f"{key} = {folder}: the root of the system is nobody's {key[:-5]}: make a folder for it"
    if same(inbox, outbox):
        return f"inbox.path and outbox.path are the same folder, {inbox}: use two"
    for what, other in {"this user's home": home(), **taken}.items():
        if other is not None and same(inbox, other):
            return (
                f"inbox.path = {inbox}: it is {what}, whose files would be taken: make a folder for the inbox"
            )
    for name in CHECKOUTS:
        if (inbox / name).exists():
            return (
                f"inbox.path = {inbox}: it is a checkout, as its {name} says, whose files would be taken:"
                " make a folder for the inbox"
            )
    for name in INBOX_FOLDERS:
        if is_inside(outbox, inbox / name):
            where = f"{inbox / name}, where lensd keeps inputs"
            return f"outbox.path = {outbox}: it lies in {where}: put it elsewhere"
    for name in OUTBOX_FOLDERS:
        if is_inside(inbox, outbox / name):
            return f"inbox.path = {inbox}: it lies in {outbox / name}, which lensd clears: put it elsewhere"
    return None


def home() -> Path | None:
    """The home of this user, where there is one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def same(one: Path, other: Path) -> bool:
    """Whether two paths are of one folder, whatever links and mounts lead there."""
    try:
        return one.samefile(other)
    except OSError:
        return one.resolve() == other.resolve()


def is_inside(path: Path, folder: Path) -> bool:
    resolved = path.resolve()
    return not folder.is_symlink() and any(same(above, folder) for above in (resolved, *resolved.parents))


def folder_trouble(inbox: Path, outbox: Path, *, may_be_missing: bool = False) -> str | None:
    """Why work in them is not possible at this moment, if so."""
    for top, names in ((inbox, INBOX_FOLDERS), (outbox, OUTBOX_FOLDERS)):
        if not os.path.lexists(top):
            if may_be_missing:
                continue
            return f"{top}: no such folder"
        if not top.is_dir():
            return f"{top} is no folder, and lensd needs one of that name: move it away"
        if (refused := access_trouble(top)) is not None:
            return refused
        for name in names:
            if (found := subfolder_trouble(top, name, (inbox, outbox))) is not None:
                return found
    if nearest(inbox).stat().st_dev != nearest(outbox).stat().st_dev:
        return (
            f"{inbox} and {outbox} are on different file systems: put them on one, so that a rename publishes"
        )
    return None


def subfolder_trouble(top: Path, name: str, tops: tuple[Path, ...]) -> str | None:
    """Why a working sub-folder, should it be there already, can't be worked with."""
    path = top / name
    try:
        is_link = stat.S_ISLNK(path.lstat().st_mode)
    except FileNotFoundError:
        return None  # and is made
    leads = f", a link to {escape_control(os.readlink(path))}," if is_link else ""  # noqa: PTH115 - as it is written
    if is_link and name.startswith("."):
        return f"{path}{leads} must be a folder of its own: remove the link"
    if not path.is_dir():
        if is_link:
            return f"{path}{leads} leads to no folder: remove it"
        return f"{path} is no folder, and lensd needs one of that name: move it away"
    if is_link:
        others = [*tops, *(tops[0] / n for n in INBOX_FOLDERS), *(tops[1] / n for n in OUTBOX_FOLDERS)]
        if any(other != path and same(path, other) for other in others):
            return f"{path}{leads} leads back to where lensd works: remove it"
    if not moves(top, path):
        return (
            f"{path}{leads} is on another file system or mount than {top}, so that no rename moves files"
            f" there: make it a plain folder of {top}"
        )
    return access_trouble(path)


def moves(folder: Path, other: Path) -> bool:
    """Whether a rename could move a file from one folder to another.

    Asks the kernel to rename a name that does not exist: it looks at the mounts first. A bind mount of the
    same file system is another mount on the same device.
    """
    if folder.stat().st_dev != other.stat().st_dev:
        return False
    name = f".lensd-{secrets.token_hex(8)}"
    try:
        (folder / name).rename(other / name)
    except OSError as error:
        return error.errno != errno.EXDEV
    raise AssertionError(f"{folder / name} existed")


def access_trouble(folder: Path) -> str | None:
    """Why this user can't read and write a folder, if so, and what to do about it."""
    if os.access(folder, ALL):
        return None
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder}: not readable and writable for this user: its file system is mounted read-only"
    return f"{folder}: not readable and writable for this user{owner_and_remedy(folder)}"


def owner_and_remedy(path: Path) -> str:
    """Of what this user may not use: whose it is, and a command that gives it over."""
    owner, user = path.stat(follow_symlinks=False).st_uid, os.geteuid()
    place = shlex.quote(escape_control(str(path)))
    if owner == user:
        return f": chmod u+rwX {place}"
    return f", {user_name(user)}, since it belongs to {user_name(owner)}: chown -R {user_name(user)} {place}"


def user_name(user: int) -> str:
    """A user's name, or the number of one without a name."""
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return str(user)


def leftover_trouble(inbox: Path, outbox: Path) -> str | None:
    """Whether another user's runs left there what this user can't take over: it would wait for ever."""
    for path, needed in leftovers(inbox, outbox):
        if not os.access(path, needed) and os.path.lexists(path):  # else a run that goes on removed it
            return f"{path} was left by a run of another user{owner_and_remedy(path)}"
    return None


def leftovers(inbox: Path, outbox: Path) -> Iterator[tuple[Path, int]]:
    """List what runs leave in the folders, and the access that is needed to each."""
    for parent, lock in ((inbox / CLAIMED, FAILING), (outbox / STAGING, PUBLISHING)):
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            if path.name == lock:
                yield path, os.R_OK | os.W_OK
            elif not path.name.startswith(".") and path.is_dir():
                yield path, ALL
                if (path / LOCK).exists():
                    yield path / LOCK, os.R_OK | os.W_OK
    for path in outbox.iterdir() if outbox.is_dir() else ():
        if PUBLISHED.search(path.name):
            yield path, os.R_OK | os.X_OK


def parent_trouble(key: str, folder: Path) -> str | None:
    """Why a folder that is not there can't be made, if so."""
    above = nearest(folder)
    if above == folder:
        return None
    if not above.is_dir():
        return f"{key} = {folder}: can't be made: {above} is no folder"
    if not os.access(above, os.W_OK | os.X_OK):
        return (
            f"{key} = {folder}: can't be made: {above}: not writable for this user{owner_and_remedy(above)}"
        )
    return None


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
