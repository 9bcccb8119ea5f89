"""Engines on tiny models, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from daemon.config import SaeSection
from daemon.model.encoding import encoder_of
from daemon.model.loading import LoadedModel, load_model
from daemon.model.location import ModelLocation
from daemon.model.padded_engine import PaddedEngine
from daemon.model.placement import DeviceMap
from daemon.model.sae import LoadedSae, load_saes, move_saes
from daemon.model.trie_engine import TrieEngine
from daemon.model.unembedding import unembedding_of
from daemon.records import Positions
from tests.support import tiny


def loaded(
    model: Path,
    sae_folders: Sequence[Path],
    dtype: torch.dtype,
    device: str = "cpu",
    device_map: DeviceMap | None = None,
) -> tuple[LoadedModel, tuple[LoadedSae, ...]]:
    location = ModelLocation("tiny", str(model), None)
    hf = load_model(location, device=device, dtype=dtype, device_map=device_map)
    sources = [SaeSection(path=folder) for folder in sae_folders]
    sae_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    saes = load_saes(
        sources,
        d_model=hf.d_model,
        n_layers=hf.n_layers,
        device=device,
        dtype=sae_dtype,
        bos_habit=lambda: True,
    )
    if hf.placement is not None:
        move_saes(saes, hf.placement)
    return hf, saes


def padded(
    model: Path,
    saes: Sequence[Path],
    dtype: torch.dtype = torch.float64,
    positions: Positions = "last",
    device_map: DeviceMap | None = None,
) -> PaddedEngine:
    hf, entries = loaded(model, saes, dtype, device_map=device_map)
    return PaddedEngine(hf, entries, [encoder_of(entry) for entry in entries], positions)


def packed(
    model: Path,
    saes: Sequence[Path],
    dtype: torch.dtype = torch.float64,
    positions: Positions = "last",
    device: str = "cpu",
    compiles: bool = False,
    device_map: DeviceMap | None = None,
    log_probs: bool = False,
) -> TrieEngine:
    hf, entries = loaded(model, saes, dtype, device, device_map)
    engine = TrieEngine(
        hf,
        entries,
        [encoder_of(entry) for entry in entries],
        positions,
        compiles=compiles,
        unembedding=unembedding_of(hf.model) if log_probs else None,
    )
    engine.settle(hf)
    return engine


def random_texts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [[tiny.BOS, *torch.randint(0, 256, (n - 1,), generator=generator).tolist()] for n in lengths]


def dense(layer, d_sae: int = tiny.D_SAE) -> torch.Tensor:
    return layer.acts.to_dense(d_sae)
