"""Names, types and order of the analysis columns of `metrics.parquet`.

One place that the analysis (which fills them), the schema (which stores them), `lensd verify` and the
tests share. Knows nothing about how a value is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from daemon.recipes import Recipe

Kind = Literal["int", "float", "class"]

# Raised when the meaning of a column or of a text changes. It is part of a unit's identity, so that content
# published under an older one is computed again. 1: before the number was recorded. 2: the space that the
# built-in contrast recipe puts, one BOS token for texts that bring theirs, no numbers of what is not finite.
ANALYSIS_VERSION = 2


class Column(NamedTuple):
    name: str
    kind: Kind


LAYER_COLUMNS: tuple[Column, ...] = (
    Column("l0_norm", "int"),
    Column("l2_norm", "float"),
    Column("reconstruction_error", "float"),
    Column("relative_error", "float"),
    Column("gini", "float"),
    Column("sphericity", "float"),
    Column("elongation", "float"),
    Column("shape_class", "class"),
    Column("dimensionality", "float"),
    Column("eigenvalue_entropy", "float"),
    Column("misalignment", "float"),
)
SHAPE_CLASSES = ("None", "Spherical", "Oblate", "Prolate", "Triaxial")

# Contrast metrics with the sign of `_diff`: +1 is negative - positive (hall - fact), -1 the reverse.
CONTRAST_METRICS: tuple[tuple[str, int], ...] = (
    ("centroid_drift", 1),
    ("axis_twist", 1),
    ("stability", -1),
    ("entropy", 1),
    ("cross_layer_consistency", -1),
)


def token_count_column(text: str) -> str:
    return f"n_tokens_{text}"


def layer_column(layer: int, text: str, metric: str) -> str:
    return f"l{layer}_{text}_{metric}"


def analysis_columns(layers: Sequence[int], recipe: Recipe) -> tuple[Column, ...]:
    """Every column that the analysis fills, in the order of the file.

    `layers` are the SAEs' layer numbers. Contrast columns are there only where the recipe has a contrast.
    """
    columns = [Column(token_count_column(text), "int") for text in recipe.text_names]
    for layer in layers:
        for text in recipe.text_names:
            columns += [Column(layer_column(layer, text, metric), kind) for metric, kind in LAYER_COLUMNS]
    contrast = recipe.contrast
    if contrast is not None:
        for metric, _ in CONTRAST_METRICS:
            for text in (contrast.positive, contrast.negative):
                columns.append(Column(f"{metric}_{text}", "float"))
                if metric == "stability":
                    columns.append(Column(f"{metric}_{text}_std", "float"))
            columns.append(Column(f"{metric}_diff", "float"))
    return tuple(columns)
