"""The analysis columns of `metrics.parquet`: each is one registered function.

A function's name is its column's, and the order of the functions is the order of the file. What computes,
stores, verifies and prints columns reads them here. Function bodies import torch, not the module: names are
read without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from daemon.recipes import Contrast, Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from daemon.analysis.column_inputs import ComparedText, LayerActivations, TokenLogProbs
    from daemon.records import FloatArray

Kind = Literal["int", "float", "class"]

# Raise it when the meaning of a column or of a text changes, or how one is computed. It is part of a unit's
# identity, as names and types of columns are, so that content published under another one is computed again.
ANALYSIS_VERSION = 4


class Column(NamedTuple):
    """One column of the file."""

    name: str
    kind: Kind
    unit: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class LayerColumn:
    """A column of each SAE and text."""

    name: str
    kind: Kind
    unit: str
    meaning: str
    compute: Callable[[LayerActivations], Tensor]  # N positions -> (N,); a class as its number


@dataclass(frozen=True, slots=True)
class ContrastMetric:
    """A column of each of the two texts that a contrast compares, and one of their difference."""

    name: str
    unit: str
    meaning: str  # `{text}` stands for the text's name
    sign: Literal[1, -1]  # of the difference: 1 is negative - positive (hall - fact), -1 the reverse
    header: str  # in the terminal's table
    compute: Callable[[ComparedText], Tensor]  # n samples -> (n,)
    deviation: (
        Callable[[ComparedText], Tensor] | None
    )  # (n,) over draws of noise: another column of each text


@dataclass(frozen=True, slots=True)
class LogProbColumn:
    """A column of each text, and one of the difference of the two that a contrast compares.

    They are there where log-probabilities are asked for. The difference is negative - positive.
    """

    name: str
    unit: str
    meaning: str
    compute: Callable[[TokenLogProbs], FloatArray]  # N texts -> (N,), NaN where undefined


LAYER_COLUMNS: list[LayerColumn] = []
CONTRAST_METRICS: list[ContrastMetric] = []
LOG_PROB_COLUMNS: list[LogProbColumn] = []

LayerFunction = Callable[["LayerActivations"], "Tensor"]
ContrastFunction = Callable[["ComparedText"], "Tensor"]
LogProbFunction = Callable[["TokenLogProbs"], "FloatArray"]


def layer_column(kind: Kind, *, unit: str, meaning: str) -> Callable[[LayerFunction], LayerFunction]:
    """Register a function as the column `{SAE}_{text}_{its name}`."""

    def register(compute: LayerFunction) -> LayerFunction:
        LAYER_COLUMNS.append(LayerColumn(compute.__name__, kind, unit, meaning, compute))
        return compute

    return register


def contrast_metric(
    *,
    unit: str,
    meaning: str,
    sign: Literal[1, -1],
    header: str,
    deviation: ContrastFunction | None = None,
) -> Callable[[ContrastFunction], ContrastFunction]:
    """Register a function as the columns `{its name}_{text}` and `{its name}_diff`."""

    def register(compute: ContrastFunction) -> ContrastFunction:
        CONTRAST_METRICS.append(
            ContrastMetric(compute.__name__, unit, meaning, sign, header, compute, deviation)
        )
        return compute

    return register


def log_prob_column(*, unit: str, meaning: str) -> Callable[[LogProbFunction], LogProbFunction]:
    """Register a function as the columns `{its name}_{text}` and `{its name}_diff`."""

    def register(compute: LogProbFunction) -> LogProbFunction:
        LOG_PROB_COLUMNS.append(LogProbColumn(compute.__name__, unit, meaning, compute))
        return compute

    return register


@log_prob_column(unit="nat", meaning="mean log-probability of the counted tokens, each from those before it")
def mean_log_prob(tokens: TokenLogProbs) -> FloatArray:
    import numpy as np

    counts = tokens.counts
    sums = np.bincount(tokens.texts, weights=tokens.values, minlength=tokens.n_texts)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


@log_prob_column(unit="nat", meaning="log-probability of the last counted token, from those before it")
def last_log_prob(tokens: TokenLogProbs) -> FloatArray:
    import numpy as np

    last = np.full(tokens.n_texts, np.nan)
    last[tokens.texts] = tokens.values  # of several of one text the last one stays
    return last


@layer_column("int", unit="features", meaning="active features")
def l0_norm(layer: LayerActivations) -> Tensor:
    return layer.acts.counts


@layer_column("float", unit="activation", meaning="Euclidean norm of the activations")
def l2_norm(layer: LayerActivations) -> Tensor:
    from daemon.analysis import magnitudes

    return magnitudes.l2_norm(layer.acts.values)


@layer_column("float", unit="activation", meaning="largest activation, 0 where nothing fires")
def max_activation(layer: LayerActivations) -> Tensor:
    return layer.acts.values.amax(-1)  # zeros fill what is beyond the active features


@layer_column("float", unit="residual", meaning="||x - decode(f)||")
def reconstruction_error(layer: LayerActivations) -> Tensor:
    return layer.errors.absolute


@layer_column("float", unit="1", meaning="reconstruction error over ||x||")
def relative_error(layer: LayerActivations) -> Tensor:
    return layer.errors.relative


@layer_column("float", unit="1", meaning="Gini coefficient of the active magnitudes")
def gini(layer: LayerActivations) -> Tensor:
    from daemon.analysis import magnitudes

    return magnitudes.gini(layer.acts.values, layer.acts.counts)


@layer_column("float", unit="1", meaning="c/a of the inertia ellipsoid")
def sphericity(layer: LayerActivations) -> Tensor:
    return layer.shape.sphericity


@layer_column("float", unit="1", meaning="b/a of the inertia ellipsoid")
def elongation(layer: LayerActivations) -> Tensor:
    return layer.shape.elongation


@layer_column("class", unit="", meaning="None, Spherical, Oblate, Prolate or Triaxial")
def shape_class(layer: LayerActivations) -> Tensor:
    return layer.shape.shape_class


@layer_column("float", unit="1", meaning="participation ratio of the inertia eigenvalues")
def dimensionality(layer: LayerActivations) -> Tensor:
    return layer.shape.dimensionality


@layer_column("float", unit="nat", meaning="entropy of the normalised inertia eigenvalues")
def eigenvalue_entropy(layer: LayerActivations) -> Tensor:
    return layer.shape.eigenvalue_entropy


@layer_column("float", unit="degree", meaning="angle between centroid and principal axis")
def misalignment(layer: LayerActivations) -> Tensor:
    return layer.shape.misalignment


@contrast_metric(
    unit="degree",
    meaning="angle between the centroids of {text} and the reference",
    sign=1,
    header="drift °",
)
def centroid_drift(text: ComparedText) -> Tensor:
    from daemon.analysis.angles import vector_angle

    centroid = text.first.shape.centroid
    return vector_angle(centroid[text.reference_rows], centroid[text.rows])


@contrast_metric(
    unit="degree",
    meaning="angle between the principal axes of {text} and the reference",
    sign=1,
    header="twist °",
)
def axis_twist(text: ComparedText) -> Tensor:
    from daemon.analysis.angles import line_angle

    axis = text.first.shape.axis
    return line_angle(axis[text.reference_rows], axis[text.rows])


@contrast_metric(
    unit="1",
    meaning="mean Jaccard similarity of the top features of {text} under noise",
    sign=-1,
    header="stability",
    deviation=lambda text: text.stability.deviation,
)
def stability(text: ComparedText) -> Tensor:
    return text.stability.mean


@contrast_metric(unit="nat", meaning="entropy of the top magnitudes of {text}", sign=1, header="entropy")
def entropy(text: ComparedText) -> Tensor:
    from daemon.analysis import magnitudes

    acts = text.first.acts.select(text.rows)
    return magnitudes.top_k_entropy(acts.values, acts.counts, text.settings.entropy_top_k)


@contrast_metric(
    unit="1",
    meaning="cosine between the feature vectors of {text} at the last two layers' first SAEs",
    sign=-1,
    header="consistency",
)
def cross_layer_consistency(text: ComparedText) -> Tensor:
    from daemon.analysis.sparse import shared_cosine

    firsts = text.first_of_layers
    if len(firsts) < 2:
        return text.undefined
    a, b = firsts[-2:]
    ours, theirs = (one.acts.select(text.rows.to(one.acts.counts.device)) for one in (a, b))
    return shared_cosine(ours, theirs.to(ours.counts.device), min(a.d_sae, b.d_sae))


def token_count_name(text: str) -> str:
    return f"n_tokens_{text}"


def layer_column_name(sae: str, text: str, metric: str) -> str:
    return f"{sae}_{text}_{metric}"


def text_column_name(text: str, metric: str) -> str:
    return f"{metric}_{text}"


def analysis_columns(saes: Sequence[str], recipe: Recipe, *, log_probs: bool = False) -> tuple[Column, ...]:
    """Every column that the analysis fills, in the order of the file.

    `saes` are the SAEs' names. Contrast columns are there only where the recipe has a contrast, those of
    log-probabilities with `log_probs`.
    """
    columns = [
        Column(token_count_name(text), "int", "tokens", f"tokens of {text}, BOS included")
        for text in recipe.text_names
    ]
    of_tokens = LOG_PROB_COLUMNS if log_probs else []
    for text in recipe.text_names:
        columns += [
            Column(text_column_name(text, column.name), "float", column.unit, f"{text}: {column.meaning}")
            for column in of_tokens
        ]
    for sae in saes:
        for text in recipe.text_names:
            columns += [
                Column(
                    layer_column_name(sae, text, column.name),
                    column.kind,
                    column.unit,
                    f"SAE {sae}, {text}: {column.meaning}",
                )
                for column in LAYER_COLUMNS
            ]
    if recipe.contrast is not None:
        for metric in CONTRAST_METRICS:
            columns += contrast_columns(metric, recipe.contrast)
        columns += [log_prob_difference(column, recipe.contrast) for column in of_tokens]
    return tuple(columns)


def log_prob_difference(column: LogProbColumn, contrast: Contrast) -> Column:
    first, second = (text_column_name(text, column.name) for text in (contrast.negative, contrast.positive))
    return Column(text_column_name("diff", column.name), "float", column.unit, f"{first} - {second}")


def repeated_column(saes: Sequence[str], recipe: Recipe, *, log_probs: bool = False) -> str | None:
    """A name that two columns would have, which SQL takes for one if they differ by case alone."""
    columns = analysis_columns(saes, recipe, log_probs=log_probs)
    names = Counter(column.name.casefold() for column in columns)
    return next((name for name, times in names.items() if times > 1), None)


def contrast_columns(metric: ContrastMetric, contrast: Contrast) -> list[Column]:
    """The columns of one metric: of each text, and `_diff`."""
    columns = []
    for text in (contrast.positive, contrast.negative):
        name = f"{metric.name}_{text}"
        columns.append(Column(name, "float", metric.unit, metric.meaning.format(text=text)))
        if metric.deviation is not None:
            spread = f"standard deviation of {name} over draws"
            columns.append(Column(f"{name}_std", "float", metric.unit, spread))
    first, second = contrast.negative, contrast.positive
    if metric.sign < 0:
        first, second = second, first
    difference = f"{metric.name}_{first} - {metric.name}_{second}"
    return [*columns, Column(f"{metric.name}_diff", "float", metric.unit, difference)]
