from __future__ import annotations

import errno
import os
import stat

import pytest

from daemon import looks
from daemon.looks import lstat_each, read_small

COMPILED = pytest.param(True, marks=pytest.mark.skipif(looks.LSTAT_EACH is None, reason="built without gcc"))


@pytest.fixture(params=[COMPILED, False], ids=["compiled", "python"])
def routine(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(looks, "LSTAT_EACH", None)


@pytest.mark.usefixtures("routine")
def test_each_path_is_told_by_what_lies_there_itself(tmp_path):
    name = os.fsdecode(b"\xff \n")
    (tmp_path / name).write_bytes(b"content")
    os.utime(tmp_path / name, ns=(1, -1_500_000_000))
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder").mkdir()
    names = (name, "missing", "link", "folder")
    told = lstat_each([str(tmp_path / name) for name in names])
    assert lstat_each([]) == []
    assert told[1] is None
    for name, look in zip(names, told, strict=True):
        if look is not None:
            of = os.lstat(tmp_path / name)
            assert look == (of.st_mode, of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns)
    assert [stat.S_IFMT(look[0]) for look in told if look] == [stat.S_IFREG, stat.S_IFLNK, stat.S_IFDIR]


@pytest.mark.usefixtures("routine")
def test_a_look_that_fails_is_no_missing_file(tmp_path):
    (tmp_path / "file").touch()
    path = str(tmp_path / "file/inner")
    with pytest.raises(NotADirectoryError) as caught:
        lstat_each([str(tmp_path), path])
    assert (caught.value.errno, caught.value.filename) == (errno.ENOTDIR, path)


@pytest.mark.skipif(looks.READ_SMALL is None, reason="built without gcc")
def test_small_regular_files_are_read_and_nothing_else(tmp_path):
    contents = {"empty": b"", "small": os.urandom(100), "large": bytes(101)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("small")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    names = [*contents, "link", "folder", "pipe", "missing"]
    read = dict(zip(names, read_small([str(tmp_path / name) for name in names], 100), strict=True))
    assert {name: content for name, content in read.items() if content is not None} == {
        "empty": b"",
        "small": contents["small"],
    }


def test_without_a_compiler_nothing_is_read_at_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(looks, "READ_SMALL", None)
    assert read_small([str(tmp_path / "file")] * 2, 100) == [None, None]
