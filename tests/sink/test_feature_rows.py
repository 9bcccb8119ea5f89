from __future__ import annotations

import dataclasses
import itertools
import mmap

import numpy as np
import pytest

from daemon.recipes import CONTRAST_RECIPE
from daemon.records import FeatureRows
from daemon.sink.feature_rows import in_order
from tests.executor.test_runner import room_of
from tests.support.handmade import make_block, make_sample

KEYS = ("sample_row", "text", "layer", "position", "token_id")


def listed(rows: FeatureRows) -> list[tuple]:
    """One row after the other: its keys, and its activations."""
    bounds = zip(rows.offsets, rows.offsets[1:], strict=False)
    return [
        (*(int(getattr(rows, key)[r]) for key in KEYS), list(zip(*pair, strict=True)))
        for r, pair in enumerate((rows.indices[a:b].tolist(), rows.values[a:b].tolist()) for a, b in bounds)
    ]


def blocks(sizes: list[int]) -> list[FeatureRows]:
    bounds = np.cumsum([0, *sizes])
    return [
        make_block([make_sample(i, CONTRAST_RECIPE) for i in range(a, b)]).features
        for a, b in itertools.pairwise(bounds)
    ]


def test_rows_of_several_batches_come_in_the_order_of_storage():
    given = blocks([3, 1, 6])
    numbers = [np.array([4, -1, 0]), np.array([2]), np.array([-1, 5, 1, -1, 3, -1])]
    expected = sorted(
        (int(number[row[0]]), *row[1:])
        for rows, number in zip(given, numbers, strict=True)
        for row in listed(rows)
        if number[row[0]] >= 0
    )
    got, clipped = in_order(list(zip(given, numbers, strict=True)), np.float32)
    assert not clipped.any()
    assert listed(got) == expected
    assert got.indices.dtype == np.uint32
    assert all(isinstance(room_of(array), mmap.mmap) for array in (got.indices, got.values))


def test_nothing_wanted_is_no_row():
    (rows,) = blocks([2])
    got, clipped = in_order([(rows, np.array([-1, -1]))], np.float16)
    assert (listed(got), clipped.tolist()) == ([], [])


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_activations_are_of_the_type_asked_for(kind):
    (rows,) = blocks([4])
    rows = dataclasses.replace(rows, values=np.linspace(1, 1e5, len(rows.values)))
    got, _ = in_order([(rows, np.arange(4))], kind)
    assert got.values.dtype == kind
    assert got.values.max() == (65504 if kind == np.float16 else 1e5)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_activations_beyond_a_type_become_the_nearest_it_holds_and_are_counted(kind):
    info = np.finfo(kind)
    least, most = float(info.smallest_subnormal), float(info.max)
    one = np.zeros(4, np.int64)
    rows = FeatureRows(
        sample_row=np.array([2, 0, 1, 2]),
        text=one,
        layer=one,
        position=np.arange(4),
        token_id=one,
        offsets=np.array([0, 3, 3, 5, 8]),
        indices=np.arange(8, dtype=np.uint32),
        values=np.array([1.5, most * 2, least / 3, 2.0, most, most * 1e3, least, least / 2]),
    )
    found = [(rows, np.array([1, 0, 2])), (rows, np.array([-1, 3, -1]))]
    assert in_order(found, kind)[1].sum() == 4
    assert not in_order(found[1:], kind)[1].any()
    assert in_order([(rows, np.array([-1, 0, 1]))], kind)[1].sum() == 4
    assert in_order([(rows, np.array([-1, -1, 0]))], kind)[1].sum() == 4
    assert not in_order(found, np.float64)[1].any()
    stored = in_order(found[:1], kind)[0].values
    assert stored.tolist() == [2, most, 1.5, most, least, most, least, least]
