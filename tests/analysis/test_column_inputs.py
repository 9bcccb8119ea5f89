from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

from daemon.analysis.column_inputs import computed_once


def test_two_threads_compute_a_property_of_two_objects_at_the_same_time():
    both = Barrier(2, timeout=30)  # each waits within the computation for the other

    class Piece:
        @computed_once
        def shape(self) -> int:
            both.wait()
            return id(self)

    pieces = [Piece(), Piece()]
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda piece: piece.shape, pieces)) == [id(piece) for piece in pieces]


def test_a_property_is_computed_once():
    computed = []

    class Piece:
        @computed_once
        def shape(self) -> int:
            computed.append(self)
            return len(computed)

    first, second = Piece(), Piece()
    assert [first.shape, first.shape, second.shape, first.shape] == [1, 1, 2, 1]
