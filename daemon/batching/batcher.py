"""Chooses which samples run together. Knows no clock and no torch.

A batch is whole samples of one recipe under a budget of what the engine really pays. Where tokens that texts
share are computed once, neighbours in the order of their tokens run together, and cost what they add; where
texts are padded, samples of similar length do, and cost rows times the width of the longest.
"""

from __future__ import annotations

from collections import deque

from daemon.prefixes import shared_length
from daemon.recipes import Recipe
from daemon.records import Batch, Entry, TokenizedPart, TokenizedSample


class Batcher:
    """Samples waiting for the device, and the batches planned from them.

    `max_batch_tokens` counts the tokens that the model runs; `max_batch_samples` limits a batch further
    where given. A sample over the budget runs alone.
    """

    def __init__(
        self, max_batch_tokens: int, max_batch_samples: int | None = None, *, shares_prefixes: bool
    ) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_samples = max_batch_samples
        self._cost: type[TrieCost] | type[PaddedCost] = TrieCost if shares_prefixes else PaddedCost
        self.tokens = 0  # in samples not yet handed out
        self._waiting: list[Entry] = []
        self._planned: deque[Batch] = deque()

    def __len__(self) -> int:
        """Samples not yet handed out."""
        return len(self._waiting) + sum(len(batch.entries) for batch in self._planned)

    @property
    def is_partial(self) -> bool:
        """Whether the next batch would not be a full one."""
        return not self._planned and self.tokens < self.max_batch_tokens

    def add(self, part: TokenizedPart) -> None:
        self._waiting += (Entry(part, row) for row in range(len(part.samples)))
        self.tokens += part.n_tokens

    def take(self) -> Batch:
        """The next batch. Once the last plan is used up, sorts what waits by the cost's `order` and plans it.

        Raises IndexError where nothing waits.
        """
        if not self._planned:
            self._planned.extend(self._plan(self._waiting))
            self._waiting = []
        batch = self._planned.popleft()
        self.tokens -= sum(sample.n_tokens for sample in batch.samples)
        return batch

    def put_back(self, batch: Batch) -> None:
        """Hand this batch out again, before all others."""
        self._planned.appendleft(batch)
        self.tokens += sum(sample.n_tokens for sample in batch.samples)

    def halve(self, batch: Batch) -> None:
        """Hand this batch out again as two suspect halves, before all others."""
        middle = len(batch.entries) // 2
        for entries in (batch.entries[middle:], batch.entries[:middle]):
            self.put_back(Batch(batch.recipe, entries, suspect=True))

    def shrink(self, batch: Batch) -> None:
        """Requeue a batch that did not fit, and halve the limit below its cost."""
        cost = self._cost()
        for sample in batch.samples:
            cost.add(sample)
        # Not half of what others, which ran beside it, have brought the limit to.
        self.max_batch_tokens = min(self.max_batch_tokens, max(1, cost.total // 2))
        suspects = [planned for planned in self._planned if planned.suspect]
        rest = (planned for planned in self._planned if not planned.suspect)
        back = [*batch.entries, *(entry for planned in rest for entry in planned.entries)]
        self._planned = deque(suspects)
        self._waiting = back + self._waiting
        self.tokens += sum(sample.n_tokens for sample in batch.samples)

    def _plan(self, entries: list[Entry]) -> list[Batch]:
        by_recipe: dict[Recipe, list[Entry]] = {}
        for entry in entries:
            by_recipe.setdefault(entry.part.part.recipe, []).append(entry)
        return [
            Batch(recipe, tuple(entries))
            for recipe, group in by_recipe.items()
            for entries in self._batches(sorted(group, key=self._cost.order))
        ]

    def _batches(self, group: list[Entry]) -> list[list[Entry]]:
        """Cut a sorted group into runs within both limits: as few as it takes, of about the same cost."""
        runs, costs = self._cut(group, self.max_batch_tokens)
        if len(runs) == 1:
            return runs
        even = -(-sum(costs) // len(runs)) + max(sample_cost(self._cost, entry) for entry in group)
        if even >= self.max_batch_tokens:
            return runs
        evened, _ = self._cut(group, even)
        return evened if len(evened) == len(runs) else runs

    def _cut(self, group: list[Entry], most: int) -> tuple[list[list[Entry]], list[int]]:
        """Runs that cost at most so much each, or are a sample alone, and what each costs."""
        runs: list[list[Entry]] = [[]]
        costs = [0]
        cost = self._cost()
        for entry in group:
            cost.add(entry.sample)
            if runs[-1] and (cost.total > most or len(runs[-1]) == self.max_batch_samples):
                runs.append([])
                costs.append(0)
                cost = self._cost()
                cost.add(entry.sample)
            runs[-1].append(entry)
            costs[-1] = cost.total
        return runs, costs


class TrieCost:
    """The tokens that samples have in common counted once, for samples that come in order.

    A text costs one token at least: its features take memory even where all its tokens are shared. Texts
    that are read with BOS and without are two texts.
    """

    def __init__(self) -> None:
        self.total = 0
        self.shared = 0  # tokens that the last sample shares with the one before
        self._before: tuple[int, ...] = ()
        self._bare_before: tuple[int, ...] = ()

    @staticmethod
    def order(entry: Entry) -> tuple[tuple[int, ...], ...]:
        return entry.sample.token_ids

    def add(self, sample: TokenizedSample) -> None:
        before = self._before
        for text in sample.token_ids:
            self.total += max(1, len(text) - shared_length(self._before, text))
            self._before = text
        first = sample.token_ids[0]
        self.shared = min(shared_length(before, first), len(first) - 1)
        if sample.bos_added:
            self._add_bare(sample)

    def _add_bare(self, sample: TokenizedSample) -> None:
        """The texts without BOS: a trie of their own, but for those that begin with their own BOS."""
        before = self._bare_before
        for text, added in zip(sample.bare_ids, sample.bos_added, strict=True):
            if not added:
                self.total += 1
                continue
            self.total += max(1, len(text) - shared_length(self._bare_before, text))
            self._bare_before = text
        first = sample.bare_ids[0]
        if sample.bos_added[0]:
            self.shared += min(shared_length(before, first), len(first) - 1)


class PaddedCost:
    """Every text as wide as the widest, for samples that come by width."""

    def __init__(self) -> None:
        self.total = 0
        self._texts = 0
        self._width = 0

    @staticmethod
    def order(entry: Entry) -> int:
        return entry.sample.width

    def add(self, sample: TokenizedSample) -> None:
        self._texts += len(sample.token_ids) + len(sample.bos_added)
        self._width = max(self._width, sample.width)
        self.total = self._texts * self._width


def sample_cost(kind: type[TrieCost] | type[PaddedCost], entry: Entry) -> int:
    """The cost of a sample alone."""
    cost = kind()
    cost.add(entry.sample)
    return cost.total
