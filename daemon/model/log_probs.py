"""The log-probabilities that a model gives the tokens of texts, each from those before it.

Tokens that texts share are predicted once. A text's first token, BOS or not, has nothing before it and no
log-probability. Knows no engine, no SAE and of a model only its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from daemon.analysis.column_inputs import TokenLogProbs
from daemon.devices import to_device, to_numpy
from daemon.model.extraction import Counted, Extraction, PredictedTokens, Started
from daemon.model.unembedding import Unembedding
from daemon.native.threads import one_thread_each
from daemon.records import FloatArray, IntArray

LOGITS = {"cuda": 1 << 27, "mps": 1 << 26}  # numbers that are held at a time
CPU_ROWS = 128  # of a product with the head, there


@dataclass(frozen=True, slots=True)
class Predictions:
    """The tokens of a batch to predict, and the computed tokens that they are predicted from."""

    ahead: IntArray  # (P,) computed tokens, ascending
    rows: IntArray  # (W,) of each token to predict, what it is predicted from: a row of `ahead`, ascending
    tokens: IntArray  # (W,) token ids
    of_texts: IntArray  # (M,) what texts count in turn, as rows of `tokens`
    offsets: IntArray  # (N + 1,) where each text's begin

    @classmethod
    def of(
        cls, path: IntArray, offsets: IntArray, token_ids: IntArray, counted: Counted, n_texts: int
    ) -> Predictions:
        """Of the first `n_texts` texts the tokens that count, but for each text's first.

        `path` holds where each text's tokens were computed, text by text; `offsets` where they begin;
        `token_ids` are the tokens there.
        """
        end = int(offsets[n_texts])
        wanted = np.ones(end, dtype=np.bool_)
        if counted is not None:
            wanted = np.frombuffer(b"".join(counted[:n_texts]), dtype=np.bool_).copy()
        wanted[offsets[:n_texts]] = False
        at = np.flatnonzero(wanted)
        # a token's place stands for it and for all before it
        _, first, of_texts = np.unique(path[at], return_index=True, return_inverse=True)
        parents, tokens = path[at[first] - 1], token_ids[at[first]]
        order = np.argsort(parents, kind="stable")
        ahead, rows = np.unique(parents[order], return_inverse=True)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        counts = np.concatenate(([0], np.cumsum(wanted)))[offsets[: n_texts + 1]]
        return cls(ahead, rows, tokens[order], place[of_texts], counts)

    def predicted(self, unembedding: Unembedding, hidden: Tensor) -> PredictedTokens:
        """From the last layer's output at `ahead` (P, d_model); the device may go on computing."""
        return PredictedTokens(
            token_log_probs(unembedding, hidden, self.rows, self.tokens), self.of_texts, self.offsets
        )


def token_log_probs(unembedding: Unembedding, hidden: Tensor, rows: IntArray, tokens: IntArray) -> Tensor:
    """(W,) of tokens (W,), each predicted from a row of hidden (P, d_model); `rows` (W,) ascend."""
    on_cpu = hidden.device.type == "cpu"
    step = (
        CPU_ROWS
        if on_cpu
        else max(1, LOGITS.get(hidden.device.type, LOGITS["mps"]) // len(unembedding.weight))
    )

    def of_step(start: int) -> Tensor:
        given = hidden[start : start + step]
        if on_cpu:  # always as many rows, on one thread: the same bits in any company
            given = F.pad(given, (0, 0, 0, step - len(given)))
        logits = unembedding.logits(given)
        own = slice(*np.searchsorted(rows, (start, start + step)).tolist())
        row, token = (to_device(numbers, logits.device) for numbers in (rows[own] - start, tokens[own]))
        return (logits[row, token] - logits.logsumexp(-1)[row]).clamp(max=0).to(hidden.device)

    with torch.inference_mode():
        starts = range(0, len(hidden), step)
        found = one_thread_each(of_step, starts) if on_cpu else [of_step(start) for start in starts]
    nothing = hidden.new_zeros(0, dtype=torch.promote_types(hidden.dtype, torch.float32))
    return torch.cat([nothing, *found])


Begin = Callable[[Sequence[Sequence[int]], Counted, int], Started]  # with how many texts to predict


def with_log_probs(extraction: Extraction, started: Started, begin: Begin) -> Extraction:
    """The same with the log-probabilities that were computed beside it; `begin` reads texts again."""
    if started.predicted is None:
        return extraction
    found, computed, padding = log_probs_of(started, lambda texts, counted: begin(texts, counted, len(texts)))
    return replace(
        extraction,
        log_probs=found,
        computed_tokens=extraction.computed_tokens + computed,
        padding_tokens=extraction.padding_tokens + padding,
    )


def log_probs_of(
    started: Started, start: Callable[[Sequence[Sequence[int]], Counted], Started]
) -> tuple[TokenLogProbs, int, int]:
    """Of each text its tokens' log-probabilities; and how many tokens and paddings were read once more.

    A share of 0 of an infinite value is NaN: a text whose numbers are not finite may have them from another
    one in its batch, and is read again by itself, by `start`. Those that are left are its own.
    """
    predicted = started.predicted
    assert predicted is not None
    values, offsets = host_values(predicted), predicted.offsets
    n = len(offsets) - 1
    bad = texts_not_finite(values, offsets)
    waiting = [bad] if len(bad) and len(started.texts) > 1 else []
    computed = padding = 0
    while waiting:
        group = waiting.pop()
        counted = None if started.counted is None else [started.counted[text] for text in group]
        again = start([started.texts[text] for text in group], counted)
        computed, padding = computed + again.computed_tokens, padding + again.padding_tokens
        assert again.predicted is not None
        read, bounds = host_values(again.predicted), again.predicted.offsets
        still = texts_not_finite(read, bounds)
        for number in np.setdiff1d(np.arange(len(group)), still):
            text = group[number]
            values[offsets[text] : offsets[text + 1]] = read[bounds[number] : bounds[number + 1]]
        if len(group) > 1:
            waiting += [half for half in np.array_split(group[still], 2) if len(half)]
    return TokenLogProbs(values, np.repeat(np.arange(n), np.diff(offsets)), n), computed, padding


def host_values(predicted: PredictedTokens) -> FloatArray:
    """(M,) the log-probabilities that texts count in turn."""
    values: FloatArray = to_numpy(predicted.log_probs).astype(np.float64)[predicted.of_texts]
    return values


def texts_not_finite(values: FloatArray, offsets: IntArray) -> IntArray:
    before = np.concatenate(([0], np.cumsum(~np.isfinite(values))))
    return np.flatnonzero(np.diff(before[offsets]))
