"""Folds what normalised a dictionary's activations in training into its weights. Knows no model.

SAELens writes these numbers beside the weights of a checkpoint, and leaves them out when it loads one.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from daemon.errors import ConfigError
from daemon.model.completeness import check_finite
from daemon.model.saeformat import TRANSCODERS
from daemon.model.weightfiles import read_object

FACTOR_NAME = "activation_scaler.json"
WHITENING_NAME = "activation_whitening.safetensors"


def fold_normalisation(sae: Any, folder: Path, what: str) -> bool:
    """Make a loaded dictionary read the model's values as they are; False where nothing beside it says how.

    Of transcoders the files do not say how the values that they predict were scaled. Raises ConfigError for
    numbers that can't be used.
    """
    mode = sae.cfg.normalize_activations
    if sae.cfg.architecture() in TRANSCODERS:
        return False
    if mode == "expected_average_only_in" and (folder / FACTOR_NAME).is_file():
        factor = read_object(folder / FACTOR_NAME, what).get("scaling_factor")
        if factor is None:  # folded, or never estimated
            return False
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
            raise ConfigError(
                f"{what}: scaling_factor = {str(factor)[:60]} in its {FACTOR_NAME}: expected a number above 0"
            )
        sae.fold_activation_norm_scaling_factor(float(factor))
        return True
    if mode == "covariance_whitening" and (folder / WHITENING_NAME).is_file():
        sae.fold_activation_whitening(**whitening(folder / WHITENING_NAME, int(sae.cfg.d_in), what))
        return True
    return False


def whitening(path: Path, d_in: int, what: str) -> dict[str, torch.Tensor]:
    """The arguments of SAELens's `fold_activation_whitening`. Raises ConfigError."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    shapes = {"mean": (d_in,), "matrix": (d_in, d_in), "inverse_matrix": (d_in, d_in)}
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != shapes:
        raise ConfigError(
            f"{what}: {path.name} is not the whitening of {d_in} values: use the one saved with the weights"
        )
    check_finite(f"{what}: {path.name}", tensors.items())
    names = {"mean": "mean", "matrix": "whitening_matrix", "inverse_matrix": "unwhitening_matrix"}
    return {names[name]: tensor for name, tensor in tensors.items()}
