"""The reference engine: TransformerLens on right-padded batches, one forward pass for all SAEs.

Slower than it could be, and simple: causal attention never looks right, so padding on the right needs no
mask and changes no result. Knows nothing about analysis, files or samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from daemon.compute.encoding import Encoder
from daemon.compute.extraction import Extraction, Started
from daemon.compute.float64 import full_precision
from daemon.compute.launched import Launched, moved
from daemon.compute.loading import LoadedModel, bridge_of, model_info
from daemon.compute.readings import Reader
from daemon.compute.sae import LoadedSae, layer_of
from daemon.errors import ConfigError
from daemon.records import ModelInfo, Positions


class PaddedEngine:
    """Implements `daemon.compute.engine.Engine` with TransformerLens as it comes."""

    def __init__(
        self,
        model: LoadedModel,
        saes: Sequence[LoadedSae],
        encoders: Sequence[Encoder],
        positions: Positions,
    ) -> None:
        """Raises ConfigError where the model lacks a hook point that an SAE names."""
        self._bridge = bridge_of(model)
        self._reader = Reader(tuple(saes), tuple(encoders), positions, model.device)
        self._info = model_info(model, [entry.info for entry in saes], "padded")
        self._dtype = model.dtype
        self._device = model.device
        self._hook_points = {name: canonical(name) for entry in saes for name in entry.hook_names}
        self._stop_at_layer = max(map(layer_of, self._hook_points)) + 1
        for name, point in self._hook_points.items():
            if point not in self._bridge.hook_dict:
                raise ConfigError(f"model {model.location.name} has no hook point {name}")
        self._check_widths()

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def prepend_bos(self) -> bool:
        return self._reader.prepend_bos

    @property
    def shares_prefixes(self) -> bool:
        return False

    @property
    def concurrent(self) -> bool:
        return False

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        return self._reader.encoders

    @property
    def saes(self) -> tuple[LoadedSae, ...]:
        return self._reader.saes

    def _check_widths(self) -> None:
        """Raises ConfigError where a dictionary does not fit the places it reads and predicts."""
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self._device)
        for entry, read, written in zip(self._reader.saes, *self.residuals(tokens), strict=True):
            info = entry.info
            check_width(info.source, info.hook_name, info.d_in, read)
            check_width(info.source, info.hook_name_out, info.d_out, written)

    def residuals(self, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """tokens: (rows, width) on the device -> the raw values (rows, width, d) that each SAE reads, and
        those that it reconstructs."""
        captured: dict[str, Tensor] = {}

        def capture(activation: Tensor, hook: object, name: str) -> None:
            captured[name] = activation.flatten(2)  # heads side by side

        fwd_hooks = [
            (point, lambda activation, hook, name=name: capture(activation, hook, name))
            for name, point in self._hook_points.items()
        ]
        with torch.inference_mode(), full_precision(self._dtype):
            self._bridge.run_with_hooks(
                tokens, return_type=None, stop_at_layer=self._stop_at_layer, fwd_hooks=fwd_hooks
            )
        infos = [entry.info for entry in self._reader.saes]
        return [captured[info.hook_name] for info in infos], [captured[info.hook_name_out] for info in infos]

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """See `Engine.extract`."""
        return self.finish(self.start(texts))

    def start(self, texts: Sequence[Sequence[int]]) -> Started:
        """See `Engine.start`."""
        with Launched(self._device) as forward:
            lengths = np.array([len(text) for text in texts])
            width = int(lengths.max())
            tokens = np.zeros((len(texts), width), np.int64)
            inside = np.arange(width) < lengths[:, None]
            tokens[inside] = np.concatenate(texts)
            readings = self._reader.choose(
                path=np.flatnonzero(inside),
                offsets=np.concatenate(([0], np.cumsum(lengths))),
                token_ids=tokens[inside],
            )
            read, written = self._kept(moved(tokens, self._device), moved(readings.keep, self._device))
        return Started(readings, read, written, forward, tokens.size, tokens.size - int(lengths.sum()))

    def finish(self, started: Started) -> Extraction:
        """See `Engine.finish`."""
        return self._reader.finish(started)

    def _kept(self, padded: Tensor, keep: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        read, written = self.residuals(padded)
        kept = [x.flatten(0, 1)[keep] for x in read]
        targets = [
            x if target is raw else target.flatten(0, 1)[keep]
            for x, raw, target in zip(kept, read, written, strict=True)
        ]
        return kept, targets


def check_width(source: str, hook_name: str, width: int, got: Tensor) -> None:
    if got.shape[-1] != width:
        raise ConfigError(
            f"SAE {source}: expects {width} values at {hook_name}, where the model has {got.shape[-1]}:"
            " it belongs to another model"
        )


def canonical(hook_name: str) -> str:
    """A residual hook's name as the bridge's list of hooks has it."""
    return hook_name.replace("hook_resid_post", "hook_out").replace("hook_resid_pre", "hook_in")
