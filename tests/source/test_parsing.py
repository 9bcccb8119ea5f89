"""Parsing carries a record's numbers as they were written."""

from __future__ import annotations

import json
from decimal import Decimal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.errors import SampleError
from daemon.recipes import PLAIN_RECIPE, Recipe
from daemon.records import Sample
from daemon.source.parsing import Place, parse_value, printable, to_sample
from tests.support.effort import examples

EXACT = (
    "0.1000000000000000055511151231257",
    "1234567890.123456789012345678901",
    "1e-400",
    "-0.0",
    "-0",
    "0.0",
    "1.0",
    "1.50",
    "1E5",
    "1e+05",
    "-1.5E-07",
    "100000000000000000000000.0",
    "9" * 400,
    "9" * 300 + ".5",
    "0." + "9" * 400,
)
NUMBERS = st.from_regex(r"\A-?(0|[1-9][0-9]{0,40})(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?\Z").filter(
    lambda text: abs(Decimal(text)) < Decimal("1e308")
)


def sample_of(raw: str, recipe: Recipe = PLAIN_RECIPE) -> Sample:
    return to_sample(parse_value(raw, 32), recipe, Place(0, 1, 0))


def as_written(raw: str) -> object:
    """JSON with every number as its own text."""
    return json.loads(raw, parse_float=lambda text: ["number", text], parse_int=lambda text: ["number", text])


@pytest.mark.parametrize("number", EXACT)
def test_a_number_is_carried_as_it_was_written(number):
    assert sample_of(f'{{"text": "a", "x": {number}}}').extra == f'{{"x": {number}}}'
    nested = f'{{"y": [{number}, {{"z": {number}}}]}}'
    assert sample_of(f'{{"text": "a", {nested[1:]}').extra == nested
    assert sample_of(f'{{"text": "a", "complexity": "{number}"}}').extra == f'{{"complexity": "{number}"}}'


@pytest.mark.parametrize("number", EXACT)
def test_a_text_an_id_or_a_domain_that_is_a_number_is_what_was_written(number):
    sample = sample_of(f'{{"text": {number}, "id": {number}, "domain": {number}}}')
    assert (sample.texts, sample.sample_id, sample.domain) == ((number,), number, number)
    recipe = Recipe((("q", "{a} is {b}"),), None)
    assert sample_of(f'{{"a": {number}, "b": true}}', recipe).texts == (f"{number} is true",)


@settings(max_examples=examples(300))
@given(
    numbers=st.lists(NUMBERS, min_size=1, max_size=4),
    text=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
)
@example(numbers=["-0", "1E5"], text="-0, [-0] -0.0 1.0")
def test_every_number_and_every_text_survives(numbers, text):
    inner = f'{{"n": [{", ".join(numbers)}], "m": {{"k": {numbers[0]}}}, "s": {json.dumps(text)}}}'
    extra = sample_of(f'{{"text": "a", {inner[1:]}').extra
    assert extra is not None
    assert as_written(extra) == as_written(inner)


def test_what_looks_like_a_carried_number_inside_is_still_a_text():
    with pytest.raises(SampleError, match="unpaired"):
        sample_of(r'{"text": "a", "x": "\ud8001.5\ud800"}')
    assert sample_of(r'{"text": "a", "x": "1.5", "y": "-0"}').extra == '{"x": "1.5", "y": "-0"}'


@pytest.mark.parametrize(("number", "value"), [("1e-400", 0.0), ("2.50", 2.5), ("7", 7.0), ("-0", -0.0)])
def test_complexity_is_the_nearest_float64(number, value):
    sample = sample_of(f'{{"text": "a", "complexity": {number}}}')
    assert repr(sample.complexity) == repr(value)
    assert sample.extra is None


@pytest.mark.parametrize("field", ["x", "complexity", "text", "id"])
@pytest.mark.parametrize("number", ["1e999", "-1E400", "9" * 400 + ".5"])
def test_a_number_beyond_float64_is_a_reject(field, number):
    with pytest.raises(SampleError) as caught:
        sample_of(f'{{"text": "a", "{field}": {number}}}' if field != "text" else f'{{"text": {number}}}')
    assert caught.value.reason == "not_finite"


@pytest.mark.parametrize("depth", [1, 2, 32])
def test_a_record_may_nest_exactly_as_deep_as_the_limit(depth):
    raw = "[" * (depth - 1) + '{"text": "[{"}' + "]" * (depth - 1)
    assert parse_value(raw, depth) == json.loads(raw)
    beside = f"[{raw}, {raw}]"  # as deep, with more brackets than the limit
    assert parse_value(beside, depth + 1) == json.loads(beside)
    with pytest.raises(SampleError) as caught:
        parse_value(beside, depth)
    assert caught.value.reason == "nesting_too_deep"


def test_a_field_name_of_exactly_60_characters_is_shown_whole_and_a_longer_one_in_as_many():
    assert printable("k" * 60) == repr("k" * 60)
    assert printable("k" * 61) == repr("k" * 57 + "...")
