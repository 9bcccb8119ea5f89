"""The columns of both Parquet files and how they are encoded on disk.

Types and encodings are those that every reader of the last years knows: plain values and dictionaries under
Zstandard. What that costs in bytes is in `daemon/README.md`. Every field carries its unit and meaning as
metadata, which only files of a few rows do without. Knows nothing about samples and results.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import pyarrow as pa

from daemon.analysis.columns import (
    CONTRAST_METRICS,
    Column,
    Kind,
    analysis_columns,
    layer_column,
    token_count_column,
)
from daemon.recipes import Recipe

ValueType = Literal["float32", "float16"]

KIND_TYPES: dict[Kind, pa.DataType] = {"int": pa.int32(), "float": pa.float64(), "class": pa.string()}

# What a column means: (unit, description).
Meaning = tuple[str, str]

LAYER_MEANINGS: dict[str, Meaning] = {
    "l0_norm": ("features", "active features"),
    "l2_norm": ("activation", "Euclidean norm of the activations"),
    "reconstruction_error": ("residual", "||x - decode(f)||"),
    "relative_error": ("1", "reconstruction error over ||x||"),
    "gini": ("1", "Gini coefficient of the active magnitudes"),
    "sphericity": ("1", "c/a of the inertia ellipsoid"),
    "elongation": ("1", "b/a of the inertia ellipsoid"),
    "shape_class": ("", "None, Spherical, Oblate, Prolate or Triaxial"),
    "dimensionality": ("1", "participation ratio of the inertia eigenvalues"),
    "eigenvalue_entropy": ("nat", "entropy of the normalised inertia eigenvalues"),
    "misalignment": ("degree", "angle between centroid and principal axis"),
}
CONTRAST_MEANINGS: dict[str, Meaning] = {
    "centroid_drift": ("degree", "angle between the centroids of {text} and the reference"),
    "axis_twist": ("degree", "angle between the principal axes of {text} and the reference"),
    "stability": ("1", "mean Jaccard similarity of the top features of {text} under noise"),
    "entropy": ("nat", "entropy of the top magnitudes of {text}"),
    "cross_layer_consistency": ("1", "cosine between the feature vectors of {text} at the last two SAEs"),
}


def described(name: str, kind: pa.DataType, meaning: Meaning, *, nullable: bool = False) -> pa.Field:
    unit, description = meaning
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


SAMPLE_FIELDS: tuple[pa.Field, ...] = (
    described("sample_id", pa.string(), ("", "the record's id")),
    described("record_index", pa.int64(), ("", "0-based position in the input, rejects counted")),
    described("domain", pa.string(), ("", "the record's domain"), nullable=True),
    described("complexity", pa.float64(), ("", "the record's complexity"), nullable=True),
    described("extra", pa.string(), ("", "JSON object of the record's other fields"), nullable=True),
)


@functools.lru_cache(maxsize=64)
def metrics_schema(layers: tuple[int, ...], recipe: Recipe) -> pa.Schema:
    """Columns of `metrics.parquet`; `layers` are the SAEs' layer numbers. An undefined float is null."""
    meanings = column_meanings(layers, recipe)
    return pa.schema(
        [
            *SAMPLE_FIELDS,
            *(analysis_field(column, meanings[column.name]) for column in analysis_columns(layers, recipe)),
        ]
    )


def analysis_field(column: Column, meaning: Meaning) -> pa.Field:
    return described(column.name, KIND_TYPES[column.kind], meaning, nullable=column.kind == "float")


def column_meanings(layers: Sequence[int], recipe: Recipe) -> dict[str, Meaning]:
    """The meaning of each analysis column."""
    meanings = {
        token_count_column(text): ("tokens", f"tokens of {text}, BOS included") for text in recipe.text_names
    }
    for layer in layers:
        for text in recipe.text_names:
            for metric, (unit, description) in LAYER_MEANINGS.items():
                meanings[layer_column(layer, text, metric)] = (unit, f"layer {layer}, {text}: {description}")
    if recipe.contrast is not None:
        meanings |= contrast_meanings(recipe.contrast.positive, recipe.contrast.negative)
    return meanings


def contrast_meanings(positive: str, negative: str) -> dict[str, Meaning]:
    meanings: dict[str, Meaning] = {}
    for metric, sign in CONTRAST_METRICS:
        unit, description = CONTRAST_MEANINGS[metric]
        for text in (positive, negative):
            meanings[f"{metric}_{text}"] = (unit, description.format(text=text))
            meanings[f"{metric}_{text}_std"] = (unit, f"standard deviation of {metric}_{text} over draws")
        first, second = (negative, positive) if sign > 0 else (positive, negative)
        meanings[f"{metric}_diff"] = (unit, f"{metric}_{first} - {metric}_{second}")
    return meanings


@functools.lru_cache
def features_schema(values: ValueType) -> pa.Schema:
    """Columns of `features.parquet`: one row per (sample, text, layer, position)."""
    value_type = pa.float16() if values == "float16" else pa.float32()
    return pa.schema(
        [
            *SAMPLE_FIELDS[:2],
            described("text", pa.string(), ("", "name of the text")),
            described("layer", pa.int32(), ("", "layer of the SAE")),
            described("hook_name", pa.string(), ("", "where the SAE reads the model")),
            described("position", pa.int32(), ("tokens", "0-based, BOS included")),
            described("token_id", pa.int32(), ("", "token at the position")),
            described("indices", pa.list_(pa.uint32()), ("", "active features, ascending")),
            described("values", pa.list_(value_type), ("activation", "activations, beside indices")),
        ]
    )


COMMON_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "write_statistics": True,
    "data_page_version": "1.0",
}


@functools.lru_cache(maxsize=64)
def metrics_options(layers: tuple[int, ...], recipe: Recipe) -> dict[str, Any]:
    """How `metrics.parquet` is encoded: dictionaries for what repeats, floats plain."""
    schema = metrics_schema(layers, recipe)
    repeats = [field.name for field in schema if not pa.types.is_float64(field.type)]
    return COMMON_OPTIONS | {"use_dictionary": repeats}


@functools.lru_cache
def features_options(values: ValueType) -> dict[str, Any]:
    """How `features.parquet` is encoded: dictionaries for the keys, indices and values plain."""
    keys = [field.name for field in features_schema(values) if not pa.types.is_list(field.type)]
    return COMMON_OPTIONS | {"use_dictionary": keys}
