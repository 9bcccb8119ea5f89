"""Folders read as one study, against their rows read one at a time; folders that don't belong together."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import defaultdict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon.errors import ConfigError
from daemon.findings import activations
from daemon.findings.activations import activation_blocks, count_activations, feature_columns
from daemon.findings.study import open_study
from tests.support.outboxes import SAES, make

TEXTS = ("prompt", "fact", "hall")


def folders(tmp_path, positions="last"):
    return [
        make(tmp_path / f"a-{'1' * 12}", 13, seed=1, positions=positions),
        make(tmp_path / f"b-{'2' * 12}", 9, seed=2, positions=positions, first_record=5),
    ]


def one_at_a_time(made):
    """(text, SAE) -> (samples, features) activations: mean over a text's rows, by pandas, a row at a time."""
    found = {(text, name): [] for text in TEXTS for name, _, _ in SAES}
    for folder in made:
        frame = pd.read_parquet(folder.path / "features.parquet")
        metrics = pd.read_parquet(folder.path / "metrics.parquet")
        for index in metrics["record_index"]:
            for text in TEXTS:
                for name, _, width in SAES:
                    mine = frame[
                        (frame["record_index"] == index) & (frame["text"] == text) & (frame["sae"] == name)
                    ]
                    total = np.zeros(width)
                    for _, row in mine.iterrows():
                        for feature, value in zip(row["indices"], row["values"], strict=True):
                            total[feature] += float(value)
                    found[text, name].append(total / len(mine))
    return {key: np.array(rows) for key, rows in found.items()}


@pytest.mark.parametrize("positions", ["last", "all", "mean"])
@pytest.mark.parametrize("budget", [activations.BUDGET_BYTES, 700])
def test_blocks_are_the_rows_read_one_at_a_time(tmp_path, positions, budget, monkeypatch):
    monkeypatch.setattr("daemon.findings.study.BATCH_VALUES", 40)  # texts are cut by pieces of the file
    made = folders(tmp_path, positions)
    for folder in made:
        folder.write(group_rows=17)
    study = open_study([tmp_path])
    counts = count_activations(study)
    expected = one_at_a_time(made)
    seen = defaultdict(list)
    for block in activation_blocks(study, counts, TEXTS, budget=budget):
        seen[block.sae].append(block)
    for sae, (name, _, width) in enumerate(SAES):
        bounds = [(block.first, block.last) for block in seen[sae]]
        assert bounds[0][0] == 0
        assert bounds[-1][1] == width
        assert all(last == first for (_, last), (first, _) in itertools.pairwise(bounds))
        for text in TEXTS:
            dense = np.hstack([block.by_text[text].toarray() for block in seen[sae]])
            np.testing.assert_allclose(dense, expected[text, name], rtol=1e-12)
    if budget < 1000:
        assert len(seen[0]) > 1
    wanted = [(0, 3), (1, 7), (0, 39)]
    chosen = feature_columns(study, counts, wanted)
    for sae, feature in wanted:
        for text in TEXTS:
            samples, values = chosen[sae].of(text, feature)
            dense = np.zeros(study.n_samples)
            dense[samples] = values
            np.testing.assert_allclose(dense, expected[text, SAES[sae][0]][:, feature], rtol=1e-12)


def test_dead_features_fire_on_no_text(tmp_path):
    made = folders(tmp_path)
    for folder in made:
        for row in folder.features:
            kept = [(i, v) for i, v in zip(row["indices"], row["values"], strict=True) if i % 5]
            row["indices"], row["values"] = [i for i, _ in kept], [v for _, v in kept]
        folder.write()
    expected = one_at_a_time(made)
    counts = count_activations(open_study([tmp_path]))
    for sae, (name, _, _) in enumerate(SAES):
        fires = sum(np.abs(expected[text, name]).sum(0) for text in TEXTS)
        assert counts.dead(sae) == (fires == 0).sum() >= 5


def test_columns_join_over_folders_and_nulls_are_nan(tmp_path):
    made = folders(tmp_path)
    made[0].metrics[4]["entropy_diff"] = None
    for folder in made:
        folder.write()
    study = open_study([tmp_path])
    rows = [row for folder in made for row in folder.metrics]
    expected = [np.nan if row["entropy_diff"] is None else row["entropy_diff"] for row in rows]
    np.testing.assert_array_equal(study.numbers("entropy_diff"), expected)
    assert study.record_index.tolist() == [row["record_index"] for row in rows]
    with pytest.raises(KeyError):
        study.numbers("nothing")


