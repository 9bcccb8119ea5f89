"""Computes every analysis column of a batch of samples from the activations of its texts.

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

from daemon.analysis.columns import (
    CONTRAST_METRICS,
    SHAPE_CLASSES,
    Kind,
    analysis_columns,
    layer_column,
    token_count_column,
)
from daemon.analysis.drift import axis_twist, centroid_drift, cross_layer_consistency
from daemon.analysis.geometry import DecoderRows, Geometry, geometry
from daemon.analysis.host import to_host
from daemon.analysis.magnitudes import gini, l2_norm, top_k_entropy
from daemon.analysis.sparse import SparseActs
from daemon.analysis.stability import Noise, noise_draws, stability
from daemon.recipes import Contrast, Recipe
from daemon.records import FloatArray, LayerSums, Positions


@dataclass(frozen=True, slots=True)
class LayerActivations:
    """One SAE's activations at N positions, and their reconstruction."""

    layer: int
    x: Tensor | None  # (N, d_in) what the SAE read; None where features are the maximum of several readings
    target: Tensor | None  # (N, d_out) what the reconstruction is to equal: x, but of a transcoder
    reconstruction: Tensor | None  # (N, d_out)
    acts: SparseActs  # of N positions
    decoder: DecoderRows
    d_sae: int


@dataclass(frozen=True, slots=True)
class StudySettings:
    seed: int  # of the stability noise
    noise_sigma: float  # standard deviation, in units of x
    noise_draws: int  # per text, out of the noise bank
    stability_top_k: int  # features compared
    entropy_top_k: int  # features whose magnitudes are normalised
    positions: Positions = "last"


def analyse(
    *,
    layers: Sequence[LayerActivations],
    recipe: Recipe,
    sample_ids: Sequence[str],
    token_counts: Sequence[Sequence[int]],
    settings: StudySettings,
    noise: Noise | None,
) -> dict[str, npt.NDArray[np.generic]]:
    """Each of `daemon.analysis.columns.analysis_columns` as an (n,) array, in that order.

    `token_counts` is (n, T), of tokens fed to the model. Counts are int64, classes objects of type str, all
    else float64, never infinite, with NaN where undefined. The contrast reads the first SAE, but for
    `cross_layer_consistency`: the last two, NaN with only one. Without `noise` stability is undefined.
    """
    names = recipe.text_names
    shape = (len(sample_ids), len(names))
    counts = torch.tensor(token_counts, dtype=torch.float64, device=layers[0].acts.counts.device).view(shape)
    filled = {token_count_column(name): counts[:, text] for text, name in enumerate(names)}
    shapes = [geometry(layer.acts, layer.decoder) for layer in layers]
    for layer, layer_shape in zip(layers, shapes, strict=True):
        for metric, values in layer_metrics(layer, layer_shape).items():
            by_text = values.view(shape)
            filled |= {
                layer_column(layer.layer, name, metric): by_text[:, text] for text, name in enumerate(names)
            }
    if recipe.contrast is not None:
        filled |= contrast_metrics(
            layers, shapes[0], names, recipe.contrast, Perturbation(noise, sample_ids, settings)
        )
    columns = analysis_columns([layer.layer for layer in layers], recipe)
    # one copy off the device; counts and classes are exact in float64
    host = _host(torch.stack([filled[column.name].double() for column in columns]))
    return {column.name: _as_kind(values, column.kind) for column, values in zip(columns, host, strict=True)}


def layer_metrics(layer: LayerActivations, shape: Geometry) -> dict[str, Tensor]:
    """Each of `daemon.analysis.columns.LAYER_COLUMNS` at N positions."""
    acts = layer.acts
    error, relative_error = errors(layer)
    return {
        "l0_norm": acts.counts,
        "l2_norm": l2_norm(acts.values),
        "reconstruction_error": error,
        "relative_error": relative_error,
        "gini": gini(acts.values, acts.counts),
        "sphericity": shape.sphericity,
        "elongation": shape.elongation,
        "shape_class": shape.shape_class,
        "dimensionality": shape.dimensionality,
        "eigenvalue_entropy": shape.eigenvalue_entropy,
        "misalignment": shape.misalignment,
    }


def errors(layer: LayerActivations) -> tuple[Tensor, Tensor]:
    """||x - decode(f)|| (N,), and that over ||x||; NaN where there is no x, the second where x is zero.

    Here x is the target of the reconstruction.
    """
    if layer.target is None or layer.reconstruction is None:
        undefined = _undefined(layer.acts.counts)
        return undefined, undefined
    x = layer.target.double()
    error = torch.linalg.vector_norm(x - layer.reconstruction.double(), dim=-1)
    return error, torch.where(x.any(-1), error / torch.linalg.vector_norm(x, dim=-1), torch.nan)


