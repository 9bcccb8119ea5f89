"""The oracle: every analysis column of one sample, computed plainly.

Sequential float64 NumPy on dense vectors, written to be read beside the definitions. It forms the
d_in x d_in tensor, loops over features and draws, and takes from `daemon.analysis` definitions only: the
settings and the noise. Knows nothing about batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from daemon.analysis.column_inputs import StudySettings
from daemon.analysis.columns import CONTRAST_METRICS, analysis_columns, layer_column_name, token_count_name
from daemon.analysis.stability import noise_bank, noise_draws
from daemon.recipes import Contrast, Recipe
from daemon.records import FloatArray

Value = float | int | str
EncodeArray = Callable[[FloatArray], FloatArray]  # (M, d_in) -> (M, d_sae)

ROUNDING_EIGENVALUE = 1e-12  # as a share of the largest: what is smaller counts as 0
ROUNDING_SQUARE = 1e-24  # as a share of the mean squared length of the decoder rows


@dataclass(frozen=True, slots=True)
class ReferenceLayer:
    """Values of one SAE for the texts of one sample, in the order of the recipe."""

    layer: int
    x: Sequence[FloatArray]  # per text (d_in,)
    target: Sequence[FloatArray]  # per text (d_out,)
    feature_acts: Sequence[FloatArray]  # per text (d_sae,), dense
    reconstruction: Sequence[FloatArray]  # per text (d_out,)
    W_dec: FloatArray  # (d_sae, d_out)


@dataclass(frozen=True, slots=True)
class Shape:
    """The geometry of one activation; `axis` is None where there is no shape."""

    centroid: FloatArray | None  # (d_in,), None where nothing fired or the rows cancel out
    axis: FloatArray | None  # (d_in,)
    sphericity: float = 0.0
    elongation: float = 0.0
    dimensionality: float = 0.0
    eigenvalue_entropy: float = 0.0
    misalignment: float = 0.0
    shape_class: str = "None"


def reference_columns(
    sample_id: str,
    recipe: Recipe,
    settings: StudySettings,
    saes: Sequence[str],
    layers: Sequence[ReferenceLayer],
    n_tokens: Sequence[int],
    encode_first: EncodeArray,
    log_probs: Sequence[FloatArray] | None = None,
) -> dict[str, Value]:
    """Each of `daemon.analysis.columns.analysis_columns`, in that order; NaN where undefined.

    `saes` names the SAE of each layer. `log_probs` are those of each text's tokens that count and have one.
    """
    names = recipe.text_names
    columns: dict[str, Value] = {}
    for name, tokens in zip(names, n_tokens, strict=True):
        columns[token_count_name(name)] = int(tokens)
    if log_probs is not None:
        columns |= log_prob_columns(names, recipe.contrast, log_probs)
    for sae, layer in zip(saes, layers, strict=True):
        for text, name in enumerate(names):
            for metric, value in text_metrics(layer, text).items():
                columns[layer_column_name(sae, name, metric)] = value
    if recipe.contrast is not None:
        columns |= contrast_columns(sample_id, names, recipe.contrast, settings, layers, encode_first)
    wanted = analysis_columns(saes, recipe, log_probs=log_probs is not None)
    return {column.name: columns[column.name] for column in wanted}


def log_prob_columns(
    names: Sequence[str], contrast: Contrast | None, log_probs: Sequence[FloatArray]
) -> dict[str, float]:
    """Mean and last of each text, and what the negative text's are above the positive one's."""
    columns: dict[str, float] = {}
    for name, values in zip(names, log_probs, strict=True):
        columns[f"mean_log_prob_{name}"] = sum(values.tolist()) / len(values) if len(values) else math.nan
        columns[f"last_log_prob_{name}"] = float(values[-1]) if len(values) else math.nan
    if contrast is not None:
        for metric in ("mean_log_prob", "last_log_prob"):
            negative, positive = (columns[f"{metric}_{t}"] for t in (contrast.negative, contrast.positive))
            columns[f"{metric}_diff"] = negative - positive
    return columns


def text_metrics(layer: ReferenceLayer, text: int) -> dict[str, Value]:
    """`daemon.analysis.columns.LAYER_COLUMNS` of one text at one SAE."""
    x = as_float64(layer.target[text])
    feature_acts = as_float64(layer.feature_acts[text])
    error = float(np.linalg.norm(x - as_float64(layer.reconstruction[text])))
    size = float(np.linalg.norm(x))
    shape = inertia(feature_acts, layer.W_dec)
    return {
        "l0_norm": len(active_features(feature_acts)),
        "l2_norm": math.sqrt(sum(float(feature_acts[i]) ** 2 for i in active_features(feature_acts))),
        "max_activation": float(np.max(feature_acts[active_features(feature_acts)], initial=0.0)),
        "reconstruction_error": error,
        "relative_error": error / size if size > 0 else math.nan,
        "gini": gini_coefficient(feature_acts),
        "sphericity": shape.sphericity,
        "elongation": shape.elongation,
        "shape_class": shape.shape_class,
        "dimensionality": shape.dimensionality,
        "eigenvalue_entropy": shape.eigenvalue_entropy,
        "misalignment": shape.misalignment,
    }


def contrast_columns(
    sample_id: str,
    names: Sequence[str],
    contrast: Contrast,
    settings: StudySettings,
    layers: Sequence[ReferenceLayer],
    encode_first: EncodeArray,
) -> dict[str, Value]:
    """Every contrast column; the first SAE is read, but for the consistency of the last two layers."""
    first = layers[0]
    numbers = sorted({layer.layer for layer in layers})
    last_two = [next(layer for layer in layers if layer.layer == number) for number in numbers[-2:]]
    reference = inertia(as_float64(first.feature_acts[names.index(contrast.reference)]), first.W_dec)
    columns: dict[str, float] = {}
    for name in (contrast.positive, contrast.negative):
        text = names.index(name)
        feature_acts = as_float64(first.feature_acts[text])
        shape = inertia(feature_acts, first.W_dec)
        columns[f"centroid_drift_{name}"] = angle(reference.centroid, shape.centroid)
        columns[f"axis_twist_{name}"] = angle_of_lines(reference.axis, shape.axis)
        similarities = noise_similarities(as_float64(first.x[text]), sample_id, name, settings, encode_first)
        columns[f"stability_{name}"] = float(np.mean(similarities))
        columns[f"stability_{name}_std"] = float(np.std(similarities))
        columns[f"entropy_{name}"] = entropy_of_largest(feature_acts, settings.entropy_top_k)
        columns[f"cross_layer_consistency_{name}"] = (
            consistency(*(as_float64(layer.feature_acts[text]) for layer in last_two))
            if len(last_two) > 1
            else math.nan
        )
    for metric in CONTRAST_METRICS:
        positive, negative = (columns[f"{metric.name}_{t}"] for t in (contrast.positive, contrast.negative))
        columns[f"{metric.name}_diff"] = metric.sign * (negative - positive)
    return {**columns}


def active_features(feature_acts: FloatArray) -> list[int]:
    return [i for i, value in enumerate(feature_acts) if value > 0]


def gini_coefficient(feature_acts: FloatArray) -> float:
    """Half the mean absolute difference of two magnitudes, relative to their mean."""
    magnitudes = feature_acts[active_features(feature_acts)]
    if len(magnitudes) == 0:
        return 0.0
    differences = np.abs(magnitudes[:, None] - magnitudes[None, :])
    return float(differences.mean() / (2 * magnitudes.mean()))


def entropy_of_largest(feature_acts: FloatArray, top_k: int) -> float:
    """Nats."""
    largest = sorted((float(feature_acts[i]) for i in active_features(feature_acts)), reverse=True)[:top_k]
    total = sum(largest)
    return -sum(m / total * math.log(m / total) for m in largest)


def inertia(feature_acts: FloatArray, W_dec: FloatArray) -> Shape:
    """The inertia tensor of the active decoder rows, weighted by their activations."""
    active = active_features(feature_acts)
    if not active:
        return Shape(centroid=None, axis=None)
    weights = feature_acts[active] / feature_acts[active].sum()
    rows = as_float64(W_dec[active])
    d_in = rows.shape[1]
    mean_square = sum(w * float(row @ row) for w, row in zip(weights, rows, strict=True))

    centroid = np.zeros(d_in)
    for w, row in zip(weights, rows, strict=True):
        centroid += w * row
    tensor = np.zeros((d_in, d_in))
    for w, row in zip(weights, rows, strict=True):
        tensor += w * np.outer(row - centroid, row - centroid)

    has_centroid = float(centroid @ centroid) > ROUNDING_SQUARE * mean_square
    ascending, vectors = np.linalg.eigh(tensor)
    eigenvalues = [float(value) for value in ascending[::-1]] + [0.0, 0.0]
    largest = eigenvalues[0]
    if len(active) == 1 or largest <= ROUNDING_SQUARE * mean_square:
        return Shape(centroid=centroid if has_centroid else None, axis=None)
    for k in range(len(eigenvalues)):
        if k + 1 >= len(active) or eigenvalues[k] <= ROUNDING_EIGENVALUE * largest:
            eigenvalues[k] = 0.0

    total = sum(eigenvalues)
    axis = vectors[:, -1]
    elongation = math.sqrt(eigenvalues[1] / largest)
    sphericity = math.sqrt(eigenvalues[2] / largest)
    return Shape(
        centroid=centroid if has_centroid else None,
        axis=axis,
        sphericity=sphericity,
        elongation=elongation,
        dimensionality=total**2 / sum(value**2 for value in eigenvalues),
        eigenvalue_entropy=-sum(v / total * math.log(v / total) for v in eigenvalues if v > 0),
        misalignment=angle_of_lines(centroid if has_centroid else None, axis),
        shape_class=shape_class(elongation, sphericity),
    )


def shape_class(elongation: float, sphericity: float) -> str:
    if elongation > 0.9 and sphericity > 0.9:
        return "Spherical"
    if elongation > 0.8 and sphericity < 0.6:
        return "Oblate"
    if elongation < 0.6 and sphericity < 0.6:
        return "Prolate"
    return "Triaxial"


def angle(a: FloatArray | None, b: FloatArray | None) -> float:
    """Degrees, 0..180, from the parts of b along a and across it; NaN where either is undefined."""
    if a is None or b is None:
        return math.nan
    along = a / np.linalg.norm(a)
    component = float(along @ b)
    across = float(np.linalg.norm(b - component * along))
    return math.degrees(math.atan2(across, component))


def angle_of_lines(a: FloatArray | None, b: FloatArray | None) -> float:
    """Degrees, 0..90: a direction and its opposite are one line."""
    between = angle(a, b)
    return min(between, 180.0 - between)


def consistency(a: FloatArray, b: FloatArray) -> float:
    """Cosine over the entries that both dictionaries have, aligned by number alone."""
    shared = min(len(a), len(b))
    left, right = np.where(a[:shared] > 0, a[:shared], 0), np.where(b[:shared] > 0, b[:shared], 0)
    if not left.any() or not right.any():
        return math.nan
    return float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))


def noise_similarities(
    x: FloatArray, sample_id: str, text_name: str, settings: StudySettings, encode_first: EncodeArray
) -> list[float]:
    """The Jaccard similarity of the strongest features with and without noise, for each draw."""
    bank = noise_bank(settings.seed, len(x), torch.float64).numpy()
    draws = noise_draws(settings.seed, sample_id, text_name, settings.noise_draws)
    clean = strongest(encode_first(x[None])[0], settings.stability_top_k)
    similarities = []
    for row in draws:
        noisy_x = x + settings.noise_sigma * bank[row]
        noisy = strongest(encode_first(noisy_x[None])[0], settings.stability_top_k)
        either = clean | noisy
        similarities.append(len(clean & noisy) / len(either) if either else 1.0)
    return similarities


def strongest(feature_acts: FloatArray, top_k: int) -> set[int]:
    """The features of the `top_k` largest activations; of equals, those of lower index."""
    return set(sorted(active_features(feature_acts), key=lambda i: (-feature_acts[i], i))[:top_k])


def as_float64(values: FloatArray) -> FloatArray:
    return np.asarray(values, dtype=np.float64)
