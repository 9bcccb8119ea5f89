"""Several dictionaries at a layer, and dictionaries that read texts with BOS beside such that do not."""

from __future__ import annotations

import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from daemon.analysis.columns import analysis_columns
from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model_wiring import load_compute
from daemon.recipes import CONTRAST_RECIPE
from daemon.records import Outcome
from daemon.service import serve
from daemon.tools.bench_worker import BaselineWorker, LensdWorker
from daemon.tools.report import layer_table
from tests.support import tiny
from tests.support.engines import packed, padded, random_texts

POST = "blocks.1.hook_resid_post"
RECORDS = tiny.contrast_records(7)


@dataclass(frozen=True)
class Study:
    """The results of one folder."""

    outcome: Outcome
    metrics: dict[str, list[Any]]
    features: list[dict[str, Any]]
    manifest: dict[str, Any]


def toml_of(folder: Path, model: Path, *saes: str) -> Path:
    """A configuration with these `[[sae]]` tables."""
    folder.mkdir(parents=True)
    path = folder / "lensd.toml"
    tables = "".join(f"\n[[sae]]\n{sae}\n" for sae in saes)
    path.write_text(f'[model]\nname = "{model}"\ndevice = "cpu"\ndtype = "float64"\n{tables}')
    return path


def run(folder: Path, model: Path, *saes: str, **flags: object) -> Study:
    toml = toml_of(folder, model, *saes)
    (folder / "inbox").mkdir()
    tiny.write_json(folder / "inbox" / "study.json", RECORDS)
    settings = {
        "inbox.path": folder / "inbox",
        "outbox.path": folder / "outbox",
        "inbox.settle_seconds": 0,
        "http.enabled": False,
        "batching.max_batch_tokens": 512,
        **{key.replace("__", "."): value for key, value in flags.items()},
    }
    outcomes: list[Outcome] = []
    serve(load_config(toml, {}, settings), once=True, on_outcome=outcomes.append)
    (outcome,) = outcomes
    return Study(
        outcome,
        pq.read_table(outcome.folder / "metrics.parquet").to_pydict(),
        pq.read_table(outcome.folder / "features.parquet").to_pylist(),
        json.loads((outcome.folder / "manifest.json").read_text()),
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> dict[str, str]:
    """`[[sae]]` tables: three widths at one layer, one of its MLP, and one at another layer."""
    root = tmp_path_factory.mktemp("saes")
    made = {
        "narrow": tiny.save_sae(root / "narrow", POST, d_sae=64),
        "middle": tiny.save_sae(root / "middle", POST, seed=1, architecture="topk"),
        "wide": tiny.save_sae(root / "wide", POST, d_sae=1024, seed=2),
        "mlp": tiny.save_sae(root / "mlp", "blocks.1.hook_mlp_out", seed=3),
        "later": tiny.save_sae(root / "later", "blocks.2.hook_resid_post", seed=4),
    }
    return {name: f'path = "{path}"' for name, path in made.items()}


def features_of(study: Study, sae: str, *left_out: str) -> list[dict[str, Any]]:
    """The stored rows of one dictionary, without what names it."""
    drop = {"sae", "values", *left_out}
    return [
        {key: value for key, value in row.items() if key not in drop}
        for row in study.features
        if row["sae"] == sae
    ]


def assert_same_numbers(got: list[Any], expected: list[Any], name: str) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        if isinstance(theirs, float):
            assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6), name
        else:
            assert ours == theirs, name


def assert_same_dictionary(study: Study, sae: str, alone: Study, its_name: str) -> None:
    """Columns, stored features and sums of one dictionary are those of a study of another set."""
    columns = [name for name in alone.metrics if name.startswith(f"{its_name}_")]
    assert columns
    for name in columns:
        ours = f"{sae}_{name.removeprefix(f'{its_name}_')}"
        assert_same_numbers(study.metrics[ours], alone.metrics[name], ours)
    assert features_of(study, sae) == features_of(alone, its_name)
    values, expected = (
        [value for row in one.features if row["sae"] == name for value in row["values"]]
        for one, name in ((study, sae), (alone, its_name))
    )
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)
    (ours,) = [one for one in study.manifest["saes"] if one["name"] == sae]
    (theirs,) = [one for one in alone.manifest["saes"] if one["name"] == its_name]
    for key in ("hook", "layer", "d_sae", "prepend_bos", "weights_sha256"):
        assert ours[key] == theirs[key]
    assert (ours["fvu"], ours["mean_l0"]) == pytest.approx((theirs["fvu"], theirs["mean_l0"]), rel=1e-6)


