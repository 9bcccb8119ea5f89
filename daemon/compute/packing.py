"""Chooses which samples run together. Knows no clock and no torch.

Whole samples of similar length share a batch, under a budget of what the padded engine really pays:
rows times the width of the longest.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from daemon.records import Recipe, TokenizedPart, TokenizedSample


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a batch and where its result belongs."""

    part: TokenizedPart
    row: int  # in part.samples

    @property
    def sample(self) -> TokenizedSample:
        return self.part.samples[self.row]


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one recipe that run in one forward pass."""

    recipe: Recipe
    entries: tuple[Entry, ...]

    @property
    def samples(self) -> tuple[TokenizedSample, ...]:
        return tuple(entry.sample for entry in self.entries)


class Packer:
    """Samples waiting for the device, and the batches planned from them.

    `max_batch_tokens` counts padding; `max_batch_samples` limits a batch further where given. A sample
    over the budget runs alone.
    """

    def __init__(self, max_batch_tokens: int, max_batch_samples: int | None = None) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_samples = max_batch_samples
        self.tokens = 0  # in samples not yet handed out
        self._waiting: list[Entry] = []
        self._planned: deque[Batch] = deque()

    def __len__(self) -> int:
        """Samples not yet handed out."""
        return len(self._waiting) + sum(len(batch.entries) for batch in self._planned)

    @property
    def thin(self) -> bool:
        """Whether the next batch would not be a full one."""
        return not self._planned and self.tokens < self.max_batch_tokens

    def add(self, part: TokenizedPart) -> None:
        self._waiting += (Entry(part, row) for row in range(len(part.samples)))
        self.tokens += part.n_tokens

    def take(self) -> Batch:
        """The next batch. What waits is planned, sorted by length, once the last plan is used up.

        Raises IndexError where nothing waits.
        """
        if not self._planned:
            self._planned.extend(self._plan(self._waiting))
            self._waiting = []
        batch = self._planned.popleft()
        self.tokens -= sum(sample.n_tokens for sample in batch.samples)
        return batch

    def shrink(self, batch: Batch) -> None:
        """Take back a batch of several samples that was too much, and never plan one of its cost again."""
        width = max(sample.width for sample in batch.samples)
        cost = sum(len(sample.token_ids) for sample in batch.samples) * width
        self.max_batch_tokens = max(1, min(self.max_batch_tokens, cost) // 2)
        back = [*batch.entries, *(entry for planned in self._planned for entry in planned.entries)]
        self._planned.clear()
        self._waiting = back + self._waiting
        self.tokens += sum(sample.n_tokens for sample in batch.samples)

    def _plan(self, entries: list[Entry]) -> list[Batch]:
        by_recipe: dict[Recipe, list[Entry]] = {}
        for entry in entries:
            by_recipe.setdefault(entry.part.part.recipe, []).append(entry)
        batches: list[Batch] = []
        for recipe, group in by_recipe.items():
            group.sort(key=lambda entry: entry.sample.width)
            start = 0
            for stop in range(1, len(group) + 1):
                if stop == len(group) or not self._fits(group, start, stop + 1):
                    batches.append(Batch(recipe, tuple(group[start:stop])))
                    start = stop
        return batches

    def _fits(self, group: list[Entry], start: int, stop: int) -> bool:
        """Whether group[start:stop], sorted by width, stays within both limits."""
        last = group[stop - 1].sample
        cost = (stop - start) * len(last.token_ids) * last.width
        samples = self.max_batch_samples
        return cost <= self.max_batch_tokens and (samples is None or stop - start <= samples)
