from __future__ import annotations

import json

import pytest

from daemon.model import stamps
from daemon.model.stamps import Stamps, code_sha256

SUBJECT = {"weights": "ab", "dtype": "float32"}
CONTENT = {"d_in": 3, "names": ["a", "b"]}


@pytest.fixture
def store(tmp_path) -> Stamps:
    return Stamps(tmp_path / "cache" / "dictionaries")


def written(store: Stamps):
    store.write(SUBJECT, CONTENT)
    (path,) = store.folder.iterdir()
    return path


def test_what_was_remembered_of_a_subject_is_read_again(store):
    assert store.read(SUBJECT) is None
    written(store)
    assert store.read(SUBJECT) == CONTENT
    assert store.read({**SUBJECT, "weights": "cd"}) is None


def test_a_damaged_stamp_counts_for_nothing_and_is_written_again(store):
    path = written(store)
    whole = path.read_text()
    changed = whole.replace('"d_in": 3', '"d_in": 4')
    for damaged in ("", whole[:-20], "[]", "null", "[" * 100_000, changed):
        assert damaged != whole
        path.write_text(damaged)
        assert store.read(SUBJECT) is None
        assert written(store) == path
        assert store.read(SUBJECT) == CONTENT


def test_the_stamp_of_another_subject_under_this_ones_name_counts_for_nothing(store):
    path = written(store)
    other = {**SUBJECT, "weights": "cd"}
    store.write(other, CONTENT)
    (foreign,) = set(store.folder.iterdir()) - {path}
    foreign.replace(path)
    assert store.read(SUBJECT) is None


@pytest.mark.parametrize("what", ["sae-lens", "torch", "python", "code", "processor", "capability"])
def test_a_stamp_made_under_other_versions_counts_for_nothing(what, store, monkeypatch):
    written(store)
    now = {**stamps.surroundings(), what: "other"}
    monkeypatch.setattr(stamps, "surroundings", lambda: now)
    assert store.read(SUBJECT) is None
    path = written(store)
    assert json.loads(path.read_text())["identity"]["under"][what] == "other"
    assert store.read(SUBJECT) == CONTENT


def test_a_folder_that_can_t_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    store = Stamps(tmp_path / "file" / "dictionaries")
    store.write(SUBJECT, CONTENT)
    assert store.read(SUBJECT) is None


def test_the_code_is_known_by_its_content(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sae.py").write_text("a = 1\n")
    before = code_sha256(tmp_path)
    assert code_sha256(tmp_path) == before
    (tmp_path / "model" / "sae.py").write_text("a = 2\n")
    assert code_sha256(tmp_path) != before
