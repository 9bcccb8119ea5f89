"""Arrays in memory of their own."""

from __future__ import annotations

import errno

import numpy as np
import pytest

from daemon import mmap_arrays


def test_memory_that_is_refused_is_told_as_such(monkeypatch):
    def refused(*_: object, **options: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap_arrays.mmap, "mmap", refused)
    with pytest.raises(MemoryError, match="Cannot allocate"):
        mmap_arrays.copies([np.zeros(3)])


def test_copies_are_the_same():
    arrays = [
        np.arange(5, dtype=np.uint32),
        np.empty((0, 3)),
        np.random.default_rng(0).random((7, 3)).T,
        np.array([], np.int64),
    ]
    copies = mmap_arrays.copies(arrays)
    arrays[0][0] = 99
    assert copies[0].tolist() == [0, 1, 2, 3, 4]
    for copy, array in zip(copies[1:], arrays[1:], strict=True):
        assert (copy.dtype, copy.shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(copy, array)
    assert mmap_arrays.copies([]) == []
