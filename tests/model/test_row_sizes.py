from __future__ import annotations

import pytest
import torch

from daemon.model.row_sizes import MOST_ROWS, ROW_STEP, RowSizes, TriedProduct, longest_run, row_sizes
from tests.support.torch_threads import torch_threads

WIDTH, OUT = 60, 24
WEIGHT = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(1))
SIZES = [RowSizes(), RowSizes(48, 320), RowSizes(512, 512), RowSizes(64, 448, 64)]


def summed(x: torch.Tensor, weight: torch.Tensor, columns: range) -> torch.Tensor:
    """x @ weight.T, each number by itself in float32, one column after the other."""
    total = torch.zeros(len(x), len(weight))
    for column in columns:
        total = total + x[:, column, None].float() * weight[:, column].float()
    return total


def forwards(x: torch.Tensor) -> torch.Tensor:
    return summed(x, WEIGHT, range(WIDTH))


def backwards(x: torch.Tensor) -> torch.Tensor:
    return summed(x, WEIGHT, range(WIDTH)[::-1])


def tried(function) -> TriedProduct:
    return TriedProduct.on_random_rows(function, WIDTH, torch.float32)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_chunks_are_all_rows_in_sizes_that_are_allowed(sizes, threads):
    for rows in [0, 1, 16, 47, 300, 511, 512, 513, *range(520, 5000, 37)]:
        padded = sizes.padded(rows)
        chunks = sizes.chunks(padded, threads)
        assert padded >= rows
        assert [row for chunk in chunks for row in range(padded)[chunk]] == list(range(padded))
        lengths = [chunk.stop - chunk.start for chunk in chunks]
        assert rows == 0 or set(lengths) <= set(sizes.each), (rows, lengths)
        assert rows == 0 or max(lengths) - min(lengths) <= sizes.step


def test_little_is_added_to_rows():
    sizes = RowSizes()
    assert all(sizes.padded(rows) - rows < ROW_STEP for rows in range(1, 5000))
    assert sizes.padded(0) == 0


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 17, 700])
def test_a_product_by_chunks_is_that_of_all_rows(sizes, rows):
    x = torch.randn(rows, WIDTH)
    with torch_threads(2):
        assert torch.equal(sizes.multiply(forwards, x), forwards(x))


def test_a_product_that_gives_each_row_the_same_may_have_any_number_of_rows():
    assert row_sizes([tried(forwards)]) == RowSizes()


def test_sizes_at_which_a_product_adds_in_another_order_are_left_out():
    few = tried(lambda x: backwards(x) if len(x) < 100 else forwards(x))
    assert row_sizes([few]) == RowSizes(112, MOST_ROWS)
    many = tried(lambda x: backwards(x) if len(x) > 400 else forwards(x))
    assert row_sizes([many]) == RowSizes(ROW_STEP, 400)
    assert row_sizes([few, many]) == RowSizes(112, 400)


def test_a_product_whose_rows_depend_on_their_place_is_told():
    def by_place(x: torch.Tensor) -> torch.Tensor:
        odd = (torch.arange(len(x)) % 2 == 1).unsqueeze(1)
        return torch.where(odd, backwards(x), forwards(x))

    assert not row_sizes([tried(by_place)]).invariant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_order_of_sums_shows_in_results_of_few_bits(dtype):
    def product_by(weight: torch.Tensor):
        def multiply(x: torch.Tensor) -> torch.Tensor:
            return summed(x, weight, range(WIDTH)[:: -1 if len(x) < 200 else 1]).to(dtype)

        return multiply

    one = TriedProduct.cancelling(product_by, torch.Size([OUT, WIDTH]), dtype)
    assert row_sizes([one]) == RowSizes(208, MOST_ROWS)


def test_what_was_not_tried_in_time_is_not_used():
    assert row_sizes([tried(forwards)], seconds=0.0) == RowSizes(MOST_ROWS, MOST_ROWS, step=64)


def test_the_longest_run_of_one_kind_is_taken():
    assert longest_run([(0,), (0,), (1,), (1,), (1,), (0,)], [96, 80, 64, 48, 32, 16]) == (32, 64)
    assert longest_run([(0, 0), (0, 1)], [32, 16]) == (32, 32)
