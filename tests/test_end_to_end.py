"""The whole daemon through a real inbox, on a tiny random model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from structlog.testing import capture_logs

from daemon.analysis.column_inputs import LayerActivations
from daemon.analysis.columns import ANALYSIS_VERSION, LAYER_COLUMNS, analysis_columns, layer_column
from daemon.config import Config, load_config
from daemon.errors import ConfigError, MachineError
from daemon.executor.runner import BatchRunner, BegunBatch
from daemon.native.rmsnorm_rope_attention import routines
from daemon.observe.recorder import Tally
from daemon.recipes import CONTRAST_RECIPE
from daemon.records import Batch, BatchResult, Outcome
from daemon.service import serve
from daemon.sink.schema import metrics_options, metrics_schema
from daemon.sink.writer import UnitWriter
from tests.support import tiny


def configured(toml: Path, inbox: Path, **flags: object) -> Config:
    settings = {
        "inbox.path": inbox,
        "outbox.path": inbox.parent / "outbox",
        "inbox.settle_seconds": 0,
        "http.enabled": False,
        **{key.replace("__", "."): value for key, value in flags.items()},
    }
    return load_config(toml, {}, settings)


def drain(config: Config) -> tuple[Tally, list[Outcome]]:
    outcomes: list[Outcome] = []
    return serve(config, once=True, on_outcome=outcomes.append), outcomes


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_every_record_comes_out_with_every_column(tiny_toml, inbox):
    records = tiny.contrast_records(50)
    tiny.write_json(inbox / "study.json", records)
    tally, (outcome,) = drain(configured(tiny_toml, inbox))
    assert (tally.committed, tally.rows, tally.failed) == (1, 50, 0)

    table = pq.read_table(outcome.folder / "metrics.parquet")
    expected = [column.name for column in analysis_columns(("l0", "l1", "l2"), CONTRAST_RECIPE)]
    assert table.column_names == ["sample_id", "record_index", "domain", "complexity", "extra", *expected]
    assert table["sample_id"].to_pylist() == [record["id"] for record in records]
    assert table["record_index"].to_pylist() == list(range(50))
    assert json.loads(table["extra"][0].as_py()) == {"source": "made up"}
    assert {name: table[name].null_count for name in expected if table[name].null_count} == {}

    features = pq.read_table(outcome.folder / "features.parquet")
    assert len(features) == 50 * 3 * 3
    manifest = manifest_of(outcome.folder)
    assert manifest["records"] == manifest["rows"] + manifest["rejects"] == 50
    assert manifest["unit"] == outcome.unit
    assert [sae["hook"] for sae in manifest["saes"]] == [
        f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 2)
    ]
    assert all(sae["fvu"] > 0 and sae["mean_l0"] > 0 for sae in manifest["saes"])
    assert (inbox / "done" / "study.json").exists()
    assert list(inbox.glob("*.json")) == []


def test_features_fired_on_the_words_that_the_texts_say(tiny_toml, inbox):
    records = [record | {"fact": "é 🧪"} for record in tiny.contrast_records(5)]
    tiny.write_json(inbox / "study.json", records)
    _, (outcome,) = drain(configured(tiny_toml, inbox, analysis__positions="all"))
    texts = pq.read_table(outcome.folder / "texts.parquet").to_pylist()
    assert [(row["record_index"], row["text"]) for row in texts] == [
        (index, text) for index in range(5) for text in ("prompt", "fact", "hall")
    ]
    assert [row["content"] for row in texts[1::3]] == [f"{record['prompt']} é 🧪" for record in records]
    by_text = {(row["record_index"], row["text"]): row for row in texts}
    decode = tiny.byte_tokenizer().decode
    for feature in pq.read_table(outcome.folder / "features.parquet").to_pylist():
        row = by_text[feature["record_index"], feature["text"]]
        place = feature["position"]
        assert row["token_ids"][place] == feature["token_id"]
        before = decode(row["token_ids"][:place], skip_special_tokens=True).rstrip("\ufffd")
        assert row["content"][: row["token_starts"][place]] == before


def test_an_outbox_without_texts_holds_none_and_is_other_work(tiny_toml, inbox):
    units = []
    for texts in (True, False, True):
        tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
        _, (outcome,) = drain(configured(tiny_toml, inbox, outbox__texts=texts))
        units.append(outcome.unit)
        names = {path.name for path in outcome.folder.iterdir()}
        assert ("texts.parquet" in names) == texts
        listed = {file["name"] for file in manifest_of(outcome.folder)["files"]}
        assert listed == names - {"manifest.json"}
    assert outcome.kind == "duplicate"
    assert units[0] == units[2] != units[1]
    prompt = tiny.contrast_records(1)[0]["prompt"].encode()
    without = next(path for path in outcome.folder.parent.iterdir() if path.name.endswith(units[1]))
    assert not any(prompt in path.read_bytes() for path in without.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_results_do_not_depend_on_batch_size_or_company(dtype, tiny_toml, inbox):
    """In float64 but for rounding; else to the last bit."""
    records = tiny.contrast_records(40)
    tables: list[pa.Table] = []
    features: list[pa.Table] = []
    for number, flags in enumerate(
        ({"batching__max_batch_samples": 1}, {"batching__max_batch_tokens": 100_000})
    ):
        folder = inbox.parent / str(number)
        (folder / "inbox").mkdir(parents=True)
        tiny.write_json(folder / "inbox" / "a.json", records)
        if number:
            tiny.write_json(folder / "inbox" / "other.json", tiny.contrast_records(13)[3:])
        _, outcomes = drain(configured(tiny_toml, folder / "inbox", model__dtype=dtype, **flags))
        folder = next(outcome.folder for outcome in outcomes if outcome.name == "a.json")
        tables.append(pq.read_table(folder / "metrics.parquet"))
        features.append(pq.read_table(folder / "features.parquet"))
    if dtype != "float64" and routines() is not None:
        assert tables[0].equals(tables[1])
        assert features[0].equals(features[1])
    for name in tables[0].column_names:
        first, second = (table[name].to_pylist() for table in tables)
        if isinstance(first[0], float):
            assert first == pytest.approx(second, abs=1e-9 if dtype == "float64" else 1e-3), name
        else:
            assert first == second, name


def test_the_same_content_is_recognised(tiny_toml, inbox):
    records = tiny.contrast_records(5)
    tiny.write_json(inbox / "first.json", records)
    tiny.write_json(inbox / "second.json", records)
    config = configured(tiny_toml, inbox)
    tally, _ = drain(config)
    assert (tally.committed, tally.duplicate) == (1, 1)
    tiny.write_json(inbox / "third.json", records)
    tally, (outcome,) = drain(config)
    assert outcome.kind == "duplicate"
    assert outcome.folder is not None
    assert len(list(config.outbox.path.glob("*/manifest.json"))) == 1
    assert sorted(path.name for path in (inbox / "done").iterdir()) == [
        "first.json",
        "second.json",
        "third.json",
    ]


def test_another_seed_is_another_unit(tiny_toml, inbox):
    for seed in (0, 1):
        tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
        tally, _ = drain(configured(tiny_toml, inbox, analysis__seed=seed))
        assert tally.committed == 1


def test_content_published_under_an_older_analysis_is_new_work(tiny_toml, inbox, monkeypatch):
    records = tiny.contrast_records(3)
    config = configured(tiny_toml, inbox)
    folders = []
    for version in (ANALYSIS_VERSION - 1, ANALYSIS_VERSION, ANALYSIS_VERSION):
        monkeypatch.setattr("daemon.wiring.ANALYSIS_VERSION", version)
        tiny.write_json(inbox / "study.json", records)
        _, (outcome,) = drain(config)
        folders.append((outcome.kind, outcome.folder))
    assert [kind for kind, _ in folders] == ["committed", "committed", "duplicate"]
    assert folders[0][1] != folders[1][1] == folders[2][1]
    assert manifest_of(folders[1][1])["analysis_version"] == ANALYSIS_VERSION == 4


@pytest.fixture
def add_column() -> Iterator[Callable[[], None]]:
    """A function that adds a column, as another version of lensd would have it."""

    def answer(layer: LayerActivations) -> torch.Tensor:
        return torch.full_like(layer.acts.counts, 42)

    def forget_schemas() -> None:
        metrics_schema.cache_clear()
        metrics_options.cache_clear()

    def add() -> None:
        layer_column("int", unit="", meaning="the answer")(answer)
        forget_schemas()

    before = LAYER_COLUMNS[:]
    yield add
    LAYER_COLUMNS[:] = before
    forget_schemas()


def test_content_published_before_a_column_was_added_is_new_work(tiny_toml, inbox, add_column):
    config = configured(tiny_toml, inbox)
    outcomes = []
    for adds in (False, True, False):
        if adds:
            add_column()
        tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
        outcomes += drain(config)[1]
    assert [outcome.kind for outcome in outcomes] == ["committed", "committed", "duplicate"]
    tables = [pq.read_table(outcome.folder / "metrics.parquet") for outcome in outcomes[:2]]
    assert set(tables[1].column_names) - set(tables[0].column_names) == {
        f"l{layer}_{text}_answer" for layer in (0, 1, 2) for text in ("prompt", "fact", "hall")
    }


@pytest.mark.parametrize("what", ["rope_theta", "rms_norm_eps", "tokenizer", "k", "apply_b_dec_to_input"])
def test_content_read_under_other_settings_of_a_model_or_dictionary_is_new_work(what, inbox, tmp_path):
    """The weights are the same files; a setting beside them was mended."""
    made = tiny.make_tiny(tmp_path)
    topk = tiny.save_sae(tmp_path / "topk", "blocks.1.hook_resid_post", architecture="topk")
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(made.model, (topk,)).toml())
    outcomes = []
    for _ in range(2):
        tiny.write_json(inbox / "study.json", tiny.contrast_records(2))
        outcomes += drain(configured(toml, inbox))[1]
        if what == "tokenizer":
            settings = json.loads((made.model / "tokenizer.json").read_text())
            settings["pre_tokenizer"]["add_prefix_space"] = True
            (made.model / "tokenizer.json").write_text(json.dumps(settings))
        elif what in ("k", "apply_b_dec_to_input"):
            tiny.overwrite_sae_config(topk, **{what: 6 if what == "k" else False})
        else:
            settings = json.loads((made.model / "config.json").read_text())
            at = settings["rope_parameters"] if what == "rope_theta" else settings
            at[what] = 500.0 if what == "rope_theta" else 1e-2
            (made.model / "config.json").write_text(json.dumps(settings))
    assert [outcome.kind for outcome in outcomes] == ["committed", "committed"]
    assert outcomes[0].unit != outcomes[1].unit


def test_a_rendered_text_counts_its_bos_once(tiny_toml, inbox):
    texts = ("hello there", "<bos>hello there")
    for positions in ("last", "all", "mean"):
        (inbox / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
        _, (outcome,) = drain(configured(tiny_toml, inbox, analysis__positions=positions))
        plain, rendered = pq.read_table(outcome.folder / "metrics.parquet").to_pylist()
        assert plain["n_tokens_text"] == rendered["n_tokens_text"] == len("hello there") + 1
        for name in plain.keys() - {"sample_id", "record_index"}:
            assert plain[name] == rendered[name], name
        features = pq.read_table(outcome.folder / "features.parquet").drop_columns(["sample_id"])
        of_each = [
            features.filter(pc.equal(features["record_index"], i)).drop_columns(["record_index"]).to_pylist()
            for i in (0, 1)
        ]
        assert of_each[0] == of_each[1]


def test_a_dictionary_unlike_its_card_is_told(tmp_path, inbox):
    model = tiny.save_llama(tmp_path / "model")
    cards = ({"expected_l0": 1.0, "expected_fvu": 0.9}, {"expected_l0": 1000}, {})
    saes = tuple(
        tiny.save_sae(tmp_path / str(layer), f"blocks.{layer}.hook_resid_post", seed=layer, **card)
        for layer, card in enumerate(cards)
    )
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, saes).toml())
    tiny.write_json(inbox / "a.json", tiny.contrast_records(30))
    tiny.write_json(inbox / "few.json", tiny.contrast_records(10))
    with capture_logs() as logs:
        _, outcomes = drain(configured(toml, inbox))
    told = [entry for entry in logs if entry["event"] == "sae.departs"]
    assert {(entry["file"], entry["hook_name"]) for entry in told} == {
        ("a.json", f"blocks.{layer}.hook_resid_post") for layer in (0, 1)
    }
    manifests = {outcome.name: manifest_of(outcome.folder) for outcome in outcomes}
    of_each = manifests["a.json"]["saes"]
    assert [sae["far_from_card"] for sae in of_each] == [["l0", "fvu"], ["l0"], None]
    assert of_each[0]["card"] == {"mean_l0": 1.0, "fvu": 0.9}
    assert [sae["far_from_card"] for sae in manifests["few.json"]["saes"]] == [None] * 3
    # a pooled reading has more features than any token: no card is about that
    tiny.write_json(inbox / "a.json", tiny.contrast_records(30))
    _, (outcome,) = drain(configured(toml, inbox, analysis__positions="mean"))
    assert [sae["far_from_card"] for sae in manifest_of(outcome.folder)["saes"]] == [None] * 3


def test_plain_records_have_no_contrast_columns(tiny_toml, inbox):
    (inbox / "plain.jsonl").write_text('{"text": "hello there"}\n{"text": "and good bye"}\n')
    _, (outcome,) = drain(configured(tiny_toml, inbox))
    table = pq.read_table(outcome.folder / "metrics.parquet")
    assert table["sample_id"].to_pylist() == ["0", "1"]
    assert "l0_text_gini" in table.column_names
    assert "stability_diff" not in table.column_names


def test_configured_texts_name_the_columns(tiny_toml, inbox):
    (inbox / "qa.jsonl").write_text('{"q": "who", "a": "me", "b": "you"}\n')
    config = configured(
        tiny_toml,
        inbox,
        texts={"ask": "{q}", "yes": "{q} {a}", "no": "{q} {b}"},
        contrast={"reference": "ask", "positive": "yes", "negative": "no"},
    )
    _, (outcome,) = drain(config)
    names = pq.read_schema(outcome.folder / "metrics.parquet").names
    assert {"l1_ask_gini", "stability_yes", "stability_no_std", "axis_twist_diff"} <= set(names)


def test_a_mixed_inbox_accounts_for_everything(tiny_toml, inbox):
    good = tiny.contrast_records(20)
    tiny.write_json(inbox / "good.json", good)
    (inbox / "good.jsonl").write_text("\n".join(json.dumps(record) for record in good[:7]))
    (inbox / "truncated.json").write_text(json.dumps(good)[:-30])
    (inbox / "empty.json").write_bytes(b"")
    fifty = [json.dumps(record) for record in tiny.contrast_records(50)]
    fifty[3], fifty[20], fifty[49] = (
        '{"prompt": "only"}',
        "{oops",
        '{"prompt": "x", "fact": NaN, "hallucination": "y"}',
    )
    (inbox / "three-bad.jsonl").write_text("\n".join(fifty))
    (inbox / "binary.json").write_bytes(bytes(range(256)) * 10)
    (inbox / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))
    (inbox / "folder").mkdir()
    (inbox / "link.json").symlink_to(inbox / "good.json")
    (inbox / "half.json.tmp").write_text("[")
    config = configured(tiny_toml, inbox)
    tally, outcomes = drain(config)

    assert (tally.committed, tally.failed, tally.left) == (3, 3, 0)
    assert (tally.rows, tally.rejects) == (20 + 7 + 47, 3)
    ended = {outcome.name: outcome for outcome in outcomes}
    assert {name for name, outcome in ended.items() if outcome.kind == "failed"} == {
        "truncated.json",
        "empty.json",
        "binary.json",
    }
    for name in ("truncated.json", "empty.json", "binary.json"):
        reason = json.loads((inbox / "failed" / f"{name}.reason.json").read_text())
        assert (inbox / "failed" / name).is_file()
        assert reason["reason"] == ended[name].reason
        assert reason["message"]
    folder = ended["three-bad.jsonl"].folder
    manifest = manifest_of(folder)
    assert manifest["records"] == manifest["rows"] + manifest["rejects"] == 50
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["record_index"], reject["line"]) for reject in rejects] == [(3, 4), (20, 21), (49, 50)]
    assert [reject["reason"] for reject in rejects] == ["missing_field", "malformed_json", "not_finite"]
    left = {path.name for path in inbox.iterdir() if not path.name.startswith(".")}
    assert left == {"done", "failed", "folder", "link.json", "half.json.tmp", "picture.png"}
    assert [path for path in (config.outbox.path / ".staging").iterdir() if path.is_dir()] == []


def test_texts_too_long_or_empty_are_rejects(tiny_toml, inbox):
    (inbox / "t.jsonl").write_text(
        json.dumps({"text": "x" * 99}) + "\n" + json.dumps({"text": ""}) + "\n" + json.dumps({"text": "fine"})
    )
    _, (outcome,) = drain(configured(tiny_toml, inbox, batching__max_text_tokens=50))
    rejects = [json.loads(line) for line in (outcome.folder / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["record_index"], reject["reason"]) for reject in rejects] == [
        (0, "text_too_long"),
        (1, "empty_text"),
    ]
    assert outcome.rows == 1


def test_a_text_of_more_tokens_than_the_model_has_positions_is_a_reject(tmp_path, inbox):
    model = tiny.save_gpt2(tmp_path / "model")
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    texts = ("x" * 511, "x" * 512, "fine")  # and BOS
    (inbox / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, (sae,)).toml())
    _, (outcome,) = drain(configured(toml, inbox))
    assert (outcome.kind, outcome.rows, outcome.rejects) == ("committed", 2, 1)
    (reject,) = map(json.loads, (outcome.folder / "rejects.jsonl").read_text().splitlines())
    assert (reject["record_index"], reject["reason"]) == (1, "text_too_long")


def test_a_token_that_the_model_has_no_embedding_for_costs_its_record_alone(tmp_path, inbox):
    model = tiny.save_llama(tmp_path / "model")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(model)
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, (tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post"),)).toml())
    tiny.write_json(inbox / "t.json", [{"text": text} for text in ("fine", "an <extra> one", "fine too")])
    _, (outcome,) = drain(configured(toml, inbox))
    assert manifest_of(outcome.folder)["rows"] == 2
    (reject,) = [json.loads(line) for line in (outcome.folder / "rejects.jsonl").read_text().splitlines()]
    assert (reject["reason"], reject["record_index"]) == ("unknown_token", 1)


def test_a_file_that_breaks_after_some_parts_fails_whole(tiny_toml, inbox):
    import gzip

    lines = "\n".join(json.dumps(record) for record in tiny.contrast_records(40)).encode()
    (inbox / "broken.jsonl.gz").write_bytes(gzip.compress(lines)[:-20])
    tiny.write_json(inbox / "fine.json", tiny.contrast_records(3))
    tally, _ = drain(configured(tiny_toml, inbox, inbox__part_records=4))
    assert (tally.committed, tally.failed) == (1, 1)
    reason = json.loads((inbox / "failed" / "broken.jsonl.gz.reason.json").read_text())
    assert reason["reason"] == "corrupt_compression"


@pytest.mark.parametrize("positions", ["last", "mean", "max", "all"])
def test_the_largest_activation_is_of_what_the_norm_is_of(positions, tiny_toml, inbox):
    """Of the stored features: the last token's, or those that are pooled."""
    tiny.write_json(inbox / "study.json", tiny.contrast_records(5))
    _, (outcome,) = drain(configured(tiny_toml, inbox, analysis__positions=positions))
    metrics = pq.read_table(outcome.folder / "metrics.parquet").to_pylist()
    stored = {}  # of several positions the last one stays
    for row in pq.read_table(outcome.folder / "features.parquet").to_pylist():
        stored[row["record_index"], row["text"], row["layer"]] = row["values"]
    assert len(stored) == 5 * 3 * 3
    for (record, text, layer), values in stored.items():
        column = f"l{layer}_{text}"
        assert metrics[record][f"{column}_max_activation"] == max(values, default=0.0)
        assert metrics[record][f"{column}_l2_norm"] == pytest.approx(sum(v * v for v in values) ** 0.5)


