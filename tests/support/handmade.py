"""Finished parts whose results are a plain function of each sample, however the samples are batched."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from daemon.analysis.columns import analysis_columns
from daemon.analysis.geometry import SHAPE_CLASSES
from daemon.model_info import ModelInfo, SaeInfo
from daemon.recipes import CONTRAST_RECIPE, ROLES, Recipe
from daemon.records import (
    BatchResult,
    Claim,
    FeatureRows,
    FileIdentity,
    FinishedPart,
    InputFile,
    LayerSums,
    LayerTotals,
    Part,
    PartExtent,
    Reject,
    ResultRows,
    Sample,
    StageSeconds,
    TextToStore,
    TokenizedPart,
    TokenizedSample,
)
from daemon.sink.schema import Layout, features_schema, metrics_schema, texts_schema
from daemon.sink.tables import stored_parts
from daemon.sink.writer import UnitWriter
from daemon.source.formats import without_suffix

D_IN = 4
D_SAE = 64
HOOK = "blocks.{}.hook_resid_post"
UNIT = "0123456789ab"
INFO = ModelInfo(
    name="tiny",
    architecture="LlamaForCausalLM",
    d_model=D_IN,
    n_layers=8,
    dtype="float32",
    device="cpu",
    engine="packed",
    weights_sha256=None,
    saes=tuple(
        SaeInfo(
            HOOK.format(layer),
            HOOK.format(layer),
            layer,
            D_IN,
            D_SAE,
            D_IN,
            "jumprelu",
            f"sae-{layer}",
            "5" * 64,
            "8" * 64,
        )
        for layer, hook in ((3, HOOK.format(3)), (5, HOOK.format(5)))
    ),
    settings_sha256="7" * 64,
)


def make_file(name: str = "sämple.jsonl", unit: str = UNIT) -> InputFile:
    return InputFile(
        Claim(name, name, 1, FileIdentity(1, 2, 3, 4, 5)),
        sha256="c" * 64,
        size=99,
        unit=unit,
        stem=without_suffix(name),
    )


@dataclass(frozen=True)
class Activation:
    """One feature row of one sample."""

    text: int
    layer: int
    position: int
    token_id: int
    indices: list[int]
    values: list[float]


def columns_of(sample: Sample, recipe: Recipe) -> dict[str, object]:
    """Random values of every analysis column of a sample; every fifth float is undefined."""
    rng = random.Random(sample.record_index)
    values: dict[str, object] = {}
    for column in analysis_columns(INFO.names, recipe):
        if column.kind == "int":
            values[column.name] = rng.randrange(1000)
        elif column.kind == "class":
            values[column.name] = rng.choice(SHAPE_CLASSES)
        else:
            values[column.name] = math.nan if rng.random() < 0.2 else rng.uniform(-1e3, 1e3)
    return values


def activations_of(sample: Sample, recipe: Recipe) -> list[Activation]:
    """One row per text and SAE; one in six has no active feature. Values are exact in float16."""
    rng = random.Random(-1 - sample.record_index)
    rows = []
    for text in range(len(recipe.templates)):
        for layer in range(len(INFO.saes)):
            active = sorted(rng.sample(range(D_SAE), rng.choice([0, 1, 2, 3, 7, 12])))
            values = [rng.randrange(1, 1024) / 8 for _ in active]
            rows.append(Activation(text, layer, 4 + text, rng.randrange(50_000), active, values))
    return rows


def make_block(samples: Sequence[Sample], recipe: Recipe = CONTRAST_RECIPE, dtype=np.float32) -> BatchResult:
    """A device batch; its feature rows come in no useful order."""
    per_sample = [columns_of(sample, recipe) for sample in samples]
    names = [column.name for column in analysis_columns(INFO.names, recipe)]
    rows = [(i, row) for i, sample in enumerate(samples) for row in activations_of(sample, recipe)]
    random.Random(len(samples)).shuffle(rows)
    return BatchResult(
        columns={name: np.array([values[name] for values in per_sample]) for name in names},
        features=FeatureRows(
            sample_row=np.array([i for i, _ in rows]),
            text=np.array([row.text for _, row in rows]),
            layer=np.array([row.layer for _, row in rows]),
            position=np.array([row.position for _, row in rows]),
            token_id=np.array([row.token_id for _, row in rows]),
            offsets=np.cumsum([0] + [len(row.indices) for _, row in rows]),
            indices=np.array([index for _, row in rows for index in row.indices], np.uint32),
            values=np.array([value for _, row in rows for value in row.values], dtype),
        ),
        layers=tuple(layer_sums(samples) for _ in INFO.saes),
        forward_seconds=0.0,
        sae_seconds=0.0,
        analysis_seconds=0.0,
    )


def layer_sums(samples: Sequence[Sample]) -> LayerSums:
    """One activation per sample, its first entry the record's index."""
    x = np.zeros((len(samples), D_IN))
    x[:, 0] = [sample.record_index for sample in samples]
    return LayerSums(
        rows=np.ones(len(samples), np.int64),
        l0=np.full(len(samples), 6.0),
        squared_error=np.full(len(samples), 0.5),
        squared_norm=(x**2).sum(1),
        total=x,
    )


