from __future__ import annotations

import errno
import os

import pytest

from daemon.records import FileIdentity
from daemon.source.filestatus import identity_of


def test_a_regular_file_is_known_by_its_metadata_and_nothing_else_is_one(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff \n")
    path.write_bytes(b"content")
    os.utime(path, ns=(1, -1_500_000_000))
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    of = os.lstat(path)
    expected = FileIdentity(of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns)
    assert identity_of(path) == expected
    assert [identity_of(tmp_path / name) for name in ("link", "folder", "pipe", "missing")] == [None] * 4


def test_a_look_that_fails_is_no_missing_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as caught:
        identity_of(tmp_path / "file/inner")
    assert caught.value.errno == errno.ENOTDIR
