from __future__ import annotations

import json

import pytest

from daemon.sink.jsontext import to_json, to_json_lines


@pytest.mark.parametrize(
    "value", [{"b": 1, "a": [1.5, None, True]}, "caf\xe9 \N{GHOST}", 10**30, -0.1, {}, "a\nb\u2028"]
)
def test_what_is_written_is_read_back(value):
    assert json.loads(to_json(value)) == value


def test_keys_stay_in_order():
    assert list(json.loads(to_json({"b": 1, "a": 2, "c": 3}))) == ["b", "a", "c"]


def test_a_lone_surrogate_becomes_the_text_of_its_escape():
    assert json.loads(to_json({"a\udc80": ["\ud800", 1 << 70]})) == {r"a\udc80": [r"\ud800", 1 << 70]}


def test_what_is_no_number_is_null():
    assert json.loads(to_json([float("nan"), float("inf")])) == [None, None]
    assert json.loads(to_json({"\udc80": float("nan"), "b": (1 << 70, "c")})) == {
        r"\udc80": None,
        "b": [1 << 70, "c"],
    }


def test_an_object_is_written_with_a_line_for_each_key():
    content = {"unit": "u", "saes": [{"hook": "h", "fvu": 0.5}, {"hook": "h", "fvu": None}], "config": {}}
    text = to_json_lines(content).decode()
    assert [line.split(":")[0].strip() for line in text.splitlines()] == [
        "{",
        '"unit"',
        '"saes"',
        '"config"',
        "}",
    ]
    assert json.loads(text) == content