@dataclass(frozen=True, slots=True)
class Perturbation:
    """The noise and settings by which a batch's stability is measured."""

    noise: Noise | None
    sample_ids: Sequence[str]
    settings: StudySettings

    def stability(self, x: Tensor | None, rows: Tensor, text_name: str) -> tuple[Tensor, Tensor]:
        """Mean and deviation (n,) for the rows of x (N, d_in) that hold one text of each sample."""
        if self.noise is None or x is None:
            return _undefined(rows), _undefined(rows)
        settings = self.settings
        draws = [
            noise_draws(settings.seed, sample_id, text_name, settings.noise_draws)
            for sample_id in self.sample_ids
        ]
        drawn = torch.from_numpy(np.stack(draws)).to(x.device)
        return stability(self.noise, x[rows], drawn, settings.stability_top_k)


def contrast_metrics(
    layers: Sequence[LayerActivations],
    first_shape: Geometry,
    names: tuple[str, ...],
    contrast: Contrast,
    perturbation: Perturbation,
) -> dict[str, Tensor]:
    """The contrast columns (n,): each metric of the two texts, and their `_diff` with its sign."""
    first = layers[0]
    reference = _text_rows(names, contrast.reference, first.acts.counts)
    filled: dict[str, Tensor] = {}
    for name in (contrast.positive, contrast.negative):
        rows = _text_rows(names, name, first.acts.counts)
        centroid, axis = first_shape.centroid, first_shape.axis
        acts = first.acts.select(rows)
        mean, deviation = perturbation.stability(first.x, rows, name)
        filled |= {
            f"centroid_drift_{name}": centroid_drift(centroid[reference], centroid[rows]),
            f"axis_twist_{name}": axis_twist(axis[reference], axis[rows]),
            f"stability_{name}": mean,
            f"stability_{name}_std": deviation,
            f"entropy_{name}": top_k_entropy(acts.values, acts.counts, perturbation.settings.entropy_top_k),
            f"cross_layer_consistency_{name}": _last_layers_consistency(layers, rows),
        }
    for metric, sign in CONTRAST_METRICS:
        positive, negative = (filled[f"{metric}_{name}"] for name in (contrast.positive, contrast.negative))
        filled[f"{metric}_diff"] = negative - positive if sign > 0 else positive - negative
    return filled


def _last_layers_consistency(layers: Sequence[LayerActivations], rows: Tensor) -> Tensor:
    if len(layers) < 2:
        return _undefined(rows)
    a, b = layers[-2:]
    return cross_layer_consistency(a.acts.select(rows), b.acts.select(rows), a.d_sae, b.d_sae)


def _text_rows(names: tuple[str, ...], name: str, readings: Tensor) -> Tensor:
    """The rows (n,) of N that hold one text of each sample."""
    return torch.arange(names.index(name), len(readings), len(names), device=readings.device)


def _undefined(rows: Tensor) -> Tensor:
    return torch.full(rows.shape, torch.nan, dtype=torch.float64, device=rows.device)


def _as_kind(values: FloatArray, kind: Kind) -> npt.NDArray[np.generic]:
    if kind == "float":
        return np.where(np.isfinite(values), values, np.nan)
    whole = values.astype(np.int64)
    return whole if kind == "int" else np.array(SHAPE_CLASSES, dtype=object)[whole]


def layer_sums(layer: LayerActivations, n_texts: int) -> LayerSums:
    """The sums behind FVU and mean L0, per sample of `n_texts` rows; zeros for FVU without x."""
    l0 = layer.acts.counts.double().view(-1, n_texts).sum(-1)
    n = len(l0)
    if layer.target is None or layer.reconstruction is None:
        nothing = np.zeros(n)
        squared_error, squared_norm, total = nothing, nothing, np.zeros((n, layer.decoder.W_dec.shape[1]))
    else:
        x = layer.target.double().reshape(n, n_texts, -1)  # (n, T, d_out)
        residual = layer.reconstruction.double().reshape(x.shape) - x
        squared_error = _host(residual.square().sum((1, 2)))
        squared_norm = _host(x.square().sum((1, 2)))
        total = _host(x.sum(1))
    return LayerSums(
        rows=np.full(n, n_texts, dtype=np.int64),
        l0=_host(l0),
        squared_error=squared_error,
        squared_norm=squared_norm,
        total=total,
    )


def _host(values: Tensor) -> FloatArray:
    array: FloatArray = to_host(values.double()).numpy()
    return array
