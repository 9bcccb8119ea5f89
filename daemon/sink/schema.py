"""The columns of the Parquet files and how they are encoded on disk.

Types and encodings are those that every reader of the last years knows: plain values and dictionaries under
Zstandard. What that costs in bytes is in `daemon/README.md`. Every field carries its unit and meaning as
metadata, which only files of a few rows do without. Knows nothing about samples and results.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

from daemon.analysis.columns import Kind, analysis_columns
from daemon.recipes import Recipe

ValueType = Literal["float32", "float16"]

KIND_TYPES: dict[Kind, pa.DataType] = {"int": pa.int32(), "float": pa.float64(), "class": pa.string()}


@dataclass(frozen=True, slots=True)
class Layout:
    """How results are stored, and which of them."""

    values: ValueType = "float32"  # type of activations
    texts: bool = True  # whether `texts.parquet` is written


def described(
    name: str, kind: pa.DataType, unit: str, description: str, *, nullable: bool = False
) -> pa.Field:
    metadata = {"description": description} | ({"unit": unit} if unit else {})
    return pa.field(name, kind, nullable=nullable, metadata=metadata)


SAMPLE_FIELDS: tuple[pa.Field, ...] = (
    described("sample_id", pa.string(), "", "the record's id"),
    described("record_index", pa.int64(), "", "0-based position in the input, rejects counted"),
    described("domain", pa.string(), "", "the record's domain", nullable=True),
    described("complexity", pa.float64(), "", "the record's complexity", nullable=True),
    described("extra", pa.string(), "", "JSON object of the record's other fields", nullable=True),
)


@functools.lru_cache(maxsize=64)
def metrics_schema(saes: tuple[str, ...], recipe: Recipe) -> pa.Schema:
    """Columns of `metrics.parquet`; `saes` are the SAEs' names. An undefined float is null."""
    columns = [
        described(
            column.name,
            KIND_TYPES[column.kind],
            column.unit,
            column.description,
            nullable=column.kind == "float",
        )
        for column in analysis_columns(saes, recipe)
    ]
    return pa.schema([*SAMPLE_FIELDS, *columns])


@functools.lru_cache
def features_schema(values: ValueType) -> pa.Schema:
    """Columns of `features.parquet`: one row per (sample, text, SAE, position)."""
    value_type = pa.float16() if values == "float16" else pa.float32()
    return pa.schema(
        [
            *SAMPLE_FIELDS[:2],
            described("text", pa.string(), "", "name of the text"),
            described("sae", pa.string(), "", "name of the SAE, with which its columns begin"),
            described("layer", pa.int32(), "", "layer of the SAE"),
            described("hook_name", pa.string(), "", "where the SAE reads the model"),
            described("position", pa.int32(), "tokens", "0-based, BOS included where the SAE reads it"),
            described("token_id", pa.int32(), "", "token at the position"),
            described("indices", pa.list_(pa.uint32()), "", "active features, ascending"),
            described("values", pa.list_(value_type), "activation", "activations, beside indices"),
        ]
    )


@functools.lru_cache
def texts_schema(*, chats: bool) -> pa.Schema:
    """Columns of `texts.parquet`: one row per (sample, text); `chats`: texts may be conversations."""
    roles = described(
        "token_roles",
        pa.list_(pa.string()),
        "",
        "role of the message that each token is of, null of the template's own; null where none is known",
        nullable=True,
    )
    return pa.schema(
        [
            *SAMPLE_FIELDS[:2],
            described("text", pa.string(), "", "name of the text"),
            described(
                "content", pa.string(), "", "the whole text; a conversation as the template renders it"
            ),
            described("token_ids", pa.list_(pa.int32()), "", "tokens that the model read, BOS included"),
            described(
                "token_starts",
                pa.list_(pa.int32()),
                "code points",
                "where each token begins in content, 0-based; null where that is not known",
                nullable=True,
            ),
            *([roles] if chats else []),
        ]
    )


def stored_columns(
    saes: tuple[str, ...], recipes: Sequence[Recipe], layout: Layout
) -> list[list[tuple[str, str]]]:
    """Names and types of all that is stored of files of these recipes: parts of others don't fit them."""
    schemas = [*(metrics_schema(saes, recipe) for recipe in recipes), features_schema(layout.values)]
    if layout.texts:
        schemas += [texts_schema(chats=recipe.chats) for recipe in recipes]
    return [[(field.name, str(field.type)) for field in schema] for schema in schemas]


COMMON_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 3,
    "write_statistics": True,
    "data_page_version": "1.0",
}


@functools.lru_cache(maxsize=64)
def metrics_options(saes: tuple[str, ...], recipe: Recipe) -> dict[str, Any]:
    """How `metrics.parquet` is encoded: dictionaries for what repeats, floats plain."""
    schema = metrics_schema(saes, recipe)
    repeats = [field.name for field in schema if not pa.types.is_float64(field.type)]
    return COMMON_OPTIONS | {"use_dictionary": repeats}


@functools.lru_cache
def features_options(values: ValueType) -> dict[str, Any]:
    """How `features.parquet` is encoded: dictionaries for the keys, indices and values plain."""
    keys = [field.name for field in features_schema(values) if not pa.types.is_list(field.type)]
    return COMMON_OPTIONS | {"use_dictionary": keys}


@functools.lru_cache
def texts_options(*, chats: bool) -> dict[str, Any]:
    """How `texts.parquet` is encoded: dictionaries for the keys and for roles, the rest plain."""
    keys = [field.name for field in texts_schema(chats=chats)][:3]
    return COMMON_OPTIONS | {"use_dictionary": [*keys, *(["token_roles.list.element"] if chats else [])]}
