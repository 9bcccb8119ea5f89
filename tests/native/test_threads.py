from __future__ import annotations

import threading
import time

import pytest
import torch

from daemon.native.threads import in_ranges, side_by_side
from tests.support.torch_threads import torch_threads

PATIENCE = 60  # seconds until a thread that should be met is missed


@pytest.fixture
def threads():
    with torch_threads(8) as threads:
        yield threads


def test_pieces_come_back_in_their_order(threads):
    assert side_by_side(lambda n: n * n, range(50)) == [n * n for n in range(50)]


def test_every_thread_takes_a_piece_and_uses_one_core(threads):
    everyone = threading.Barrier(threads)

    def piece(_: int) -> int:
        everyone.wait(PATIENCE)
        return torch.get_num_threads()

    assert side_by_side(piece, range(threads)) == [1] * threads
    assert torch.get_num_threads() == threads


def test_an_error_is_raised_once_what_was_under_way_has_ended(threads):
    everyone, raised = threading.Barrier(threads), threading.Event()
    begun: set[int] = set()
    ended: set[int] = set()

    def piece(n: int) -> None:
        begun.add(n)
        if n < threads:
            everyone.wait(PATIENCE)
        if n == 3:
            raised.set()
            raise MemoryError(n)
        raised.wait(PATIENCE)
        time.sleep(0.2 if n > 3 else 0)  # seen by one who waits only for those before the error
        ended.add(n)

    with pytest.raises(MemoryError):
        side_by_side(piece, range(1000))
    assert begun - ended == {3}
    assert len(begun) < 900  # no more once it was met
    assert torch.get_num_threads() == threads


def test_ranges_are_all_of_it_at_multiples_of_the_step(threads):
    ranges = in_ranges(lambda first, last: (first, last), 1000, 16)
    assert [first for first, _ in ranges] == [0, *(last for _, last in ranges[:-1])]
    assert ranges[-1][1] == 1000
    assert all(first % 16 == 0 for first, _ in ranges)
