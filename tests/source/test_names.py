from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.escaping import printable_name
from daemon.source.names import NAME_BYTES, folded, numbered, numbered_stem


@given(name=st.binary(min_size=1, max_size=255), number=st.integers(0, 9999), room=st.integers(20, 255))
def test_every_numbered_name_fits(name, number, room):
    text = os.fsdecode(name)
    assert len(os.fsencode(numbered(text, number, room))) <= room
    assert len(os.fsencode(numbered_stem(text, number))) <= NAME_BYTES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.json", "a.2.json"),
        ("a.b.jsonl.gz", "a.2.b.jsonl.gz"),
        ("plain", "plain.2"),
        ("x" * 250 + ".json", "x" * 248 + ".2.json"),
        ("a." + "x" * 244 + ".jsonl.gz", "a." + "x" * 242 + ".2.jsonl.gz"),
        ("a." + "x" * 253, "a." + "x" * 251 + ".2"),
    ],
)
def test_a_numbered_stem_keeps_what_says_the_format(name, expected):
    assert numbered_stem(name, 2) == expected
    assert numbered_stem(name, 0) == name


def test_a_cut_leaves_no_half_character():
    assert numbered("é" * 10, 1, 12) == "é" * 5 + ".1"


def test_bytes_that_are_no_text_are_shown_as_escapes():
    assert printable_name(os.fsdecode(b"caf\xe9.json")) == "caf\\xe9.json"


def test_names_fold_that_a_file_system_may_take_for_one():
    composed, decomposed = "\u00c9t\u00e9.json", "e\u0301te\u0301.JSON"
    assert folded(composed) == folded(decomposed)
    assert folded("a.json") == folded("A.JSON") == "a.json"
    assert len({folded(name) for name in ("a.json", "b.json", "a_.json", os.fsdecode(b"\xff.json"))}) == 4
