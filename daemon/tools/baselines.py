"""The baselines of `lensd bench`: three loops over TransformerLens and SAELens that people write.

Each reads samples' texts and returns nothing: results are computed and dropped. Knows nothing about files.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from daemon.model.float64 import full_precision
from daemon.model.loading import LoadedModel, bridge_of
from daemon.model.sae import LoadedSae
from daemon.records import Positions, TokenizedSample

T = TypeVar("T")
Text = Sequence[int]
ORIGINAL_BATCH_SAMPLES = 8
IDIOMATIC_BATCH_TEXTS = {"last": (32, 96), "all": (16,)}  # by positions read


class Baselines:
    """One model and its SAEs as TransformerLens and SAELens have them."""

    def __init__(self, model: LoadedModel, saes: Sequence[LoadedSae], positions: Positions) -> None:
        self._bridge = bridge_of(model)
        self._saes = tuple(saes)
        self._dtype, self._device = model.dtype, model.device
        self._all = positions == "all"
        self._ways = sorted({entry.info.prepend_bos for entry in saes})  # in which texts are read
        self._stop_at_layer = max(entry.info.layer for entry in saes) + 1

    def variants(self) -> dict[str, Callable[[Sequence[TokenizedSample]], None]]:
        """Every loop by its name."""
        found: dict[str, Callable[[Sequence[TokenizedSample]], None]] = {"sequential": self.sequential}
        if not self._all:
            found["original"] = self.original
        for size in IDIOMATIC_BATCH_TEXTS["all" if self._all else "last"]:
            found[f"idiomatic {size}"] = functools.partial(self.idiomatic, size)
        return found

    def sequential(self, samples: Sequence[TokenizedSample]) -> None:
        """One text at a time: the residuals that the SAEs read, and their features."""
        for way in self._ways:
            for text in texts_of(samples, way):
                self._extract([text], way)

    def idiomatic(self, batch_texts: int, samples: Sequence[TokenizedSample]) -> None:
        """Texts sorted by length, right-padded, only the hooks wanted, stopped after the last layer read."""
        for way in self._ways:
            ordered = sorted(texts_of(samples, way), key=len)
            for batch in chunked(ordered, batch_texts):
                self._extract(batch, way)

    def original(self, samples: Sequence[TokenizedSample]) -> None:
        """The original study's scheme: padded batches of 8 samples, each text and each layer in a pass of its
        own with the full cache, dense features, and an eigendecomposition of every d x d inertia tensor."""
        for batch in chunked(samples, ORIGINAL_BATCH_SAMPLES):
            for entry in self._saes:
                way = entry.info.prepend_bos
                for text in range(len(batch[0].token_ids)):
                    tokens, lengths = self._padded([sample.read_by(way)[text] for sample in batch])
                    with torch.inference_mode(), full_precision(self._dtype):
                        _, cache = self._bridge.run_with_cache(tokens)
                        rows = torch.arange(len(lengths), device=self._device)
                        x = entry.residual(cache[entry.info.hook_name][rows, lengths - 1])
                        feature_acts = entry.encode(x)
                        entry.decode(feature_acts, x)
                        for acts in feature_acts:
                            inertia_by_definition(acts, entry.W_dec)

    def _extract(self, texts: Sequence[Text], prepend_bos: bool) -> None:
        tokens, lengths = self._padded(texts)
        saes = [entry for entry in self._saes if entry.info.prepend_bos is prepend_bos]
        names = list(dict.fromkeys(entry.info.hook_name for entry in saes))
        with torch.inference_mode(), full_precision(self._dtype):
            _, cache = self._bridge.run_with_cache(
                tokens, names_filter=names, stop_at_layer=self._stop_at_layer
            )
            for entry in saes:
                residual = cache[entry.info.hook_name]
                if self._all:
                    kept = residual[torch.arange(tokens.shape[1], device=self._device) < lengths.unsqueeze(1)]
                else:
                    kept = residual[torch.arange(len(lengths), device=self._device), lengths - 1]
                entry.encode(entry.residual(kept))

    def _padded(self, texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
        """(rows, width) tokens, zero on the right, and lengths (rows,)."""
        lengths = torch.tensor([len(text) for text in texts])
        tokens = torch.zeros((len(texts), int(lengths.max())), dtype=torch.long)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        return tokens.to(self._device), lengths.to(self._device)


def inertia_by_definition(feature_acts: Tensor, W_dec: Tensor) -> None:
    """feature_acts: (d_sae,), W_dec: (d_sae, d_in): the d_in x d_in tensor and its eigenvectors."""
    active = feature_acts > 0
    weights = feature_acts[active] / feature_acts[active].sum()
    rows = W_dec[active]
    centred = rows - weights @ rows
    torch.linalg.eigh((centred * weights.unsqueeze(1)).T @ centred)


def texts_of(samples: Sequence[TokenizedSample], prepend_bos: bool) -> list[Text]:
    return [text for sample in samples for text in sample.read_by(prepend_bos)]


def chunked(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