def test_an_outbox_a_folder_and_the_same_twice_are_read_once(tmp_path):
    for folder in folders(tmp_path / "outbox"):
        folder.write()
    outbox = tmp_path / "outbox"
    (outbox / ".staging" / "x").mkdir(parents=True)
    shutil.copytree(outbox / f"a-{'1' * 12}", outbox / ".staging" / "lease")
    (outbox / "notes").mkdir()
    shutil.copytree(outbox / f"a-{'1' * 12}", tmp_path / "copy")
    (tmp_path / "link").symlink_to(outbox)
    study = open_study(
        [outbox / f"b-{'2' * 12}", outbox, tmp_path / "link", tmp_path / "copy", outbox / f"a-{'1' * 12}"]
    )
    assert [folder.path.name for folder in study.folders] == [f"b-{'2' * 12}", f"a-{'1' * 12}"]
    assert study.n_samples == 22


def test_of_an_input_that_was_read_twice_the_newest_counts(tmp_path):
    first, second = folders(tmp_path)
    second.manifest["input"] = first.manifest["input"]
    second.manifest["created"] = "2026-02-03T04:05:07+00:00"
    first.write()
    second.write()
    assert [folder.path for folder in open_study([tmp_path]).folders] == [second.path]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"analysis_version": 3}, "analysis version"),
        ({"config": {"analysis": {"positions": "last", "seed": 7}}}, "analysis.seed"),
        (
            {"recipe": {"name": "mine", "texts": {"prompt": "{q}"}, "contrast": None}},
            "text prompt and text fact and text hall and texts and 2 more",
        ),
        ("sae", "weights of l3"),
        ("model", "dtype"),
    ],
)
def test_folders_of_different_runs_are_refused_with_what_differs(tmp_path, change, differs):
    first, second = folders(tmp_path)
    if change == "sae":
        second.manifest["saes"][1]["weights_sha256"] = "f" * 64
    elif change == "model":
        second.manifest["model"]["dtype"] = "bfloat16"
    else:
        second.changes = change
    first.write()
    second.write()
    with pytest.raises(ConfigError) as caught:
        open_study([tmp_path])
    said = str(caught.value)
    assert f"they differ in {differs}: name the folders" in said
    assert f"(1) {first.path}" in said
    assert f"(2) {second.path}" in said
    assert "\n" not in said
    assert open_study([second.path]).n_samples == 9


def test_the_values_that_differ_are_said(tmp_path):
    first, second = folders(tmp_path)
    first.manifest["config"]["analysis"]["noise_draws"] = 8
    second.manifest["config"]["analysis"]["noise_draws"] = 9
    first.manifest["recipe"]["texts"]["prompt"] = "x" * 200 + "{prompt}"
    second.manifest["recipe"]["texts"]["prompt"] = "x" * 200 + "{prompt}?"
    first.write()
    second.write()
    with pytest.raises(ConfigError) as caught:
        open_study([tmp_path])
    said = str(caught.value)
    assert "text prompt ...xx{prompt}', analysis.noise_draws 8; (2)" in said
    assert said.endswith("text prompt ...xx{prompt}?', analysis.noise_draws 9")


def test_settings_that_change_no_number_make_no_difference(tmp_path):
    first, second = folders(tmp_path)
    second.manifest["config"]["outbox"] = {"values": "float16"}
    second.manifest["model"]["device"] = "cuda:0"
    second.manifest["versions"]["torch"] = "9"
    first.write()
    second.write()
    assert open_study([tmp_path]).n_samples == 22


def test_an_old_folder_is_read_by_layers(tmp_path):
    (made, _) = folders(tmp_path)
    for entry in made.manifest["saes"]:
        del entry["name"], entry["prepend_bos"], entry["card"]
    del made.manifest["analysis_version"], made.manifest["recipe"]["name"]
    made.texts = []
    made.write()
    path = made.path / "features.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["sae"]), path)
    study = open_study([tmp_path])
    assert [sae.prefix for sae in study.saes] == ["l1", "l3"]
    expected = one_at_a_time_old(made)
    (block,) = [b for b in activation_blocks(study, count_activations(study), ("fact",)) if b.sae == 1]
    np.testing.assert_allclose(block.by_text["fact"].toarray(), expected)


