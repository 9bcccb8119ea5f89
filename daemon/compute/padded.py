"""The reference engine: TransformerLens on right-padded batches, one forward pass for all SAEs.

Slower than it could be, and simple: causal attention never looks right, so padding on the right needs no
mask and changes no result. Knows nothing about analysis, files or samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from daemon.compute.encoding import Encoder
from daemon.compute.engine import Extraction
from daemon.compute.float64 import full_precision
from daemon.compute.loading import LoadedModel, bridge_of, model_info
from daemon.compute.readings import choose_readings, encode_readings
from daemon.compute.sae import LoadedSae
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
        self._saes, self._encoders = tuple(saes), tuple(encoders)
        self._info = model_info(model, [entry.info for entry in saes], "padded")
        self._positions = positions
        self._skip = int(saes[0].prepend_bos)
        self._dtype = model.dtype
        self._device = model.device
        self._stop_at_layer = max(entry.info.layer for entry in saes) + 1
        hooks = self._bridge.hook_dict
        self._hook_points = {}
        for entry in saes:
            name = entry.info.hook_name
            canonical = name.replace("hook_resid_post", "hook_out").replace("hook_resid_pre", "hook_in")
            if canonical not in hooks:
                raise ConfigError(f"model {model.location.name} has no hook point {name}")
            self._hook_points[name] = canonical

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def prepend_bos(self) -> bool:
        return self._saes[0].prepend_bos

    @property
    def shares_prefixes(self) -> bool:
        return False

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        return self._encoders

    @property
    def saes(self) -> tuple[LoadedSae, ...]:
        return self._saes

    def residuals(self, tokens: Tensor) -> list[Tensor]:
        """tokens: (rows, width) on the device -> per SAE the raw residuals (rows, width, d_model)."""
        captured: dict[str, Tensor] = {}

        def capture(activation: Tensor, hook: object, name: str) -> None:
            captured[name] = activation

        fwd_hooks = [
            (point, lambda activation, hook, name=name: capture(activation, hook, name))
            for name, point in self._hook_points.items()
        ]
        with torch.inference_mode(), full_precision(self._dtype):
            self._bridge.run_with_hooks(
                tokens, return_type=None, stop_at_layer=self._stop_at_layer, fwd_hooks=fwd_hooks
            )
        return [captured[entry.info.hook_name] for entry in self._saes]

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """See `Engine.extract`."""
        began = time.perf_counter()
        lengths = np.array([len(text) for text in texts])
        width = int(lengths.max())
        tokens = np.zeros((len(texts), width), np.int64)
        inside = np.arange(width) < lengths[:, None]
        tokens[inside] = np.concatenate(texts)
        readings = choose_readings(
            path=np.flatnonzero(inside),
            offsets=np.concatenate(([0], np.cumsum(lengths))),
            token_ids=tokens[inside],
            positions=self._positions,
            skip=self._skip,
        )
        keep = torch.from_numpy(readings.keep).to(self._device)
        residuals = [
            residual.flatten(0, 1)[keep]
            for residual in self.residuals(torch.from_numpy(tokens).to(self._device))
        ]
        self._synchronize()
        ran = time.perf_counter()
        with torch.inference_mode():
            layers, stored = encode_readings(self._saes, self._encoders, residuals, readings, self._positions)
        self._synchronize()
        return Extraction(
            layers=layers,
            stored=stored,
            computed_tokens=tokens.size,
            padding_tokens=tokens.size - int(lengths.sum()),
            forward_seconds=ran - began,
            sae_seconds=time.perf_counter() - ran,
        )

    def _synchronize(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
