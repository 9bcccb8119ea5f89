"""Reads texts again by themselves where what was read of them beside others is not finite.

A share of 0 of an infinite value is NaN: so a token that overflows may take its neighbours in a batch along,
though none of them attends to it. Knows no SAE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from daemon.devices import to_device, to_host
from daemon.model.extraction import Counted, ReadPositions, Started
from daemon.model.overflow import all_finite
from daemon.records import IntArray

BoolArray = npt.NDArray[np.bool_]


def reread(started: Started, start: Callable[[Sequence[Sequence[int]], Counted], Started]) -> Started:
    """The same with the numbers that texts give alone, in place of those that are not finite.

    Those that are left are the texts' own. `start` reads other texts; it gets fewer and fewer of those that
    are not finite, until each was alone.
    """
    left = ~finite_rows(started)  # (K,)
    waiting = [of_texts(left, started.readings)] if len(started.texts) > 1 and left.any() else []
    copies = {id(values): values.clone() for values in (*started.read, *started.written)} if waiting else {}
    computed, padding = started.computed_tokens, started.padding_tokens
    while waiting:
        group = waiting.pop()
        counted = None if started.counted is None else [started.counted[text] for text in group]
        again = start([started.texts[text] for text in group], counted)
        computed, padding = computed + again.computed_tokens, padding + again.padding_tokens
        finite = finite_rows(again)
        source, target = paired_rows(again.readings, started.readings, group)
        healed = finite[source] & left[target]
        source, target = source[healed], target[healed]
        for old, new in zip((*started.read, *started.written), (*again.read, *again.written), strict=True):
            copies[id(old)][on(old, target)] = new[on(old, source)]
        left[target] = False
        if len(group) > 1:
            still = group[of_texts(~finite, again.readings)]
            waiting += [half for half in np.array_split(still, 2) if len(half)]
    if not copies:
        return started
    return dataclasses.replace(
        started,
        read=[copies[id(values)] for values in started.read],
        written=[copies[id(values)] for values in started.written],
        computed_tokens=computed,
        padding_tokens=padding,
    )


def finite_rows(started: Started) -> BoolArray:
    """(K,) whether all that SAEs read and predict there is finite."""
    distinct: Iterable[Tensor] = {id(values): values for values in (*started.read, *started.written)}.values()
    finite: BoolArray = torch.stack([to_host(all_finite(values)) for values in distinct]).all(0).numpy()
    return finite


def of_texts(rows: BoolArray, readings: ReadPositions) -> IntArray:
    """The texts, ascending, that read one of the `rows` (K,)."""
    before = np.concatenate(([0], np.cumsum(rows[readings.rows])))
    return np.flatnonzero(np.diff(before[readings.offsets]))


def paired_rows(some: ReadPositions, every: ReadPositions, texts: IntArray) -> tuple[IntArray, IntArray]:
    """The rows of `some`, which are the readings of `texts` alone, and those of the same among `every`."""
    of_each = [every.rows[every.offsets[text] : every.offsets[text + 1]] for text in texts]
    return some.rows, np.concatenate(of_each)


def on(values: Tensor, rows: IntArray) -> Tensor:
    return to_device(rows, values.device)
