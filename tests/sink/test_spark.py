"""Outputs open in Apache Spark 3.5 with its defaults."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from daemon.recipes import CHAT_RECIPE
from daemon.sink.parquet import ParquetFile
from daemon.sink.schema import features_options
from tests.support.handmade import (
    expected_features,
    expected_metrics,
    expected_texts,
    finish,
    make_part,
    open_writer,
    store,
)
from tests.support.spark import ask, needs_spark

pytestmark = [needs_spark, pytest.mark.slow]

SIZES = (1, 64, 200)
KINDS = ("metrics", "features", "texts")
SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("note", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("count", pa.int32(), nullable=False),
        pa.field("indices", pa.list_(pa.uint32()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
    ]
)
ENDS = {
    "name": ["", "naïve 🧪", "line\nfeed"],
    "index": [0, int(np.iinfo(np.int64).min), int(np.iinfo(np.int64).max)],
    "note": [None, "", "long " * 100],
    "score": [None, -0.0, 1e-310],
    "count": [0, int(np.iinfo(np.int32).min), int(np.iinfo(np.int32).max)],
    "indices": [[], [0, 2**32 - 1], list(range(300))],
    "values": [[], [-1.5, 3.25], [float(np.finfo(np.float32).max)] * 300],
}
EXPRESSIONS = {
    **{f"{size} {kind}": f"of-{size}/{kind}.parquet" for size in SIZES for kind in KINDS},
    **{f"all {kind}": f"of-*/{kind}.parquet" for kind in KINDS},
    "chats": "chats/texts.parquet",
    **{f"half {kind}": f"half-200/{kind}.parquet" for kind in ("metrics", "features")},
    "ends": "ends.parquet",
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """Spark's answers about outputs of each size, of no row, of float16, and the ends of every type."""
    outbox = tmp_path_factory.mktemp("outbox")
    for size in SIZES:
        write(outbox / f"of-{size}", size)
    write(outbox / "of-0", 3, rejected=(0, 1, 2))
    write(outbox / "half-200", 200, values="float16")
    write_chats(outbox / "chats")
    write_ends(outbox / "ends.parquet")
    reads = [f"spark.read.parquet({glob!r})" for glob in EXPRESSIONS.values()]
    return dict(zip(EXPRESSIONS, ask(*reads, cwd=outbox), strict=True))


def write(folder: Path, size: int, *, rejected=(), **options: object) -> None:
    writer = open_writer(folder, **options)
    store(writer, finish(make_part(0, 0, size, rejected=rejected, last=True)))
    writer.write()


def write_chats(folder: Path) -> None:
    writer = open_writer(folder, CHAT_RECIPE)
    store(writer, finish(make_part(0, 0, 200, last=True, recipe=CHAT_RECIPE)))
    writer.write()


def write_ends(path: Path) -> None:
    """The least and the most of every type."""
    options = features_options("float32") | {"use_dictionary": ["name"]}
    file = ParquetFile(path, SCHEMA, group_bytes=1, options=options)
    file.append(pa.table(ENDS, schema=SCHEMA))
    file.close()


@pytest.mark.parametrize("size", SIZES)
def test_it_reads_every_value_of_small_and_large_files(answers, size):
    samples = make_part(0, 0, size).part.samples
    metrics, features = answers[f"{size} metrics"], answers[f"{size} features"]
    assert metrics["rows"] == expected_metrics(samples)
    assert {kind for _, kind in metrics["columns"]} == {"string", "bigint", "int", "double"}
    assert features["rows"] == expected_features(samples)
    kinds = dict(features["columns"])
    assert (kinds["indices"], kinds["values"]) == ("array<bigint>", "array<float>")
    texts = answers[f"{size} texts"]
    assert texts["rows"] == expected_texts(samples)
    assert dict(texts["columns"])["token_ids"] == dict(texts["columns"])["token_starts"] == "array<int>"


def test_it_reads_the_roles_of_conversations(answers):
    samples = make_part(0, 0, 200, recipe=CHAT_RECIPE).part.samples
    assert answers["chats"]["rows"] == expected_texts(samples, CHAT_RECIPE)


def test_it_reads_a_whole_outbox_at_one_go(answers):
    samples = [make_part(0, 0, size).part.samples for size in SIZES]
    assert len(answers["all metrics"]["rows"]) == sum(SIZES)
    assert len(answers["all texts"]["rows"]) == 3 * sum(SIZES)
    assert len(answers["all features"]["rows"]) == sum(len(expected_features(of)) for of in samples)


def test_it_reads_the_ends_of_every_type(answers):
    rows = [dict(zip(ENDS, row, strict=True)) for row in zip(*ENDS.values(), strict=True)]
    assert json.dumps(answers["ends"].get("rows")) == json.dumps(rows)


def test_of_float16_activations_it_reads_the_metrics_alone(answers):
    """It knows no float16: README.md says so beside the setting."""
    samples = make_part(0, 0, 200).part.samples
    assert answers["half metrics"]["rows"] == expected_metrics(samples)
    assert "error" in answers["half features"]
