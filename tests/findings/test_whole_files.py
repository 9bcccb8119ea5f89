"""Files that appear under their names whole or not at all."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from daemon.errors import ConfigError
from daemon.findings import whole_files
from daemon.findings.whole_files import check_place, publish, unnamed_file

CHILD = """
import sys, time
from pathlib import Path
from daemon.findings.whole_files import unnamed_file
with unnamed_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["linked", "copied", "can't be linked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The three ways in which a file gets its name."""
    if request.param == "copied":
        monkeypatch.setattr(whole_files, "linked", lambda file, place: False)
    elif request.param == "can't be linked":
        without = functools.partial(tempfile.TemporaryFile, "w+b")
        monkeypatch.setattr(whole_files, "open_unnamed", lambda folder: without(dir=folder))


@pytest.mark.usefixtures("way")
def test_file_has_its_name_when_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    with unnamed_file(path) as file:
        file.write(b"new")
        assert not list(tmp_path.iterdir())
        publish(file, path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.usefixtures("way")
def test_file_that_is_there_is_replaced_and_a_link_to_it_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"old and longer")
    link.symlink_to(target)
    with unnamed_file(link) as file:
        file.write(b"new")
        assert target.read_bytes() == b"old and longer"
        publish(file, link)
    assert target.read_bytes() == b"new"
    assert link.is_symlink()
    assert sorted(tmp_path.iterdir()) == [link, target]


@pytest.mark.usefixtures("way")
def test_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), unnamed_file(tmp_path / "page.html"):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, tmp_path / "page.html"], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    with child.stdout:
        assert child.stdout.readline() == "written\n"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert not list(tmp_path.iterdir())


def test_place_in_which_nothing_can_be_written_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, said in (
        (Path("/proc/x"), "can't write into /proc"),
        (Path("/dev/null"), "a pipe or a device"),
        (tmp_path / "pipe", "a pipe or a device"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "x", "no such folder"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            check_place(path)
        assert str(path) in str(caught.value)