def one_at_a_time_old(made):
    rows = [row for row in made.features if row["text"] == "fact" and row["sae"] == "l3"]
    dense = np.zeros((len(rows), 25))
    for place, row in enumerate(rows):
        dense[place, row["indices"]] = row["values"]
    return dense


def missing(made):
    (made.path / "features.parquet").unlink()


def cut_off(made):
    path = made.path / "features.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def flipped(made):
    path = made.path / "features.parquet"
    content = bytearray(path.read_bytes())
    content[40:1200] = bytes(1160)
    path.write_bytes(bytes(content))


def rewrite(made, name="features.parquet"):
    def change(function):
        path = made.path / name
        pq.write_table(function(pq.read_table(path)), path)

    return change


def foreign(made):
    rewrite(made)(lambda table: table.rename_columns([f"x{name}" for name in table.schema.names]))


def other_text(made):
    made.features[5]["text"] = "other"
    made.write()


def other_sae(made):
    made.features[5]["sae"] = "l9"
    made.write()


def beyond(made):
    row = next(row for row in made.features if row["sae"] == "l3" and row["indices"])
    row["indices"] = [*row["indices"][:-1], 25]
    made.write()


def infinite(made):
    row = next(row for row in made.features if row["values"])
    row["values"] = [*row["values"][:-1], float("inf")]
    made.write()


def unequal(made):
    row = next(row for row in made.features if len(row["values"]) > 1)
    row["values"] = row["values"][:-1]
    made.write()


def lost_row(made):
    del made.features[7]
    made.write()


def twice(made):
    made.features.insert(7, made.features[7])
    made.write()


def stranger(made):
    made.features[7] = made.features[7] | {"record_index": 999}
    made.write()


def null_key(made):
    made.features[7] = made.features[7] | {"text": None}
    made.write()


def unordered(made):
    made.metrics[2], made.metrics[3] = made.metrics[3], made.metrics[2]
    made.write()


def fewer(made):
    made.metrics.pop()
    made.write()


def index_of_text(made):
    rewrite(made, "metrics.parquet")(
        lambda table: table.set_column(1, "record_index", table["record_index"].cast(pa.string()))
    )


def index_null(made):
    made.metrics[3]["record_index"] = None
    made.write()


def indices_of_text(made):
    def change(table):
        place = table.schema.get_field_index("indices")
        return table.set_column(place, "indices", table["indices"].cast(pa.list_(pa.string())))

    rewrite(made)(change)


def feature_index_null(made):
    made.features[3] = made.features[3] | {"record_index": None}
    made.write()


def not_json(made):
    (made.path / "manifest.json").write_text("{")


def of_a_web_page(made):
    (made.path / "manifest.json").write_text('{"name": "app", "icons": []}')


def no_rows(made):
    made.metrics, made.features, made.manifest["rows"] = [], [], 0
    made.write()
    pq.write_table(pa.table({"record_index": pa.array([], pa.int64())}), made.path / "metrics.parquet")


DAMAGES = (
    missing, cut_off, flipped, foreign, other_text, other_sae, beyond, infinite, unequal, lost_row, twice,
    stranger, null_key, unordered, fewer, not_json, of_a_web_page, no_rows, index_of_text, index_null,
    indices_of_text, feature_index_null,
)  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_line_with_the_path(tmp_path, damage):
    made = make(tmp_path / f"a-{'1' * 12}", 12, seed=3)
    made.write()
    damage(made)
    with pytest.raises(ConfigError) as caught:
        study = open_study([tmp_path])
        list(activation_blocks(study, count_activations(study), TEXTS))
    assert str(made.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_places_that_hold_nothing_are_told(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name, said in (
        ("none", "no such folder"),
        ("file", "a file: give an outbox"),
        ("empty", "nothing is published there"),
    ):
        with pytest.raises(ConfigError, match=said):
            open_study([tmp_path / name])


def test_manifests_of_later_versions_may_say_more(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 6)
    made.manifest["colour"] = json.loads('{"of": ["things"]}')
    made.manifest["saes"][0]["neuronpedia_id"] = "gpt2-small/4-res-jb"
    made.write()
    assert open_study([tmp_path]).saes[0].neuronpedia_id == "gpt2-small/4-res-jb"