def make_part(
    number: int,
    first_record: int,
    n: int,
    *,
    rejected: Sequence[int] = (),
    last: bool = False,
    recipe: Recipe = CONTRAST_RECIPE,
    file: InputFile | None = None,
) -> TokenizedPart:
    """n records from `first_record` on, of which those in `rejected` are rejects."""
    records = range(first_record, first_record + n)
    samples = tuple(make_sample(i, recipe) for i in records if i not in rejected)
    part = Part(
        file=file or make_file(),
        extent=PartExtent(number, first_record, n, 100 * first_record),
        last=last,
        recipe=recipe,
        samples=samples,
        rejects=tuple(make_reject(i) for i in records if i in rejected),
    )
    return TokenizedPart(part, tuple(tokenized(sample, recipe) for sample in samples))


def tokenized(sample: Sample, recipe: Recipe) -> TokenizedSample:
    """With texts of which every fourth has no known places, and every second conversation no known roles."""
    rows = text_rows_of(sample, recipe)
    stored = tuple(
        TextToStore(
            row["content"],
            None if row["token_starts"] is None else np.array(row["token_starts"], np.int32),
            row["token_roles"] and bytes(map((None, *ROLES).index, row["token_roles"])),
        )
        for row in rows
    )
    return TokenizedSample(sample, tuple(tuple(row["token_ids"]) for row in rows), stored=stored)


def text_rows_of(sample: Sample, recipe: Recipe) -> list[dict[str, Any]]:
    """The rows of texts.parquet of one sample, roles in all of them."""
    rng = random.Random(7 + sample.record_index)
    rows = []
    for name in recipe.text_names:
        n = rng.choice([1, 2, 5, 9])
        roles = rng.choices([None, "system", "user", "assistant"], k=n)
        rows.append(
            {
                "sample_id": sample.sample_id,
                "record_index": sample.record_index,
                "text": name,
                "content": rng.choice(["", "naïve 🧪 ", "a\nb\0c ", "\u202e<script> "]) * n,
                "token_ids": rng.choices(range(50_000), k=n),
                "token_starts": None if rng.random() < 0.25 else sorted(rng.choices(range(99), k=n)),
                "token_roles": roles if recipe.chats and rng.random() < 0.5 else None,
            }
        )
    return rows


def make_sample(index: int, recipe: Recipe) -> Sample:
    return Sample(
        record_index=index,
        sample_id=f"séance-{index} 🧪",
        domain=(None, "entity", "logiqué")[index % 3],
        complexity=None if index % 4 == 0 else index / 2,
        extra=None if index % 5 == 0 else f'{{"n": {index}}}',
        texts=("t",) * len(recipe.templates),
        line=index + 1,
        byte_offset=100 * index,
    )


