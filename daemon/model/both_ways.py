"""Shares one forward pass out between the SAEs that read texts with BOS and those that read them without.

Such a pass reads N texts with BOS and the same N without, 2 N in all. Each SAE is then given what was read of
its own N, as if nothing else had been; their results are put together again. Knows no model and no SAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from daemon.devices import to_device
from daemon.model.extraction import Counted, Extraction, NotFinite, ReadPositions, Started
from daemon.records import IntArray


@dataclass(frozen=True, slots=True)
class Share:
    """The SAEs that read texts one way."""

    prepend_bos: bool
    saes: tuple[int, ...]  # their numbers

    def of_pass(self, started: Started) -> Started:
        """Its half of a pass over texts with BOS and then without."""
        n = len(started.texts) // 2
        assert 2 * n == len(started.texts), "every text comes both ways"
        return self._of(started, 0 if self.prepend_bos else n, n)

    def start_own(
        self,
        start: Callable[[Sequence[Sequence[int]], Counted], Started],
        texts: Sequence[Sequence[int]],
        counted: Counted,
    ) -> Started:
        """A pass over texts as its SAEs read them, for these alone."""
        return self._of(start(texts, counted), 0, len(texts))

    def _of(self, started: Started, first: int, n: int) -> Started:
        readings, used = part_of(started.readings, first, n)
        read, written = ([kind[sae] for sae in self.saes] for kind in (started.read, started.written))
        distinct = {id(values): values for values in (*read, *written)}  # several SAEs may read one place
        chosen = {key: values[to_device(used, values.device)] for key, values in distinct.items()}
        return dataclasses.replace(
            started,
            texts=started.texts[first : first + n],
            counted=None if started.counted is None else started.counted[first : first + n],
            readings=readings,
            read=[chosen[id(values)] for values in read],
            written=[chosen[id(values)] for values in written],
        )


def shares_of(prepend_bos: Sequence[bool]) -> tuple[Share, ...]:
    """The SAEs by how they read texts, given for each."""
    return tuple(
        Share(way, tuple(number for number, bos in enumerate(prepend_bos) if bos is way))
        for way in (True, False)
    )


def part_of(readings: ReadPositions, first: int, n: int) -> tuple[ReadPositions, IntArray]:
    """The readings of n texts, and which of the rows (K,) are theirs."""
    offsets = readings.offsets[first : first + n + 1]
    chunk = slice(offsets[0], offsets[-1])
    used, rows = np.unique(readings.rows[chunk], return_inverse=True)
    chosen = ReadPositions(
        keep=readings.keep[used],
        rows=rows,
        offsets=offsets - offsets[0],
        positions=readings.positions[chunk],
        token_ids=readings.token_ids[chunk],
    )
    return chosen, used


def together(shares: Sequence[Share], found: Sequence[Extraction]) -> Extraction:
    """One result of the two, in the order of all SAEs. The pass is counted in the first."""
    layers = {
        number: layer
        for share, one in zip(shares, found, strict=True)
        for number, layer in zip(share.saes, one.layers, strict=True)
    }
    not_finite: dict[int, NotFinite] = {}
    of_all = [
        dataclasses.replace(text, sae=share.saes[text.sae])
        for share, one in zip(shares, found, strict=True)
        for text in one.not_finite
    ]
    for text in sorted(of_all, key=lambda text: (text.text, text.sae)):
        not_finite.setdefault(text.text, text)
    return Extraction(
        layers=tuple(layers[number] for number in sorted(layers)),
        stored=tuple(
            dataclasses.replace(group, saes=tuple(share.saes[sae] for sae in group.saes))
            for share, one in zip(shares, found, strict=True)
            for group in one.stored
        ),
        not_finite=tuple(not_finite.values()),
        computed_tokens=sum(one.computed_tokens for one in found),
        padding_tokens=sum(one.padding_tokens for one in found),
        forward_seconds=found[0].forward_seconds,
        sae_seconds=sum(one.sae_seconds for one in found),
    )
