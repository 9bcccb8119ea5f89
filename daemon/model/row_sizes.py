"""The numbers of rows that matrix products run with: those with which a row's result is always the same bits.

A library chooses its kernel by the number of rows, and another kernel may add in another order. Which numbers
give the same bits is tried on random rows. Knows no library, no model and no texts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from daemon.native.threads import one_thread_each

ROW_STEP = 16  # the numbers of rows are multiples of it
MOST_ROWS = 512  # of a product; so many results stay in the caches
COARSE_STEP = 64  # instead of ROW_STEP, where trying them all would take long
TINY = 1e-5  # what is left of a sum of numbers of about 1: about as much as float32 loses
TRY_SECONDS = 5.0  # for all products; a second does for all of a small model's

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class RowSizes:
    """Multiples of `step` from `least` to `most`: the numbers of rows that products run with."""

    least: int = ROW_STEP
    most: int = MOST_ROWS
    step: int = ROW_STEP
    invariant: bool = True  # whether each of them gives a row the same bits; untried, it is taken for granted

    @property
    def each(self) -> range:
        return range(self.least, self.most + 1, self.step)

    def padded(self, rows: int) -> int:
        """The least number from `rows` up that splits into these sizes; 0 stays 0."""
        least_chunks = -(-rows // self.most)
        return max(-(-rows // self.step) * self.step, least_chunks * self.least)

    def chunks(self, rows: int, threads: int = 1) -> list[slice]:
        """Rows, as many as `padded` gives, in chunks of these sizes; several for several threads."""
        n = max(1, -(-rows // self.most))
        if threads > 1:
            n = max(1, min(-(-n // threads) * threads, rows // self.least))
        steps = rows // self.step
        return [slice(*pair) for pair in itertools.pairwise(steps * i // n * self.step for i in range(n + 1))]

    def multiply(self, function: Product, x: Tensor) -> Tensor:
        """function(x) (n, out) for x (n, in), chunk by chunk, each on one thread."""
        n = len(x)
        more = self.padded(n) - n
        x = torch.nn.functional.pad(x, (0, 0, 0, more)) if more else x
        results = one_thread_each(
            function, [x[rows] for rows in self.chunks(len(x), torch.get_num_threads())]
        )
        result = results[0] if len(results) == 1 else torch.cat(results)
        return result[:n]


@dataclass(frozen=True, slots=True)
class TriedProduct:
    """A product to be tried, and rows (MOST_ROWS, in) to try it on."""

    function: Product
    rows: Tensor

    @classmethod
    def on_random_rows(cls, function: Product, width: int, dtype: torch.dtype) -> TriedProduct:
        return cls(function, torch.randn(MOST_ROWS, width, generator=seeded()).to(dtype))

    @classmethod
    def cancelling(
        cls, make: Callable[[Tensor], Product], shape: torch.Size, dtype: torch.dtype
    ) -> TriedProduct:
        """A product by weights (out, in) of its own, which `make` is given, whose sums are nearly 0.

        The order of a float32 sum changes its last bits. A result that is rounded to fewer bits shows them
        only where all that comes before cancels out.
        """
        n_out, width = shape
        half = (width - 1) // 2
        generator = seeded()
        a, b = (torch.randn(n, half, generator=generator) for n in (MOST_ROWS, n_out))
        rest = width - 2 * half
        order = torch.randperm(width, generator=generator)
        rows = torch.cat([a, -a, torch.full((MOST_ROWS, rest), TINY)], dim=1)[:, order]
        weight = torch.cat([b, b, torch.ones(n_out, rest)], dim=1)[:, order]
        return cls(make(weight.to(dtype).contiguous()), rows.to(dtype).contiguous())


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def row_sizes(products: Sequence[TriedProduct], seconds: float = TRY_SECONDS) -> RowSizes:
    """The most sizes, one after the other, with each of which every product gives a row the same bits.

    Tries sizes on one thread each, from the largest down, and no more after so many seconds: what was not
    tried is not used. A row is tried at other places among other rows, too; where its bits depend on that,
    `invariant` is False.
    """
    if not products:
        return RowSizes()
    began = time.perf_counter()
    tried = [Tried(product) for product in products]
    one_thread_each(partial(Tried.try_size, size=MOST_ROWS), tried)
    step = ROW_STEP
    if (time.perf_counter() - began) * MOST_ROWS / ROW_STEP / 2 > seconds:
        step = COARSE_STEP
    sizes = [MOST_ROWS]
    for size in range(MOST_ROWS - step, 0, -step):
        if time.perf_counter() - began > seconds:
            break
        one_thread_each(partial(Tried.try_size, size=size), tried)
        sizes.append(size)
    least, most = longest_run([tuple(one.kinds[i] for one in tried) for i in range(len(sizes))], sizes)
    steady = all(one_thread_each(lambda one: one.is_steady(least) and one.is_steady(most), tried))
    return RowSizes(least, most, step, invariant=steady)


def longest_run(kinds: Sequence[tuple[int, ...]], sizes: Sequence[int]) -> tuple[int, int]:
    """Return the least and the most of the descending `sizes` in the longest run of one kind."""
    best = (0, 0)
    start = 0
    for stop in range(1, len(sizes) + 1):
        if stop == len(sizes) or kinds[stop] != kinds[start]:
            if stop - start > best[1] - best[0]:
                best = (start, stop)
            start = stop
    return sizes[best[1] - 1], sizes[best[0]]


class Tried:
    """One product, and what it gave for each size."""

    def __init__(self, product: TriedProduct) -> None:
        self._product = product
        self._rows = product.rows
        self._seen: list[Tensor] = []  # a result of each kind, for the most rows
        self.kinds: list[int] = []  # of each size that was tried: which of them it is like

    def try_size(self, size: int) -> None:
        """The last `size` rows: they are at other places than in the product of all."""
        with torch.inference_mode():
            result = self._product.function(self._rows[-size:].clone())
        alike = [kind for kind, seen in enumerate(self._seen) if torch.equal(result, seen[-size:])]
        if not alike:
            alike = [len(self._seen)]
            self._seen.append(result)
        self.kinds.append(alike[0])

    def is_steady(self, size: int) -> bool:
        """Whether so many rows in reversed order give the same results in reversed order."""
        rows = self._rows[-size:].clone()
        with torch.inference_mode():
            forth, back = self._product.function(rows), self._product.function(rows.flip(0))
        return torch.equal(forth, back.flip(0))
