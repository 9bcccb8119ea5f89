from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from daemon import durable
from daemon.durable import Step, StepKind, each, in_turn, watch_operations
from daemon.errors import SyncFailed

COMPILED = pytest.param(True, marks=pytest.mark.skipif(durable.IN_TURN is None, reason="built without gcc"))


@pytest.fixture(params=[COMPILED, False], ids=["compiled", "python"], autouse=True)
def routine(request, monkeypatch):
    if not request.param:
        monkeypatch.setattr(durable, "IN_TURN", None)


def folder_of(path: Path, **contents: bytes) -> list[Step]:
    steps = [Step(StepKind.MAKE_NEW_FOLDER, str(path))]
    steps += [Step(StepKind.WRITE_WHOLE, str(path / name), content) for name, content in contents.items()]
    steps += [Step(StepKind.FSYNC_FILE, str(path / name)) for name in contents]
    return [*steps, Step(StepKind.FSYNC_FOLDER, str(path))]


def test_steps_are_taken_in_turn(tmp_path):
    content = memoryview(os.urandom(3 << 20))
    in_turn(folder_of(tmp_path / "unit", small=b"content", empty=b"", large=content[1:]))
    found = {path.name: path.read_bytes() for path in (tmp_path / "unit").iterdir()}
    assert found == {"small": b"content", "empty": b"", "large": bytes(content[1:])}
    in_turn([])


def test_files_have_the_modes_that_the_umask_leaves(tmp_path):
    before = os.umask(0o027)
    try:
        in_turn(folder_of(tmp_path / "unit", file=b"content"))
    finally:
        os.umask(before)
    assert (tmp_path / "unit").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "unit/file").stat().st_mode & 0o777 == 0o640


def test_names_may_be_any_bytes(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff \n")
    in_turn(folder_of(folder, file=b"content"))
    assert (folder / "file").read_bytes() == b"content"


@pytest.mark.parametrize(
    ("kind", "path", "code"),
    [
        (StepKind.MAKE_NEW_FOLDER, "there", errno.EEXIST),
        (StepKind.MAKE_NEW_FOLDER, "missing/folder", errno.ENOENT),
        (StepKind.WRITE_WHOLE, "file", errno.EEXIST),
        (StepKind.WRITE_WHOLE, "link", errno.EEXIST),
        (StepKind.WRITE_WHOLE, "missing/file", errno.ENOENT),
        (StepKind.FSYNC_FILE, "missing", errno.ENOENT),
        (StepKind.FSYNC_FOLDER, "file", errno.ENOTDIR),
    ],
)
def test_the_first_error_ends_it(kind, path, code, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("nowhere")
    content = b"other" if kind == StepKind.WRITE_WHOLE else None
    before, after = (Step(StepKind.MAKE_NEW_FOLDER, str(tmp_path / name)) for name in ("before", "after"))
    with pytest.raises(OSError, match=path) as caught:
        in_turn([before, Step(kind, str(tmp_path / path), content), after])
    assert (type(caught.value), caught.value.errno) == (type(OSError(code, "")), code)
    assert caught.value.filename == str(tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ["before", "file", "link", "there"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_refused_fsync_is_told_from_what_can_be_tried_again():
    with pytest.raises(SyncFailed, match=r"/dev/null: fsync failed: Invalid argument: check the disk"):
        in_turn([Step(StepKind.FSYNC_FILE, "/dev/null")])


def test_a_file_that_cannot_take_it_all_is_an_error(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match="too large") as caught:
            in_turn([Step(StepKind.WRITE_WHOLE, str(tmp_path / "file"), bytes(10_000))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG


def test_those_who_watch_see_each_operation(tmp_path):
    seen = []
    with watch_operations(lambda operation: seen.append((operation.name, operation.path.name))):
        in_turn(folder_of(tmp_path / "unit", file=b"content"))
    assert seen == [
        ("mkdir", "unit"),
        ("create", "file"),
        ("write", "file"),
        ("fsync_file", "file"),
        ("fsync_folder", "unit"),
    ]


def test_each_step_is_taken_whatever_becomes_of_the_others(tmp_path):
    for name in ("a", "b", "c", "taken"):
        (tmp_path / name).write_text(name)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    paths = {name: str(tmp_path / name) for name in ("a", "b", "c", "taken", "full", "new", "note", "gone")}
    steps = [
        Step(StepKind.MOVE, paths["a"], paths["taken"]),
        Step(StepKind.MOVE, paths["a"], paths["new"]),
        Step(StepKind.RENAME, paths["gone"], paths["new"]),
        Step(StepKind.RENAME, paths["b"], paths["taken"]),
        Step(StepKind.RENAME, paths["taken"], paths["full"]),
        Step(StepKind.WRITE_NOTE, paths["note"], b"where \xff\n"),
        Step(StepKind.WRITE_NOTE, paths["note"], b"elsewhere\n"),
        Step(StepKind.UNLINK, paths["c"]),
        Step(StepKind.UNLINK, paths["c"]),
    ]
    codes = [error and error.errno for error in each(steps)]
    assert codes == [
        errno.EEXIST, None, errno.ENOENT, None, errno.EISDIR, None, errno.EEXIST, None, errno.ENOENT
    ]  # fmt: skip
    assert sorted(os.listdir(tmp_path)) == ["full", "new", "note", "taken"]
    assert (tmp_path / "new").read_text() == "a"
    assert (tmp_path / "taken").read_text() == "b"
    assert (tmp_path / "note").read_bytes() == b"where \xff\n"
    assert each([]) == []


def test_the_error_of_a_step_names_both_its_paths(tmp_path):
    source, target = str(tmp_path / "gone"), str(tmp_path / "new")
    for kind in (StepKind.MOVE, StepKind.RENAME):
        (error,) = each([Step(kind, source, target)])
        assert isinstance(error, FileNotFoundError)
        assert (error.filename, error.filename2) == (source, target)


def test_those_who_watch_may_fail_one_of_many(tmp_path):
    def observe(operation: durable.Operation) -> None:
        if operation.path.name == "b":
            raise OSError(errno.EIO, "no")

    for name in "abc":
        (tmp_path / name).touch()
    steps = [Step(StepKind.UNLINK, str(tmp_path / name)) for name in "abc"]
    with watch_operations(observe):
        errors = each(steps)
    assert [error and error.errno for error in errors] == [None, errno.EIO, None]
    assert os.listdir(tmp_path) == ["b"]
