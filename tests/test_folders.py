"""The start and `check-config` look at the folders that lensd works in before any file is moved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.errors import ConfigError
from daemon.folders import folder_trouble
from daemon.machine import check_folders

SUBFOLDERS = ["inbox/done", "inbox/failed", "inbox/.claimed", "outbox/.staging", "outbox/.units"]
ROOT = Path(__file__).parents[1]
USER = 48_213  # without a name
CHECK = """
import os, sys
from pathlib import Path
from daemon.errors import ConfigError
from daemon.machine import check_folders
inbox, outbox, user = sys.argv[1:]
if user != "0":
    os.setgroups([]), os.setgid(int(user)), os.setuid(int(user))
try:
    check_folders(Path(inbox), Path(outbox), make=False)
    print("ok")
except ConfigError as error:
    print(error)
"""
ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with an inbox and an outbox, that runs left before."""
    for name in SUBFOLDERS:
        (tmp_path / name).mkdir(parents=True)
    return tmp_path


def refusal(place: Path) -> str:
    """The one line that both the start and `check-config` say; neither leaves anything behind."""
    before = everything(place)
    said = []
    for make in (True, False):
        with pytest.raises(ConfigError) as caught:
            check_folders(place / "inbox", place / "outbox", make=make)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    assert everything(place) == before
    assert folder_trouble(place / "inbox", place / "outbox") == said[0]  # seen by a running daemon too
    return said[0]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_good_folders_are_good_and_nothing_is_left_in_them(place):
    before = everything(place)
    check_folders(place / "inbox", place / "outbox")
    assert folder_trouble(place / "inbox", place / "outbox") is None
    assert everything(place) == before


def test_missing_folders_are_made_by_the_start_alone(tmp_path):
    inbox, outbox = tmp_path / "a" / "inbox", tmp_path / "b" / "outbox"
    check_folders(inbox, outbox, make=False)
    assert everything(tmp_path) == set()
    check_folders(inbox, outbox)
    assert everything(tmp_path) == {"a", "a/inbox", "b", "b/outbox"}


def test_two_names_of_one_folder_are_found_out_once_it_is_made(tmp_path, monkeypatch):
    """As where a file system ignores case: while neither is there, nothing tells that they are the same."""

    def make(path: Path) -> None:
        path.symlink_to(tmp_path / "inbox") if path.name == "Inbox" else path.mkdir()

    monkeypatch.setattr("daemon.machine.make_folder", make)
    with pytest.raises(ConfigError, match="are the same folder"):
        check_folders(tmp_path / "inbox", tmp_path / "Inbox")


@pytest.mark.parametrize("name", ["done", "failed"])
def test_a_link_to_another_file_system_is_refused(place, elsewhere, name):
    (place / "inbox" / name).rmdir()
    (place / "inbox" / name).symlink_to(elsewhere)
    said = refusal(place)
    assert said.startswith(f"{place}/inbox/{name}, a link to {elsewhere}, is on another file system")
    assert "make it a plain folder" in said


@pytest.mark.parametrize("name", ["done", "failed"])
def test_a_link_to_a_folder_of_the_same_file_system_is_followed(place, name):
    (place / "archive").mkdir()
    (place / "inbox" / name).rmdir()
    (place / "inbox" / name).symlink_to("../archive")
    check_folders(place / "inbox", place / "outbox")


@pytest.mark.parametrize("target", [".", "../outbox", "failed", ".claimed", "../outbox/.staging"])
def test_a_link_back_into_what_lensd_works_in_is_refused(place, target):
    (place / "inbox/done").rmdir()
    (place / "inbox/done").symlink_to(target)
    assert "leads back to where lensd works" in refusal(place)


@pytest.mark.parametrize("target", ["nowhere", "done", "../file"])
def test_a_link_to_no_folder_is_refused(place, target):
    (place / "file").touch()
    (place / "inbox/done").rmdir()
    (place / "inbox/done").symlink_to(target)
    assert "leads to no folder: remove it" in refusal(place)


@pytest.mark.parametrize("name", [name for name in SUBFOLDERS if "/." in name])
def test_a_hidden_folder_of_lensd_is_no_link(place, name):
    (place / "other").mkdir()
    (place / name).rmdir()
    (place / name).symlink_to(place / "other")
    assert "must be a folder of its own: remove the link" in refusal(place)


@pytest.mark.parametrize("name", SUBFOLDERS)
def test_a_file_in_the_place_of_a_folder_is_refused(place, name):
    (place / name).rmdir()
    (place / name).touch()
    assert refusal(place) == f"{place / name} is no folder, and lensd needs one of that name: move it away"


@pytest.mark.parametrize("name", ["inbox", "outbox"])
def test_a_file_in_the_place_of_inbox_or_outbox_is_refused(place, name):
    shutil.rmtree(place / name)
    (place / name).touch()
    assert refusal(place) == f"{place / name} is no folder, and lensd needs one of that name: move it away"


def mounted(place: Path, source: Path, target: Path) -> str:
    """The verdict on the folders where `source` is bind-mounted at `target`, for that process alone."""
    args = str(place / "inbox"), str(place / "outbox"), "0"
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", source, target, sys.executable, "-c", CHECK, *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    if done.returncode and any(word in done.stderr for word in ("unshare:", "mount:")):
        pytest.skip("no mounts may be made here")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", SUBFOLDERS)
def test_a_bind_mount_of_the_same_disk_is_refused(place, name):
    (place / "other").mkdir()
    said = mounted(place, place / "other", place / name)
    assert said.startswith(f"{place / name} is on another file system or mount than {(place / name).parent}")
    assert everything(place) == {"inbox", "outbox", "other", *SUBFOLDERS}