def make_reject(index: int) -> Reject:
    return Reject(
        record_index=index,
        sample_id=None if index % 2 else f"r{index} ☃",
        line=index + 1,
        byte_offset=100 * index,
        reason="missing_field",
        message=f"record {index} has no field 'fact'",
    )


def finish(part: TokenizedPart, batches: Sequence[Sequence[int]] | None = None) -> FinishedPart:
    """A part whose samples ran in the given batches of part rows; all in one by default."""
    samples = part.part.samples
    if batches is None:
        batches = [range(len(samples))] if samples else []
    pieces = []
    for batch in batches:
        block = make_block([samples[row] for row in batch], part.part.recipe)
        pieces.append(ResultRows(block, np.arange(len(batch)), np.array(batch), row_bytes=0))
    return finished_from(part, pieces)


def finished_from(part: TokenizedPart, pieces: Sequence[ResultRows]) -> FinishedPart:
    layers = tuple(LayerTotals.zero(D_IN) for _ in INFO.saes)
    for piece in pieces:
        layers = tuple(
            totals.plus(*LayerTotals.of_groups(sums, piece.result_rows, np.array([0])))
            for totals, sums in zip(layers, piece.result.layers, strict=True)
        )
    return FinishedPart(
        part=part,
        pieces=tuple(pieces),
        rejects=part.part.rejects[::-1],
        layers=layers,
        seconds=StageSeconds(read=0.25, forward=1.0),
    )


def open_writer(staging: Path | str, recipe: Recipe = CONTRAST_RECIPE, **options: object) -> UnitWriter:
    layout = Layout(**{name: options.pop(name) for name in ("values", "texts") if name in options})
    settings = {"file": make_file(), "recipe": recipe, "info": INFO, "layout": layout} | options
    return UnitWriter(Path(staging), **settings)


def store(writer: UnitWriter, finished: FinishedPart) -> None:
    """Store a part with its tables made alone."""
    schemas = metrics_schema(INFO.names, writer.recipe), features_schema(writer.layout.values)
    texts = texts_schema(chats=writer.recipe.chats) if writer.layout.texts else None
    (stored,) = stored_parts([finished], *schemas, writer.info, texts)
    writer.write_part(finished.part.part, stored)


def expected_metrics(samples: Sequence[Sample], recipe: Recipe = CONTRAST_RECIPE) -> list[dict[str, object]]:
    """The rows of metrics.parquet, one sample at a time."""
    rows = []
    for sample in samples:
        row = {name: getattr(sample, name) for name in ("sample_id", "record_index", "domain", "complexity")}
        row["extra"] = sample.extra
        for name, value in columns_of(sample, recipe).items():
            row[name] = None if isinstance(value, float) and math.isnan(value) else value
        rows.append(row)
    return rows


def expected_texts(samples: Sequence[Sample], recipe: Recipe = CONTRAST_RECIPE) -> list[dict[str, object]]:
    """The rows of texts.parquet, one sample at a time."""
    rows = [row for sample in samples for row in text_rows_of(sample, recipe)]
    if not recipe.chats:
        rows = [{name: value for name, value in row.items() if name != "token_roles"} for row in rows]
    return rows


def expected_features(samples: Sequence[Sample], recipe: Recipe = CONTRAST_RECIPE) -> list[dict[str, object]]:
    """The rows of features.parquet, one sample at a time."""
    return [
        {
            "sample_id": sample.sample_id,
            "record_index": sample.record_index,
            "text": recipe.text_names[row.text],
            "sae": f"l{INFO.saes[row.layer].layer}",
            "layer": INFO.saes[row.layer].layer,
            "hook_name": INFO.saes[row.layer].hook_name,
            "position": row.position,
            "token_id": row.token_id,
            "indices": row.indices,
            "values": row.values,
        }
        for sample in samples
        for row in activations_of(sample, recipe)
    ]