def test_many_parts_of_a_file_stay_in_order(tiny_toml, inbox):
    records = tiny.contrast_records(57)
    tiny.write_json(inbox / "parts.json", records)
    _, (outcome,) = drain(configured(tiny_toml, inbox, inbox__part_records=5, batching__max_batch_tokens=200))
    table = pq.read_table(outcome.folder / "metrics.parquet")
    assert table["record_index"].to_pylist() == list(range(57))


def test_sources_can_be_deleted_instead_of_kept(tiny_toml, inbox):
    tiny.write_json(inbox / "study.json", tiny.contrast_records(2))
    drain(configured(tiny_toml, inbox, inbox__on_success="delete"))
    assert not (inbox / "study.json").exists()
    assert list((inbox / "done").iterdir()) == []


def test_folders_on_two_file_systems_are_refused(tiny_toml, inbox):
    other = Path("/dev/shm")
    if not other.is_dir() or os.stat(other).st_dev == os.stat(inbox).st_dev:
        pytest.skip("no second file system here")
    config = configured(tiny_toml, inbox, outbox__path=other / f"lensd-{os.getpid()}")
    try:
        with pytest.raises(ConfigError, match="different file systems"):
            drain(config)
    finally:
        config.outbox.path.rmdir()


def test_one_folder_for_both_is_refused(tiny_toml, inbox):
    with pytest.raises(ConfigError, match="are the same folder"):
        drain(configured(tiny_toml, inbox, outbox__path=inbox))


