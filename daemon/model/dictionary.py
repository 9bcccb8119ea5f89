"""A dictionary's tensors and the few settings by which it encodes, under the names that SAELens has for them.

Stands in the place of SAELens's own object where a stamp vouches for the dictionary. Reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from daemon.model_info import Fit

WEIGHTS_NAME = "sae_weights.safetensors"
HOOK_NAME = re.compile(r"blocks\.(\d+)\.\S+")
TENSORS = ("W_enc", "W_dec", "b_dec", "b_enc", "threshold", "b_gate", "b_mag", "r_mag", "W_skip")


class SaeSource(Protocol):
    """Where a dictionary comes from; `daemon.config.SaeSection` is one."""

    @property
    def release(self) -> str | None: ...
    @property
    def id(self) -> str | None: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def name(self) -> str | None: ...  # that it is given
    @property
    def prepend_bos(self) -> bool | None: ...  # in place of what its metadata says
    @property
    def revision(self) -> str | None: ...


def name_of(source: SaeSource) -> str:
    """As messages name it."""
    return source.path.name if source.path is not None else f"{source.release}/{source.id}"


@dataclass(frozen=True, slots=True)
class Facts:
    """All that SAELens and its registry say of a dictionary. A stamp holds it."""

    hook_name: str
    hook_name_out: str
    d_in: int
    d_sae: int
    d_out: int
    architecture: str
    weights_sha256: str
    settings_sha256: str
    prepend_bos: bool | None  # as its metadata says
    neuronpedia_id: str | None
    center_residual: bool
    reconstructs: bool
    card: Fit


@dataclass(frozen=True, slots=True)
class Metadata:
    """The part of a dictionary's metadata that is read after loading."""

    model_name: str


@dataclass(frozen=True, slots=True)
class Settings:
    """The part of a dictionary's configuration by which it encodes."""

    normalize_activations: str
    apply_b_dec_to_input: bool
    rescale_acts_by_decoder_norm: bool
    k: int | None  # of topk
    metadata: Metadata

    @classmethod
    def of(cls, cfg: Any) -> Settings:
        """Those of SAELens's configuration."""
        return cls(
            normalize_activations=str(cfg.normalize_activations or "none"),
            apply_b_dec_to_input=bool(cfg.apply_b_dec_to_input),
            rescale_acts_by_decoder_norm=bool(getattr(cfg, "rescale_acts_by_decoder_norm", False)),
            k=getattr(cfg, "k", None),
            metadata=Metadata(str(cfg.metadata.model_name or "")),
        )


class Dictionary:
    """Tensors that an architecture does not have are None."""

    W_enc: Tensor  # (d_in, d_sae)
    W_dec: Tensor  # (d_sae, d_out)
    b_dec: Tensor  # (d_out,)

    def __init__(self, cfg: Settings, tensors: Mapping[str, Tensor]) -> None:
        self.cfg = cfg
        for name in TENSORS:
            setattr(self, name, tensors.get(name))

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def to(self, device: str | torch.device) -> Dictionary:
        for name in TENSORS:
            if (tensor := getattr(self, name)) is not None:
                tensor.data = tensor.data.to(device)
        return self
