from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from daemon.errors import SyncFailed
from daemon.fs import durable


def make_folder_of(path, **contents: bytes | memoryview) -> None:
    durable.make_new_folder(path)
    for name, content in contents.items():
        durable.write_whole(path / name, content)
    for name in contents:
        durable.fsync_file(path / name)
    durable.fsync_folder(path)


def test_files_hold_what_was_written(tmp_path):
    content = memoryview(os.urandom(3 << 20))
    make_folder_of(tmp_path / "unit", small=b"content", empty=b"", large=content[1:])
    found = {path.name: path.read_bytes() for path in (tmp_path / "unit").iterdir()}
    assert found == {"small": b"content", "empty": b"", "large": bytes(content[1:])}


def test_files_have_the_modes_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        make_folder_of(tmp_path / "unit", file=b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "unit").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "unit/file").stat().st_mode & 0o777 == 0o640


def test_names_may_be_any_bytes(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff \n")
    make_folder_of(folder, file=b"content")
    assert (folder / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("function", "path", "code"),
    [
        (durable.make_new_folder, "there", errno.EEXIST),
        (durable.make_new_folder, "missing/folder", errno.ENOENT),
        (lambda path: durable.write_whole(path, b"other"), "file", errno.EEXIST),
        (lambda path: durable.write_whole(path, b"other"), "link", errno.EEXIST),
        (lambda path: durable.write_whole(path, b"other"), "missing/file", errno.ENOENT),
        (durable.fsync_file, "missing", errno.ENOENT),
        (durable.fsync_folder, "file", errno.ENOTDIR),
        (durable.unlink, "missing", errno.ENOENT),
    ],
)
def test_an_error_names_its_file_and_nothing_is_replaced(function, path, code, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OSError, match=path) as caught:
        function(tmp_path / path)
    assert (type(caught.value), caught.value.errno) == (type(OSError(code, "")), code)
    assert str(caught.value.filename) == str(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["file", "link", "there"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_refused_fsync_is_told_from_what_can_be_tried_again():
    with pytest.raises(SyncFailed, match=r"/dev/null: fsync failed: Invalid argument: check the disk"):
        durable.fsync_file(Path("/dev/null"))


def test_a_file_that_cannot_take_it_all_is_an_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            durable.write_whole(tmp_path / "file", bytes(10_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(tmp_path / "file")


def test_those_who_watch_see_each_operation(tmp_path):
    seen = []
    with durable.watch_operations(lambda operation: seen.append((operation.name, operation.path.name))):
        make_folder_of(tmp_path / "unit", file=b"content")
        durable.rename(tmp_path / "unit/file", tmp_path / "unit/moved")
        assert durable.move_without_replacing(tmp_path / "unit/moved", tmp_path / "unit/file")
        durable.remove_folder(tmp_path / "unit")
    assert seen == [
        ("mkdir", "unit"),
        ("create", "file"),
        ("write", "file"),
        ("fsync_file", "file"),
        ("fsync_folder", "unit"),
        ("rename", "file"),
        ("rename", "moved"),
        ("unlink", "file"),
        ("rmdir", "unit"),
    ]


def test_those_who_watch_may_fail_an_operation(tmp_path):
    def refuse(operation: durable.Operation) -> None:
        raise OSError(errno.EIO, "no")

    (tmp_path / "file").touch()
    with durable.watch_operations(refuse):
        with pytest.raises(OSError, match="no"):
            durable.unlink(tmp_path / "file")
        with pytest.raises(SyncFailed, match="file: fsync failed: no"):
            durable.fsync_file(tmp_path / "file")
    assert os.listdir(tmp_path) == ["file"]


def test_a_rename_replaces_a_file_and_a_move_does_not(tmp_path):
    for name in ("a", "b", "taken"):
        (tmp_path / name).write_text(name)
    assert not durable.move_without_replacing(tmp_path / "a", tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "taken"
    assert durable.move_without_replacing(tmp_path / "a", tmp_path / "new")
    durable.rename(tmp_path / "b", tmp_path / "taken")
    assert {name: (tmp_path / name).read_text() for name in os.listdir(tmp_path)} == {
        "new": "a",
        "taken": "b",
    }


@pytest.mark.parametrize("function", [durable.rename, durable.move_without_replacing])
def test_the_error_of_a_move_names_both_its_paths(function, tmp_path):
    source, target = tmp_path / "gone", tmp_path / "new"
    with pytest.raises(FileNotFoundError) as caught:
        function(source, target)
    assert (str(caught.value.filename), str(caught.value.filename2)) == (str(source), str(target))