class BrokenDevice(RuntimeError):
    pass


def test_a_crashing_engine_commits_nothing_and_the_file_is_taken_up_again(tiny_toml, inbox, monkeypatch):
    tiny.write_json(inbox / "study.json", tiny.contrast_records(30))
    config = configured(tiny_toml, inbox, batching__max_batch_samples=8)
    run, calls = BatchRunner.run, []

    def crash(study: BatchRunner, batch: Batch) -> BatchResult:
        calls.append(batch)
        if len(calls) == 3:
            raise BrokenDevice
        return run(study, batch)

    monkeypatch.setattr(BatchRunner, "run", crash)
    with pytest.raises(ExceptionGroup) as caught:
        drain(config)
    assert caught.group_contains(BrokenDevice)
    assert list(config.outbox.path.glob("*/manifest.json")) == []
    assert [path.name for path in inbox.glob(".claimed/*/1/*")] == ["study.json"]

    monkeypatch.setattr(BatchRunner, "run", run)
    tally, (outcome,) = drain(config)
    assert (tally.committed, outcome.rows) == (1, 30)
    assert list(inbox.glob(".claimed/*")) == []
    assert [path.name for path in config.outbox.path.iterdir() if not path.name.startswith(".")] == [
        outcome.folder.name
    ]


def test_a_file_written_to_while_it_is_read_is_read_again(tiny_toml, inbox, monkeypatch):
    path = inbox / "study.jsonl"
    path.write_text(json.dumps({"text": "first"}) + "\n")
    writer = path.open("a")
    run = BatchRunner.run

    def write_meanwhile(study: BatchRunner, batch: Batch) -> BatchResult:
        if not writer.closed:
            writer.write(json.dumps({"text": "second"}) + "\n")
            writer.close()
        return run(study, batch)

    monkeypatch.setattr(BatchRunner, "run", write_meanwhile)
    tally, outcomes = drain(configured(tiny_toml, inbox))
    assert [outcome.kind for outcome in outcomes] == ["requeued", "committed"]
    assert (tally.requeued, tally.committed, tally.rows) == (1, 1, 2)
    assert len(list((inbox.parent / "outbox").glob("*/manifest.json"))) == 1


