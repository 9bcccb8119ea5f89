from __future__ import annotations

import threading
import time

import pytest
import torch

from daemon.analysis.threads import in_ranges, side_by_side
from tests.torch_threads import torch_threads

PATIENCE = 60  # seconds until a thread that should be met is missed


@pytest.fixture
def threads():
    with torch_threads(8) as threads:
        yield threads


def test_pieces_come_back_in_their_order(threads):
    assert side_by_side(lambda n: n * n, range(50)) == [n * n for n in range(50)]


@pytest.mark.parametrize("threads_each", [1, 2, 4])
def test_pieces_with_several_threads_each_use_all_of_them(threads_each, threads):
    everyone = threading.Barrier(threads)

    def piece(_: int) -> list[int]:
        if threads_each == 1:
            return [everyone.wait(PATIENCE)]
        return side_by_side(lambda _: everyone.wait(PATIENCE), range(threads_each))

    numbers = side_by_side(piece, range(threads // threads_each), threads_each)
    assert sorted(number for piece in numbers for number in piece) == list(range(threads))
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
