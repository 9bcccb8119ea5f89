"""The reference engine: TransformerLens on right-padded batches, one forward pass for all SAEs.

Slower than it could be, and simple: causal attention never looks right, so padding on the right needs no
mask and changes no result. Knows nothing about analysis, files or samples.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from daemon.analysis.sparse import from_dense
from daemon.analysis.study import LayerActivations
from daemon.compute.engine import Extraction
from daemon.compute.float64 import full_precision
from daemon.compute.loading import LoadedModel
from daemon.compute.sae import LoadedSae
from daemon.errors import ConfigError
from daemon.records import ModelInfo


class PaddedEngine:
    """Implements `daemon.compute.engine.Engine` with TransformerLens and SAELens as they come."""

    def __init__(self, model: LoadedModel, saes: Sequence[LoadedSae]) -> None:
        """Raises ConfigError where the model lacks a hook point that an SAE names."""
        self._bridge = model.bridge
        self._saes = tuple(saes)
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
        self._info = ModelInfo(
            name=model.location.name,
            architecture=model.architecture,
            d_model=model.d_model,
            n_layers=model.n_layers,
            dtype=str(model.dtype).removeprefix("torch."),
            device=model.device,
            weights_sha256=model.location.weights_sha256,
            saes=tuple(entry.info for entry in saes),
        )

    @property
    def info(self) -> ModelInfo:
        return self._info

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
        lengths = [len(text) for text in texts]
        width = max(lengths)
        tokens = torch.zeros((len(texts), width), dtype=torch.long)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        last = torch.tensor(lengths, device=self._device) - 1
        rows = torch.arange(len(texts), device=self._device)
        residuals = self.residuals(tokens.to(self._device))
        kept = [residual[rows, last] for residual in residuals]  # (N, d_model) each
        self._synchronize()
        ran = time.perf_counter()
        with torch.inference_mode():
            layers = tuple(
                self._encode(entry, residual) for entry, residual in zip(self._saes, kept, strict=True)
            )
        self._synchronize()
        return Extraction(
            layers=layers,
            computed_tokens=len(texts) * width,
            padding_tokens=len(texts) * width - sum(lengths),
            forward_seconds=ran - began,
            sae_seconds=time.perf_counter() - ran,
        )

    def _encode(self, entry: LoadedSae, residual: Tensor) -> LayerActivations:
        x = entry.residual(residual)
        feature_acts = entry.encode(x)
        return LayerActivations(
            layer=entry.info.layer,
            x=x,
            reconstruction=entry.decode(feature_acts),
            acts=from_dense(feature_acts),
            W_dec=entry.W_dec,
            d_sae=entry.info.d_sae,
        )

    def encode_first(self, x: Tensor) -> Tensor:
        """See `Engine.encode_first`."""
        with torch.inference_mode():
            return self._saes[0].encode(x)

    def _synchronize(self) -> None:
        if self._device.startswith("cuda"):
            torch.cuda.synchronize(self._device)
