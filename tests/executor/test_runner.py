"""Results that outlive their batch are copied off the heap, and only those."""

from __future__ import annotations

import dataclasses
import mmap

import numpy as np

from daemon.executor.runner import detach_from_heap
from daemon.recipes import CONTRAST_RECIPE
from tests.support.handmade import make_block, make_sample


def room_of(array: np.ndarray) -> object:
    """The owner of an array's memory."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array.obj if isinstance(array, memoryview) else array


def test_results_lie_apart_and_the_sums_of_layers_go_with_their_batch():
    block = make_block([make_sample(number, CONTRAST_RECIPE) for number in range(3)])
    kept = detach_from_heap(block)
    assert kept.layers is block.layers  # they weigh most, and nobody needs them past the batch
    assert kept.columns.keys() == block.columns.keys()
    for name, column in block.columns.items():
        np.testing.assert_array_equal(kept.columns[name], column)
        assert isinstance(room_of(kept.columns[name]), mmap.mmap) == (column.dtype != object)
    assert kept.features.residuals is None
    for field in dataclasses.fields(block.features):
        if field.name == "residuals":
            continue
        ours, theirs = getattr(kept.features, field.name), getattr(block.features, field.name)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
        assert isinstance(room_of(ours), mmap.mmap)