@pytest.mark.slow
def test_an_inbox_that_is_the_outbox_by_a_mount_is_refused(tmp_path):
    for name in ("inbox", "outbox"):
        (tmp_path / name).mkdir()
    said = mounted(tmp_path, tmp_path / "inbox", tmp_path / "outbox")
    assert "are the same folder" in said


# Whose the folders are


@pytest.fixture
def public_place() -> Iterator[Path]:
    """The same, owned by an ordinary user, whom pytest's own folders may keep out."""
    folder = Path(tempfile.mkdtemp(prefix="lensd-"))
    folder.chmod(0o755)
    for name in SUBFOLDERS:
        (folder / name).mkdir(parents=True)
    give(folder, USER)
    yield folder
    shutil.rmtree(folder)


def give(folder: Path, user: int) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, user, -1, follow_symlinks=False)


def as_user(place: Path) -> str:
    """The verdict on the folders, as an ordinary user is told it."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK, place / "inbox", place / "outbox", str(USER)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def left_by_root(path: Path, mode: int) -> None:
    os.chown(path, 0, 0)
    path.chmod(mode)


def lease(place: Path, parent: str, mode: int) -> Path:
    folder = place / parent / "host-1-aa"
    folder.mkdir()
    (folder / ".lock").touch()
    os.chown(folder / ".lock", USER, -1)
    left_by_root(folder, mode)
    return folder


def published(place: Path) -> Path:
    folder = place / "outbox" / "a-0123456789ab"
    folder.mkdir()
    left_by_root(folder, 0o700)
    return folder


def lock(place: Path, name: str) -> Path:
    (place / name).touch()
    left_by_root(place / name, 0o600)
    return place / name


def made(place: Path, name: str) -> Path:
    left_by_root(place / name, 0o755)
    return place / name


OF_ROOT: dict[str, Callable[[Path], Path]] = {
    **{name: lambda place, name=name: made(place, name) for name in [*SUBFOLDERS, "inbox", "outbox"]},
    "a claim": lambda place: lease(place, "inbox/.claimed", 0o755),
    "half-made results": lambda place: lease(place, "outbox/.staging", 0o755),
    "results": published,
    "a lock of the inbox": lambda place: lock(place, "inbox/.claimed/.failing"),
    "a lock of the outbox": lambda place: lock(place, "outbox/.staging/.publishing"),
}


@ONLY_ROOT
@pytest.mark.parametrize(
    "what",
    [
        what if what in ("inbox/done", "a claim") else pytest.param(what, marks=pytest.mark.slow)
        for what in OF_ROOT
    ],
)
def test_what_a_run_of_root_left_is_named_with_its_owner_and_the_remedy(public_place, what):
    assert as_user(public_place) == "ok"
    path = OF_ROOT[what](public_place)
    said = as_user(public_place)
    assert str(path) in said
    assert "belongs to root: chown -R " in said
    assert "\n" not in said
    command = said.partition("belongs to root: ")[2]
    subprocess.run(command, shell=True, check=True)
    assert as_user(public_place) == "ok"


@ONLY_ROOT
def test_a_folder_of_ones_own_without_the_rights_is_named(public_place):
    (public_place / "inbox/done").chmod(0o500)
    assert as_user(public_place).endswith(f": chmod u+rwX {public_place}/inbox/done")


@ONLY_ROOT
def test_a_folder_that_can_not_be_made_is_named_with_what_is_above(public_place):
    shutil.rmtree(public_place / "inbox")
    left_by_root(public_place, 0o755)
    said = as_user(public_place)
    assert said.startswith(f"inbox.path = {public_place}/inbox: can't be made: {public_place}: not writable")
    assert "belongs to root" in said


# Where the folders are


@pytest.mark.parametrize(
    ("inbox", "outbox", "said"),
    [
        ("in", "in", "are the same folder"),
        ("in", "link", "are the same folder"),
        ("in", "in/../in", "are the same folder"),
        ("in", "in/done", "where lensd keeps inputs"),
        ("in", "in/failed/deep/down", "where lensd keeps inputs"),
        ("in", "link/.claimed/x", "where lensd keeps inputs"),
        ("in/.staging/a", "in", "which lensd clears"),
        ("in/.units", "in", "which lensd clears"),
        ("checkout", "out", "it is a checkout, as its .git says"),
        ("worktree", "out", "it is a checkout, as its .git says"),
        ("home", "out", "it is this user's home"),
        ("model", "out", "it is the model's folder"),
        ("/", "out", "nobody's inbox"),
        ("in", "/", "nobody's outbox"),
    ],
)
def test_places_that_hold_what_is_not_ours_are_refused(tmp_path, monkeypatch, inbox, outbox, said):
    for name in ("in", "checkout/.git", "worktree", "home", "model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "worktree/.git").touch()
    (tmp_path / "link").symlink_to("in")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    before = everything(tmp_path)
    for make in (True, False):
        with pytest.raises(ConfigError, match=said):
            check_folders(
                tmp_path / inbox,
                tmp_path / outbox,
                taken={"the model's folder": tmp_path / "model"},
                make=make,
            )
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    ("inbox", "outbox"),
    [("in", "in/out"), ("out/in", "out"), (".", "../out"), ("checkout/in", "checkout/out"), ("home/in", "o")],
)
def test_other_places_are_fine(tmp_path, monkeypatch, inbox, outbox):
    (tmp_path / "work/checkout/.git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "work/home"))
    check_folders(Path(inbox), Path(outbox))