def test_four_dictionaries_at_a_layer_are_each_what_it_is_alone(llama, tables, tmp_path):
    names = ["l1_64", "l1_96", "l1_1k", "l1_mlp_96"]
    chosen = [tables[name] for name in ("narrow", "middle", "wide", "mlp")]
    study = run(tmp_path / "all", llama, *chosen)
    assert [sae["name"] for sae in study.manifest["saes"]] == names
    expected = [column.name for column in analysis_columns(names, CONTRAST_RECIPE)]
    assert list(study.metrics)[5:] == expected
    order = [(row["record_index"], row["text"], row["sae"]) for row in study.features]
    assert order == [
        (n, text, sae) for n in range(len(RECORDS)) for text in CONTRAST_RECIPE.text_names for sae in names
    ]
    assert {row["layer"] for row in study.features} == {1}
    for name, table in zip(names, chosen, strict=True):
        alone = run(tmp_path / name, llama, table)
        assert_same_dictionary(study, name, alone, "l1")
        assert alone.outcome.unit != study.outcome.unit
        if name == names[0]:  # the first is what contrasts read; one layer has no other to compare with
            contrasts = [column for column in alone.metrics if column.endswith(("_diff", "_fact", "_hall"))]
            for column in contrasts:
                assert_same_numbers(study.metrics[column], alone.metrics[column], column)
            assert set(study.metrics["cross_layer_consistency_fact"]) == {None}
    shown = io.StringIO()
    Console(file=shown, width=80).print(layer_table(study.outcome.folder))
    assert all(name in shown.getvalue() for name in names)


def test_a_name_that_is_given_begins_the_columns_and_is_part_of_the_unit(llama, tables, tmp_path):
    named = run(tmp_path / "named", llama, tables["narrow"] + '\nname = "small"', tables["later"])
    plain = run(tmp_path / "plain", llama, tables["narrow"], tables["later"])
    assert [sae["name"] for sae in named.manifest["saes"]] == ["small", "l2"]
    assert [name.replace("small_", "l1_") for name in named.metrics] == list(plain.metrics)
    assert_same_dictionary(named, "small", plain, "l1")
    assert named.outcome.unit != plain.outcome.unit
    assert {row["sae"] for row in named.features} == {"small", "l2"}


def test_columns_that_would_have_one_name_are_refused_at_the_start(llama, tables, tmp_path):
    toml = toml_of(
        tmp_path / "a", llama, tables["narrow"] + '\nname = "a"', tables["wide"] + '\nname = "a_b"'
    )
    toml.write_text(toml.read_text() + '\n[texts]\nc = "{x}"\nb_c = "{y}"\n')
    with pytest.raises(ConfigError, match="would give two columns named a_b_c_l0_norm: set another name"):
        load_compute(load_config(toml, {}, {}))


def test_a_study_of_both_ways_of_reading_is_two_studies(llama, tables, tmp_path):
    bare = "\nprepend_bos = false"
    flags = {"analysis__positions": "all"}
    both = run(tmp_path / "both", llama, tables["narrow"], tables["wide"] + bare, tables["later"], **flags)
    of_bos = run(tmp_path / "bos", llama, tables["narrow"], tables["later"], **flags)
    of_bare = run(tmp_path / "bare", llama, tables["wide"] + bare, **flags)
    assert_same_dictionary(both, "l1_64", of_bos, "l1")
    assert_same_dictionary(both, "l2", of_bos, "l2")
    assert_same_dictionary(both, "l1_1k", of_bare, "l1")
    for name in of_bos.metrics:  # of the record, of the first dictionary, and across the layers
        if not name.startswith(("l1_", "l2_")):
            assert_same_numbers(both.metrics[name], of_bos.metrics[name], name)
    positions_of = {
        sae: {row["position"] for row in both.features if row["sae"] == sae} for sae in ("l2", "l1_1k")
    }
    assert {position - 1 for position in positions_of["l2"]} == positions_of["l1_1k"]
    assert both.manifest["records"] == both.manifest["rows"] == len(RECORDS)


@pytest.mark.parametrize("make", [packed, padded])
def test_the_model_runs_once_however_many_dictionaries_read_it(make, llama, tables):
    paths = [Path(tables[name].split('"')[1]) for name in ("narrow", "middle", "wide")]
    texts = random_texts([9, 3, 9, 20])
    several, one = make(llama, paths), make(llama, paths[:1])
    assert several.extract(texts).computed_tokens == one.extract(texts).computed_tokens
    started = several.start(texts)
    assert len(started.read) == 3
    assert len({id(values) for values in started.read}) == 1  # what they read lies there once


@pytest.mark.slow
def test_bench_counts_and_runs_every_dictionary_as_it_reads(llama, tables, tmp_path):
    chosen = [tables["narrow"], tables["wide"] + "\nprepend_bos = false", tables["later"]]
    config = load_config(toml_of(tmp_path / "a", llama, *chosen), {}, {"batching.max_batch_tokens": 512})
    file = tiny.write_json(tmp_path / "in.json", RECORDS)
    worker = LensdWorker(config, [file], [])
    _, workload = worker.hello()
    samples = [sample for batch in worker._planned for sample in batch.samples]
    nodes = {
        ids[: n + 1]
        for sample in samples
        for way in (True, False)
        for ids in sample.read_by(way)
        for n in range(len(ids))
    }
    assert workload.unique_tokens == len(nodes)
    assert workload.text_tokens == sum(
        len(ids) for sample in samples for way in (True, False) for ids in sample.read_by(way)
    )
    weights = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)  # of three layers: attention, MLP
    attended = 3 * 2 * tiny.D_MODEL * sum(map(len, nodes))
    encoded = tiny.D_MODEL * (64 + 1024 + tiny.D_SAE) * 3 * len(samples)
    assert workload.multiply_adds == weights * len(nodes) + attended + encoded
    with torch.inference_mode():
        assert worker._bare() > 0
    baselines = BaselineWorker(config, [file], 2)
    for variant in baselines.hello():
        assert math.isfinite(baselines.run(variant).seconds)
