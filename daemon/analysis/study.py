"""Everything that is said about a batch of samples, from the activations of its texts.

N = n samples x T texts positions, sample-major: row = sample * T + text. Knows nothing about models,
files or configuration; runs on whatever device its inputs are on, and hands back NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from daemon.analysis.drift import axis_twist, centroid_drift, cross_layer_consistency
from daemon.analysis.geometry import Geometry, geometry
from daemon.analysis.sparse import SparseActs
from daemon.analysis.spectrum import gini, l2_norm, top_k_entropy
from daemon.analysis.stability import Encode, noise_draws, stability
from daemon.columns import (
    CONTRAST_METRICS,
    SHAPE_CLASSES,
    Kind,
    analysis_columns,
    layer_column,
    token_count_column,
)
from daemon.records import Contrast, FeatureRows, FloatArray, LayerSums, Recipe


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """What one SAE gave at N positions."""

    layer: int
    x: Tensor  # (N, d_in) what the SAE read
    reconstruction: Tensor  # (N, d_in)
    acts: SparseActs  # of N positions
    W_dec: Tensor  # (d_sae, d_in)
    d_sae: int


@dataclass(frozen=True, slots=True)
class StudySettings:
    seed: int  # of the stability noise
    noise_sigma: float  # standard deviation, in units of x
    noise_draws: int  # per text, out of the noise bank
    stability_top_k: int  # features compared
    entropy_top_k: int  # features whose magnitudes are normalised


def analyse(
    *,
    layers: Sequence[LayerActivations],
    recipe: Recipe,
    sample_ids: Sequence[str],
    token_counts: Sequence[Sequence[int]],
    settings: StudySettings,
    encode_first: Encode,
    bank: Tensor,
) -> dict[str, npt.NDArray[np.generic]]:
    """Each of `daemon.columns.analysis_columns` as an (n,) array, in that order.

    `token_counts` is (n, T), of tokens fed to the model; `encode_first` is the first SAE's and `bank` its
    noise. Counts are int64, classes objects of type str, all else float64 with NaN where undefined. The
    contrast reads the first SAE, but for `cross_layer_consistency`: the last two, NaN with only one.
    """
    names = recipe.text_names
    shape = (len(sample_ids), len(names))
    counts = torch.tensor(token_counts, dtype=torch.float64, device=layers[0].x.device).view(shape)
    filled = {token_count_column(name): counts[:, text] for text, name in enumerate(names)}
    shapes = [geometry(layer.acts, layer.W_dec) for layer in layers]
    for layer, layer_shape in zip(layers, shapes, strict=True):
        for metric, values in layer_metrics(layer, layer_shape).items():
            by_text = values.view(shape)
            filled |= {
                layer_column(layer.layer, name, metric): by_text[:, text] for text, name in enumerate(names)
            }
    if recipe.contrast is not None:
        noise = Noise(encode_first, bank, sample_ids, settings)
        filled |= contrast_metrics(layers, shapes[0], names, recipe.contrast, noise)
    columns = analysis_columns([layer.layer for layer in layers], recipe)
    # one copy off the device; counts and classes are exact in float64
    host = torch.stack([filled[column.name].double() for column in columns]).cpu().numpy()
    return {column.name: _as_kind(values, column.kind) for column, values in zip(columns, host, strict=True)}


def layer_metrics(layer: LayerActivations, shape: Geometry) -> dict[str, Tensor]:
    """Each of `daemon.columns.LAYER_COLUMNS` at N positions; `relative_error` is NaN where x is zero."""
    acts = layer.acts
    x = layer.x.double()
    error = torch.linalg.vector_norm(x - layer.reconstruction.double(), dim=-1)
    return {
        "l0_norm": acts.counts,
        "l2_norm": l2_norm(acts.values),
        "reconstruction_error": error,
        "relative_error": torch.where(x.any(-1), error / torch.linalg.vector_norm(x, dim=-1), torch.nan),
        "gini": gini(acts.values, acts.counts),
        "sphericity": shape.sphericity,
        "elongation": shape.elongation,
        "shape_class": shape.shape_class,
        "dimensionality": shape.dimensionality,
        "eigenvalue_entropy": shape.eigenvalue_entropy,
        "misalignment": shape.misalignment,
    }


@dataclass(frozen=True, slots=True)
class Noise:
    """What the stability of a batch of samples needs besides x."""

    encode: Encode
    bank: Tensor
    sample_ids: Sequence[str]
    settings: StudySettings

    def stability(self, x: Tensor, text_name: str) -> tuple[Tensor, Tensor]:
        """x: (n, d_in), the residuals of one text of each sample -> mean and deviation (n,)."""
        settings = self.settings
        draws = [
            noise_draws(settings.seed, sample_id, text_name, settings.noise_draws)
            for sample_id in self.sample_ids
        ]
        rows = torch.from_numpy(np.stack(draws)).to(x.device)
        return stability(x, self.encode, self.bank, rows, settings.noise_sigma, settings.stability_top_k)


def contrast_metrics(
    layers: Sequence[LayerActivations],
    first_shape: Geometry,
    names: tuple[str, ...],
    contrast: Contrast,
    noise: Noise,
) -> dict[str, Tensor]:
    """The contrast columns (n,): each metric of the two texts, and their `_diff` with its sign."""
    first = layers[0]
    reference = _text_rows(names, contrast.reference, first.x)
    filled: dict[str, Tensor] = {}
    for name in (contrast.positive, contrast.negative):
        rows = _text_rows(names, name, first.x)
        centroid, axis = first_shape.centroid, first_shape.axis
        acts = first.acts.select(rows)
        mean, deviation = noise.stability(first.x[rows], name)
        filled |= {
            f"centroid_drift_{name}": centroid_drift(centroid[reference], centroid[rows]),
            f"axis_twist_{name}": axis_twist(axis[reference], axis[rows]),
            f"stability_{name}": mean,
            f"stability_{name}_std": deviation,
            f"entropy_{name}": top_k_entropy(acts.values, acts.counts, noise.settings.entropy_top_k),
            f"cross_layer_consistency_{name}": _last_layers_consistency(layers, rows),
        }
    for metric, sign in CONTRAST_METRICS:
        positive, negative = (filled[f"{metric}_{name}"] for name in (contrast.positive, contrast.negative))
        filled[f"{metric}_diff"] = negative - positive if sign > 0 else positive - negative
    return filled


def _last_layers_consistency(layers: Sequence[LayerActivations], rows: Tensor) -> Tensor:
    if len(layers) < 2:
        return torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)
    a, b = layers[-2:]
    return cross_layer_consistency(a.acts.select(rows), b.acts.select(rows), a.d_sae, b.d_sae)


def _text_rows(names: tuple[str, ...], name: str, x: Tensor) -> Tensor:
    """The rows (n,) of x (N, d_in) that hold one text of each sample."""
    return torch.arange(names.index(name), len(x), len(names), device=x.device)


def _as_kind(values: FloatArray, kind: Kind) -> npt.NDArray[np.generic]:
    if kind == "float":
        return values
    whole = values.astype(np.int64)
    return whole if kind == "int" else np.array(SHAPE_CLASSES, dtype=object)[whole]


def layer_sums(layer: LayerActivations, n_texts: int) -> LayerSums:
    """What FVU and mean L0 are made of, per sample of `n_texts` positions."""
    x = layer.x.double().reshape(-1, n_texts, layer.x.shape[1])  # (n, T, d_in)
    residual = layer.reconstruction.double().reshape(x.shape) - x
    n = len(x)
    return LayerSums(
        rows=np.full(n, n_texts, dtype=np.int64),
        l0=_host(layer.acts.counts.double().view(n, n_texts).sum(-1)),
        squared_error=_host(residual.square().sum((1, 2))),
        squared_norm=_host(x.square().sum((1, 2))),
        total=_host(x.sum(1)),
    )


def feature_rows(
    *,
    layers: Sequence[LayerActivations],
    n_texts: int,
    positions: Sequence[int],
    token_ids: Sequence[int],
) -> FeatureRows:
    """The sparse activations, rows ordered by sample, text and layer.

    `positions` and `token_ids` (N,) say which token of its text each row was read at.
    """
    n_layers = len(layers)
    position_rows = np.arange(len(positions))
    counts = np.stack([layer.acts.counts.cpu().numpy() for layer in layers], axis=1)  # (N, L)
    active = [layer.acts.active for layer in layers]
    indices = torch.cat([layer.acts.indices[kept] for layer, kept in zip(layers, active, strict=True)])
    values = torch.cat([layer.acts.values[kept] for layer, kept in zip(layers, active, strict=True)])
    # both lie layer by layer; a stable sort by owner keeps indices ascending within each row
    owners = (position_rows * n_layers + np.arange(n_layers)[:, None]).ravel()
    order = np.repeat(owners, counts.T.ravel()).argsort(kind="stable")
    return FeatureRows(
        sample_row=np.repeat(position_rows // n_texts, n_layers),
        text=np.repeat(position_rows % n_texts, n_layers),
        layer=np.tile(np.arange(n_layers), len(positions)),
        position=np.repeat(np.array(positions, dtype=np.int64), n_layers),
        token_id=np.repeat(np.array(token_ids, dtype=np.int64), n_layers),
        offsets=np.concatenate([[0], counts.ravel().cumsum()]),
        indices=indices.cpu().numpy().astype(np.uint32)[order],
        values=_host_values(values)[order],
    )


def _host(values: Tensor) -> FloatArray:
    array: FloatArray = values.double().cpu().numpy()
    return array


def _host_values(values: Tensor) -> npt.NDArray[np.float32] | FloatArray:
    """In float64 if they are; NumPy has no bfloat16, so all else becomes float32."""
    exact = values if values.dtype == torch.float64 else values.float()
    array: npt.NDArray[np.float32] | FloatArray = exact.cpu().numpy()
    return array
