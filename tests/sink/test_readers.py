"""Outputs open in DuckDB, Polars, pandas and pyarrow with no help."""

from __future__ import annotations

from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from daemon.recipes import CHAT_RECIPE
from daemon.sink.outbox import output_folder_name
from daemon.source.formats import without_suffix
from tests.support.handmade import (
    expected_features,
    expected_metrics,
    expected_texts,
    finish,
    make_part,
    open_writer,
    store,
)

NAMES = ["a.jsonl", "b [1] * {x}=y.json.gz", "back\\slash?.json", "naïve 🧪 %20 #.jsonl", "rejects only.json"]


@pytest.fixture(scope="module", params=["float32", "float16"])
def outbox(request, tmp_path_factory) -> Path:
    """Several outputs with awkward names; the last has no rows. One more is half-written in staging."""
    outbox = tmp_path_factory.mktemp("outbox")
    for number, name in enumerate(NAMES):
        rejected = (0, 1, 2, 3) if number == len(NAMES) - 1 else ()
        writer = open_writer(
            outbox / output_folder_name(without_suffix(name), f"{number:012x}"), values=request.param
        )
        store(writer, finish(make_part(0, 0, 4, rejected=rejected, last=True)))
        writer.write()
    (outbox / ".staging/0").mkdir(parents=True)
    (outbox / ".staging/0/metrics.parquet").write_bytes(b"PAR1")
    return outbox


@pytest.fixture
def samples():
    return make_part(0, 0, 4).part.samples


def stability_by_domain(samples) -> dict[str | None, float]:
    rows = expected_metrics(samples)
    means = {}
    for domain in {row["domain"] for row in rows}:
        values = [row["stability_diff"] for row in rows if row["domain"] == domain]
        means[domain] = np.mean([value for value in values if value is not None])
    return means


def test_duckdb_aggregates_over_the_outbox(outbox, samples, monkeypatch):
    monkeypatch.chdir(outbox.parent)
    query = f"SELECT domain, avg(stability_diff) FROM '{outbox.name}/*/metrics.parquet' GROUP BY 1"
    assert dict(duckdb.sql(query).fetchall()) == pytest.approx(stability_by_domain(samples))


def test_duckdb_reads_the_features(outbox, samples):
    rows = duckdb.sql(f"SELECT * FROM '{outbox}/*/features.parquet' ORDER BY filename, file_row_number")
    expected = expected_features(samples)
    assert rows.columns == list(expected[0])
    assert rows.fetchall() == [tuple(row.values()) for row in expected] * (len(NAMES) - 1)


def test_polars_scans_the_outbox(outbox, samples):
    metrics = pl.scan_parquet(outbox / "*/metrics.parquet").collect()
    assert metrics.to_dicts() == expected_metrics(samples) * (len(NAMES) - 1)
    features = pl.scan_parquet(outbox / "*/features.parquet").collect()
    assert features.to_dicts() == expected_features(samples) * (len(NAMES) - 1)


def test_readers_see_the_texts_as_they_are(outbox, samples):
    expected = expected_texts(samples) * (len(NAMES) - 1)
    rows = duckdb.sql(f"SELECT * FROM '{outbox}/*/texts.parquet' ORDER BY filename, file_row_number")
    assert rows.columns == list(expected[0])
    assert rows.fetchall() == [tuple(row.values()) for row in expected]
    assert pl.scan_parquet(outbox / "*/texts.parquet").collect().to_dicts() == expected


def test_texts_join_the_features_on_the_token_that_they_fired_at(outbox, samples):
    joined = duckdb.sql(
        f"""SELECT f.token_id, t.token_ids, t.content
        FROM '{outbox}/a-*/features.parquet' f JOIN '{outbox}/a-*/texts.parquet' t
        USING (record_index, text)"""
    )
    assert len(joined.fetchall()) == len(expected_features(samples))


def test_readers_see_the_roles_of_conversations(tmp_path):
    for size in (3, 100):
        part = make_part(0, 0, size, last=True, recipe=CHAT_RECIPE)
        writer = open_writer(tmp_path / f"of-{size}", CHAT_RECIPE)
        store(writer, finish(part))
        writer.write()
        path = tmp_path / f"of-{size}/texts.parquet"
        roles = [row["token_roles"] for row in expected_texts(part.part.samples, CHAT_RECIPE)]
        assert pl.read_parquet(path)["token_roles"].to_list() == roles
        assert [row for (row,) in duckdb.sql(f"SELECT token_roles FROM '{path}'").fetchall()] == roles
        frame = pd.read_parquet(path)["token_roles"]
        assert [None if row is None else list(row) for row in frame] == roles


@pytest.mark.parametrize(
    "file, expected",
    [("metrics", expected_metrics), ("features", expected_features), ("texts", expected_texts)],
)
def test_each_output_opens_by_its_path(outbox, samples, file, expected):
    paths = sorted(outbox.glob(f"*/{file}.parquet"))
    rows = [len(pq.read_table(path)) for path in paths]
    assert sorted(rows) == [0] + [len(expected(samples))] * (len(NAMES) - 1)
    for path, n in zip(paths, rows, strict=True):
        assert len(pl.read_parquet(path)) == n
        assert len(pd.read_parquet(path)) == n
        assert len(duckdb.read_parquet(str(path)).fetchall()) == n


def test_pandas_sees_plain_types(outbox, samples):
    metrics = pd.read_parquet(next(outbox.glob("a-*/metrics.parquet")))
    assert metrics["l3_fact_gini"].dtype == np.float64
    assert metrics["n_tokens_fact"].dtype == np.int32
    assert list(metrics["sample_id"]) == [sample.sample_id for sample in samples]
    assert metrics["l3_fact_shape_class"].dtype == metrics["sample_id"].dtype  # no categories
    features = pd.read_parquet(next(outbox.glob("a-*/features.parquet")))
    assert features["indices"].iloc[0].dtype == np.uint32