def batches_of(monkeypatch, fail=lambda batch: None) -> list[list[str]]:
    """Sample ids of every batch that reaches the device, where `fail` may raise."""
    batches: list[list[str]] = []
    begin = BatchRunner.begin

    def watched(self: BatchRunner, batch: Batch) -> BegunBatch:
        batches.append([sample.sample.sample_id for sample in batch.samples])
        fail(batch)
        return begin(self, batch)

    monkeypatch.setattr(BatchRunner, "begin", watched)
    return batches


def test_work_on_a_large_file_resumes_with_the_parts_that_are_missing(tiny_toml, inbox, monkeypatch):
    records = tiny.contrast_records(40)
    (inbox / "large.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = configured(tiny_toml, inbox, inbox__part_records=4, batching__window_tokens=1)
    written: list[Path] = []

    def break_late(batch: Batch) -> None:
        if len(batches) == 8:
            while len(written) < 3:
                written[:] = config.outbox.path.glob(".staging/*/*.parts/??????")
            raise BrokenDevice

    with pytest.MonkeyPatch.context() as patch:
        batches = batches_of(patch, break_late)
        with pytest.raises(ExceptionGroup):
            drain(config)
    written = list(config.outbox.path.glob(".staging/*/*.parts/??????"))

    batches = batches_of(monkeypatch)
    tally, (outcome,) = drain(config)
    assert (tally.committed, outcome.rows) == (1, 40)
    recomputed = {sample_id for batch in batches for sample_id in batch}
    kept = {
        records[4 * int(path.name) + row]["id"]
        for path in written
        if path.suffix != ".tmp"
        for row in range(4)
    }
    assert recomputed == {record["id"] for record in records} - kept
    whole = pq.read_table(outcome.folder / "metrics.parquet")
    assert whole["record_index"].to_pylist() == list(range(40))
    assert list((config.outbox.path / ".staging").glob("*/")) == []

    fresh = inbox.parent / "fresh"
    (fresh / "inbox").mkdir(parents=True)
    shutil.copy(inbox / "done/large.jsonl", fresh / "inbox")
    _, (again,) = drain(configured(tiny_toml, fresh / "inbox"))
    assert pq.read_table(again.folder / "metrics.parquet")["record_index"].equals(whole["record_index"])


def test_parts_that_were_stored_before_a_column_was_added_are_computed_again(tiny_toml, inbox, add_column):
    records = tiny.contrast_records(40)
    (inbox / "large.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = configured(tiny_toml, inbox, inbox__part_records=4)

    def refuse(self: UnitWriter) -> None:
        raise BrokenDevice

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(UnitWriter, "write", refuse)
        with pytest.raises(ExceptionGroup):
            drain(config)
    assert len(list(config.outbox.path.glob(".staging/*/*.parts/??????"))) == 10
    add_column()
    tally, (outcome,) = drain(config)
    assert (tally.committed, outcome.rows) == (1, 40)
    table = pq.read_table(outcome.folder / "metrics.parquet")
    assert table["l2_hall_answer"].to_pylist() == [42] * 40


def test_batches_that_overlap_give_what_they_give_one_by_one(tiny_toml, inbox, monkeypatch):
    tiny.write_json(inbox / "study.json", tiny.contrast_records(40))
    config = configured(tiny_toml, inbox, batching__max_batch_samples=7)
    _, (one_by_one,) = drain(config)
    expected = pq.read_table(one_by_one.folder / "metrics.parquet")
    shutil.rmtree(one_by_one.folder)
    (inbox / "done/study.json").rename(inbox / "study.json")
    monkeypatch.setattr("daemon.executor.runner.on_cuda", lambda device: True)
    ends: list[str] = []
    begin, finish = BatchRunner.begin, BatchRunner.finish
    monkeypatch.setattr(
        BatchRunner, "begin", lambda self, batch: (ends.append("begin"), begin(self, batch))[1]
    )
    monkeypatch.setattr(
        BatchRunner, "finish", lambda self, begun: (ends.append("finish"), finish(self, begun))[1]
    )
    tally, (outcome,) = drain(config)
    assert tally.rows == 40
    assert ends == ["begin", *["begin", "finish"] * 5, "finish"]
    assert pq.read_table(outcome.folder / "metrics.parquet").equals(expected)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_batch_beyond_memory_is_halved_and_a_sample_beyond_it_set_aside(
    overlap, tiny_toml, inbox, monkeypatch
):
    monkeypatch.setattr("daemon.executor.runner.on_cuda", lambda device: overlap)
    tiny.write_json(inbox / "study.json", tiny.contrast_records(30))

    def small_device(batch: Batch) -> None:
        ids = [sample.sample.sample_id for sample in batch.samples]
        if len(ids) > 5 or "s7" in ids:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ...")

    batches = batches_of(monkeypatch, small_device)
    tally, (outcome,) = drain(configured(tiny_toml, inbox))
    assert (tally.rows, tally.rejects) == (29, 1)
    (reject,) = [json.loads(line) for line in (outcome.folder / "rejects.jsonl").read_text().splitlines()]
    assert (reject["id"], reject["record_index"], reject["reason"]) == ("s7", 7, "out_of_memory")
    assert max(map(len, batches)) > 5
    assert ["s7"] in batches
    metrics = pq.read_table(outcome.folder / "metrics.parquet")
    assert metrics["sample_id"].to_pylist() == [f"s{i}" for i in range(30) if i != 7]


def test_a_file_that_breaks_the_process_each_time_fails_and_its_neighbours_do_not(
    tiny_toml, inbox, monkeypatch
):
    for name in ("a", "poison", "z"):
        records = [{"id": f"{name}{i}", "text": f"{name} {i}"} for i in range(3)]
        tiny.write_json(inbox / f"{name}.json", records)
    config = configured(tiny_toml, inbox)

    def poisoned(batch: Batch) -> None:
        if any(sample.sample.sample_id.startswith("poison") for sample in batch.samples):
            raise BrokenDevice

    batches_of(monkeypatch, poisoned)
    for _ in range(3):
        with pytest.raises(ExceptionGroup):
            drain(config)
    tally, _ = drain(config)
    assert tally.failed == 1
    reason = json.loads((inbox / "failed/poison.json.reason.json").read_text())
    assert (reason["reason"], reason["attempt"]) == ("attempts_exhausted", 3)
    assert sorted(path.name for path in (inbox / "done").iterdir()) == ["a.json", "z.json"]


def test_a_disk_below_its_floor_is_the_machines_failure(tiny_toml, inbox):
    tiny.write_json(inbox / "study.json", tiny.contrast_records(3))
    with pytest.raises(MachineError, match=r"outbox\.min_free_bytes"):
        drain(configured(tiny_toml, inbox, outbox__min_free_bytes=1 << 60))
    assert (inbox / "study.json").exists()


def test_every_token_of_a_document_is_stored_and_its_last_one_analysed(tiny_toml, inbox):
    texts = [f"Document {n} " + "abc " * (n % 9) for n in range(40)]
    lines = "".join(json.dumps({"id": f"d{n}", "text": text}) + "\n" for n, text in enumerate(texts))
    found = {}
    for positions in ("last", "all"):
        (inbox / "docs.jsonl").write_text(lines)
        flags = {
            "analysis__positions": positions,
            "inbox__part_records": 7,
            "batching__max_batch_tokens": 256,
        }
        (outcome,) = drain(configured(tiny_toml, inbox, **flags))[1]
        found[positions] = [
            pq.read_table(outcome.folder / f"{name}.parquet") for name in ("metrics", "features")
        ]
    metrics, every = found["all"]
    assert metrics["sample_id"].to_pylist() == [f"d{n}" for n in range(40)]
    keys = every.select(["record_index", "layer", "position"]).to_pylist()
    assert [tuple(key.values()) for key in keys] == [
        (n, layer, position)
        for n, text in enumerate(texts)
        for layer in (0, 1, 2)
        for position in range(1, len(text) + 1)  # a token is a byte; BOS, at 0, is not stored
    ]
    last = [row for row in every.to_pylist() if row["position"] == len(texts[row["record_index"]])]
    for row, alone in zip(last, found["last"][1].to_pylist(), strict=True):
        assert row["token_id"] == alone["token_id"]
        assert row["indices"] == alone["indices"]
        assert row["values"] == pytest.approx(alone["values"], rel=1e-4)
    for name in ("l0_text_l0_norm", "l2_text_gini"):
        assert metrics[name].to_pylist() == pytest.approx(found["last"][0][name].to_pylist(), rel=1e-4)


@pytest.mark.parametrize("positions", ["mean", "max"])
def test_pooled_features_come_out_as_one_row_without_a_position(positions, tiny_toml, inbox):
    tiny.write_json(inbox / "study.json", tiny.contrast_records(6))
    (outcome,) = drain(configured(tiny_toml, inbox, analysis__positions=positions))[1]
    assert outcome.kind == "committed"
    features = pq.read_table(outcome.folder / "features.parquet")
    assert len(features) == 6 * 3 * 3
    assert set(features["position"].to_pylist()) == set(features["token_id"].to_pylist()) == {-1}
    metrics = pq.read_table(outcome.folder / "metrics.parquet")
    assert metrics["stability_diff"].null_count == 6
    assert metrics["l0_fact_reconstruction_error"].null_count == (6 if positions == "max" else 0)
    assert metrics["entropy_diff"].null_count == 0
    assert (manifest_of(outcome.folder)["saes"][0]["fvu"] is None) == (positions == "max")
