"""Computes every analysis column of a batch of samples from the activations of its texts.

N = n samples x T texts positions, sample-major: row = sample * T + text. Knows nothing about models,
files or configuration; runs on whatever device its inputs are on, and hands back NumPy arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from daemon.analysis.column_inputs import ComparedText, LayerActivations, StudySettings, TokenLogProbs
from daemon.analysis.columns import (
    CONTRAST_METRICS,
    LAYER_COLUMNS,
    LOG_PROB_COLUMNS,
    Kind,
    analysis_columns,
    layer_column_name,
    text_column_name,
    token_count_name,
)
from daemon.analysis.geometry import SHAPE_CLASSES
from daemon.analysis.stability import Noise
from daemon.devices import to_numpy
from daemon.recipes import Recipe
from daemon.records import FloatArray, LayerSums


def analyse(
    *,
    layers: Sequence[LayerActivations],
    recipe: Recipe,
    sample_ids: Sequence[str],
    token_counts: Sequence[Sequence[int]],
    settings: StudySettings,
    noise: Noise | None,
    log_probs: TokenLogProbs | None = None,
) -> dict[str, npt.NDArray[np.generic]]:
    """Each of `daemon.analysis.columns.analysis_columns` as an (n,) array, in that order.

    `token_counts` is (n, T), of tokens fed to the model. Counts are int64, classes objects of type str, all
    else float64, never infinite, with NaN where undefined. The contrast reads the first SAE, but for
    `cross_layer_consistency`: the first of each of the last two layers that have some, NaN with one layer.
    Without `noise` stability is undefined; without `log_probs`, of N texts, it has no columns of them.
    """
    names = recipe.text_names
    shape = (len(sample_ids), len(names))
    counts = torch.tensor(token_counts, dtype=torch.float64, device=layers[0].acts.counts.device).view(shape)
    filled = {token_count_name(name): counts[:, text] for text, name in enumerate(names)}
    for layer in layers:
        for column in LAYER_COLUMNS:
            by_text = column.compute(layer).view(shape)
            for text, name in enumerate(names):
                filled[layer_column_name(layer.name, name, column.name)] = by_text[:, text]
    if recipe.contrast is not None:
        reference = _text_rows(recipe.contrast.reference, names, counts)
        positive, negative = (
            ComparedText(
                name, layers, _text_rows(name, names, counts), reference, sample_ids, settings, noise
            )
            for name in (recipe.contrast.positive, recipe.contrast.negative)
        )
        filled |= contrast_values(positive, negative)
    of_tokens = {} if log_probs is None else log_prob_values(log_probs, recipe)
    filled |= {name: torch.from_numpy(values) for name, values in of_tokens.items()}
    columns = analysis_columns([layer.name for layer in layers], recipe, log_probs=log_probs is not None)
    host = _on_host({column.name: filled[column.name] for column in columns})
    return {column.name: _as_kind(host[column.name], column.kind) for column in columns}


def contrast_values(positive: ComparedText, negative: ComparedText) -> dict[str, Tensor]:
    """The contrast columns (n,): each metric of the two texts, and their `_diff` with its sign."""
    filled: dict[str, Tensor] = {}
    for metric in CONTRAST_METRICS:
        for text in (positive, negative):
            filled[f"{metric.name}_{text.name}"] = metric.compute(text)
            if metric.deviation is not None:
                filled[f"{metric.name}_{text.name}_std"] = metric.deviation(text)
        first, second = (negative, positive) if metric.sign > 0 else (positive, negative)
        filled[f"{metric.name}_diff"] = (
            filled[f"{metric.name}_{first.name}"] - filled[f"{metric.name}_{second.name}"]
        )
    return filled


def log_prob_values(tokens: TokenLogProbs, recipe: Recipe) -> dict[str, FloatArray]:
    """The columns of log-probabilities (n,): of each text, and with a contrast negative - positive."""
    filled: dict[str, FloatArray] = {}
    for column in LOG_PROB_COLUMNS:
        by_text = column.compute(tokens).reshape(-1, len(recipe.text_names))
        values = {name: by_text[:, text] for text, name in enumerate(recipe.text_names)}
        filled |= {text_column_name(name, column.name): of_text for name, of_text in values.items()}
        if recipe.contrast is not None:
            difference = values[recipe.contrast.negative] - values[recipe.contrast.positive]
            filled[text_column_name("diff", column.name)] = difference
    return filled


def _text_rows(name: str, names: tuple[str, ...], counts: Tensor) -> Tensor:
    """The rows (n,) of N that hold one text of each sample; `counts` is (n, T)."""
    return torch.arange(names.index(name), counts.numel(), len(names), device=counts.device)


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
        squared_error = to_numpy(residual.square().sum((1, 2)))
        squared_norm = to_numpy(x.square().sum((1, 2)))
        total = to_numpy(x.sum(1))
    return LayerSums(
        rows=np.full(n, n_texts, dtype=np.int64),
        l0=to_numpy(l0),
        squared_error=squared_error,
        squared_norm=squared_norm,
        total=total,
    )


def _on_host(columns: dict[str, Tensor]) -> dict[str, FloatArray]:
    """Columns (n,) of one device or several, in float64, in which counts and classes are exact."""
    by_device: dict[torch.device, list[str]] = {}
    for name, values in columns.items():
        by_device.setdefault(values.device, []).append(name)
    host: dict[str, FloatArray] = {}
    for names in by_device.values():  # one copy off each device
        host |= zip(names, to_numpy(torch.stack([columns[name].double() for name in names])), strict=True)
    return host
