"""Numbers beyond what the types of a model or a dictionary hold: a reject or null, never a number."""

from __future__ import annotations

import json
import math
from pathlib import Path
from string import ascii_uppercase
from typing import Any, NoReturn

import pyarrow.parquet as pq
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM

from daemon.config import Config, load_config
from daemon.model.probe import packed_texts
from daemon.model.trie_engine import CannotPack
from daemon.records import Outcome
from daemon.service import serve
from tests.support import tiny

TOKENIZER = tiny.byte_tokenizer()
LAYERS = (0, 1, 2)
HOOKS = tuple(f"blocks.{layer}.hook_resid_post" for layer in LAYERS)
# A letter that the probe of the packed engine does not read, and the token that batches are padded with.
PROBED = {token for text in packed_texts(tiny.BOS + 1) for token in text}
UNPROBED = next(letter for letter in ascii_uppercase if TOKENIZER(letter)["input_ids"][0] not in PROBED)
PADDING = TOKENIZER.decode([0])


def save_overflowing(folder: Path, letter: str, dtype: torch.dtype = torch.float32) -> Path:
    """A Llama of finite weights whose first MLP gives no finite number for one letter, and for no other.

    The letter alone has a first coordinate, which one neuron reads, by weights whose square overflows.
    """
    model = AutoModelForCausalLM.from_pretrained(tiny.save_llama(folder, n_layers=4), dtype=dtype)
    layer = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[TOKENIZER(letter)["input_ids"][0], 0] = 1
        layer.self_attn.o_proj.weight[0] = 0
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[:, 0] = 0
            linear.weight[5, 0] = torch.finfo(dtype).max ** 0.6
    model.save_pretrained(folder)
    return folder


def save_louder(folder: Path) -> Path:
    """A Llama whose residuals are of the order of 100."""
    model = AutoModelForCausalLM.from_pretrained(tiny.save_llama(folder))
    model.model.embed_tokens.weight.data *= 5000
    model.save_pretrained(folder)
    return folder


def save_scaled(
    folder: Path, hook_name: str, *, encoder: float = 1, decoder: float = 1, **options: Any
) -> Path:
    sae = tiny.random_sae(hook_name, **options)
    sae.W_enc.data *= encoder
    sae.W_dec.data *= decoder
    sae.save_model(folder)
    return folder


def toml_of(folder: Path, model: Path, hooks: tuple[str, ...] = HOOKS) -> Path:
    saes = tuple(tiny.save_sae(folder / hook, hook, seed=i) for i, hook in enumerate(hooks))
    path = folder / "lensd.toml"
    path.write_text(tiny.Tiny(model, saes).toml())
    return path


def drain(toml: Path, folder: Path, files: dict[str, list[dict[str, Any]]], **flags: object) -> list[Outcome]:
    """Drain files of records; their outcomes, in the order of their names."""
    (folder / "inbox").mkdir(parents=True)
    for name, records in files.items():
        (folder / "inbox" / name).write_text("\n".join(map(json.dumps, records)))
    settings = {
        "inbox.path": folder / "inbox",
        "outbox.path": folder / "outbox",
        "inbox.settle_seconds": 0,
        "http.enabled": False,
        "batching.max_batch_tokens": 2048,
        **{key.replace("__", "."): value for key, value in flags.items()},
    }
    config: Config = load_config(toml, {}, settings)
    outcomes: list[Outcome] = []
    serve(config, once=True, on_outcome=outcomes.append)
    return sorted(outcomes, key=lambda outcome: outcome.name)


def rows_of(outcome: Outcome) -> dict[str, dict[str, Any]]:
    return {row["sample_id"]: row for row in pq.read_table(outcome.folder / "metrics.parquet").to_pylist()}


def rejects_of(outcome: Outcome) -> dict[str, dict[str, Any]]:
    path = outcome.folder / "rejects.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {reject["id"]: reject for reject in map(json.loads, lines)}


def manifest_of(outcome: Outcome) -> dict[str, Any]:
    return json.loads((outcome.folder / "manifest.json").read_text())


def texts(n: int) -> list[dict[str, Any]]:
    return [{"id": f"s{i}", "text": "the number " + "one " * (i % 5) + f"is {i}"} for i in range(n)]


def contrasts(n: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"s{i}",
            "prompt": f"what is {i} plus {i % 3}?",
            "fact": "it is so",
            "hallucination": "a" * (i + 1),
        }
        for i in range(n)
    ]


def assert_same_rows(got: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert got.keys() == expected.keys()
    for sample_id, row in expected.items():
        for name, value in row.items():
            if isinstance(value, float):
                assert got[sample_id][name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
            elif name != "record_index":
                assert got[sample_id][name] == value, name


def assert_accounted(outcome: Outcome, records: int) -> None:
    manifest = manifest_of(outcome)
    assert (manifest["records"], manifest["rows"] + manifest["rejects"]) == (records, records)
    features = pq.read_table(outcome.folder / "features.parquet")
    metrics = pq.read_table(outcome.folder / "metrics.parquet")
    assert set(features["sample_id"].to_pylist()) == set(metrics["sample_id"].to_pylist())
    for column in metrics.schema:
        if column.type == "double":
            numbers = [value for value in metrics[column.name].to_pylist() if value is not None]
            assert all(map(math.isfinite, numbers)), column.name
    for values in features["values"].to_pylist():
        assert all(value is not None and math.isfinite(value) for value in values)


def unpackable(*_: object, **__: object) -> NoReturn:
    raise CannotPack("the test wants the other engine", model_changed=False)


@pytest.fixture(params=["packed", "padded"])
def engine(request, monkeypatch) -> str:
    if request.param == "padded":
        monkeypatch.setattr("daemon.model_wiring.TrieEngine", unpackable)
    return request.param


@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_one_bad_sample_among_good_ones_is_rejected_alone(tmp_path, engine, positions):
    model = save_overflowing(tmp_path / "model", UNPROBED, torch.float64)
    toml = toml_of(tmp_path, model, (*HOOKS[:2], "blocks.2.hook_mlp_out"))
    good = texts(20)
    bad = {"id": "bad", "text": f"the number {UNPROBED} is 3"}
    flags = {"analysis__positions": positions, "model__dtype": "float64"}
    (alone,) = drain(toml, tmp_path / "alone", {"a.jsonl": good}, **flags)
    (mixed,) = drain(toml, tmp_path / "mixed", {"a.jsonl": [*good[:10], bad, *good[10:]]}, **flags)
    assert manifest_of(mixed)["model"]["engine"] == engine
    assert_accounted(mixed, 21)
    (reject,) = rejects_of(mixed).values()
    assert (reject["id"], reject["record_index"], reject["reason"]) == ("bad", 10, "not_finite_activation")
    assert "text 'text'" in reject["message"]
    assert "blocks.0.hook_resid_post" in reject["message"] or positions == "last"
    assert "float64" in reject["message"]
    assert_same_rows(rows_of(mixed), rows_of(alone), 1e-9)
    for got, expected in zip(manifest_of(mixed)["saes"], manifest_of(alone)["saes"], strict=True):
        assert got["mean_l0"] == pytest.approx(expected["mean_l0"], rel=1e-9)
        assert got["fvu"] == (None if positions == "max" else pytest.approx(expected["fvu"], rel=1e-9))


@pytest.mark.parametrize("letter", [UNPROBED, PADDING])
def test_the_token_that_fills_batches_spoils_no_text(tmp_path, engine, letter):
    """A padded batch is filled up with a token that overflows here; so may be a packed one."""
    toml = toml_of(tmp_path, save_overflowing(tmp_path / "model", letter), ("blocks.2.hook_mlp_out",))
    records = contrasts(12)
    (outcome,) = drain(toml, tmp_path / "run", {"a.jsonl": records})
    assert (outcome.rows, outcome.rejects) == (12, 0)
    (other,) = drain(toml, tmp_path / "one", {"a.jsonl": records}, batching__max_batch_samples=1)
    for sample_id, row in rows_of(other).items():
        assert rows_of(outcome)[sample_id]["l2_fact_l2_norm"] == pytest.approx(
            row["l2_fact_l2_norm"], rel=1e-4
        )


def test_a_contrast_with_one_bad_text_is_one_reject_that_names_it(tmp_path):
    toml = toml_of(tmp_path, save_overflowing(tmp_path / "model", UNPROBED))
    records = contrasts(9)
    records[4]["hallucination"] = f"{UNPROBED}b"
    (outcome,) = drain(toml, tmp_path / "run", {"a.jsonl": records})
    assert_accounted(outcome, 9)
    (reject,) = rejects_of(outcome).values()
    assert reject["id"] == "s4"
    assert "text 'hall'" in reject["message"]
    assert "float32" in reject["message"]
    assert "set model.dtype to float64" in reject["message"]


def test_a_token_that_no_sae_reads_rejects_nothing(tmp_path):
    """The last token's residual after the layer that overflows for an earlier one is finite, and right."""
    model = save_overflowing(tmp_path / "model", UNPROBED)
    toml = toml_of(tmp_path, model, HOOKS[:1])
    text = f"the {UNPROBED} is 3"
    (outcome,) = drain(toml, tmp_path / "run", {"a.jsonl": [{"id": "s", "text": text}, *texts(3)[1:]]})
    assert outcome.rejects == 0
    hf = AutoModelForCausalLM.from_pretrained(model)
    ids = [tiny.BOS, *TOKENIZER(text)["input_ids"]]
    with torch.no_grad():
        x = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1:]
        features = SAE.load_from_disk(tmp_path / HOOKS[0]).encode(x)
    assert rows_of(outcome)["s"]["l0_text_l0_norm"] == int((features > 0).sum()) > 0
    assert rows_of(outcome)["s"]["l0_text_l2_norm"] == pytest.approx(float(features.norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_residuals_beyond_float16_are_rejects_there_and_numbers_in_bfloat16(tmp_path, dtype):
    model = tiny.save_llama(tmp_path / "model", n_layers=4)
    hf = AutoModelForCausalLM.from_pretrained(model)
    for layer in hf.model.layers:
        layer.mlp.down_proj.weight.data *= 3e5
        layer.mlp.up_proj.weight.data *= 43
    hf.save_pretrained(model)
    toml = toml_of(tmp_path, model)
    (outcome,) = drain(toml, tmp_path / "run", {"a.jsonl": texts(6)}, model__dtype=dtype)
    assert_accounted(outcome, 6)
    if dtype == "bfloat16":
        assert outcome.rejects == 0
        assert all(row["l2_text_l2_norm"] > 0 for row in rows_of(outcome).values())
        return
    half = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16)
    for record in texts(6):
        ids = torch.tensor([[tiny.BOS, *TOKENIZER(record["text"])["input_ids"]]])
        with torch.no_grad():
            states = half(ids, output_hidden_states=True).hidden_states[1:4]
        finite = all(bool(state[0, -1].isfinite().all()) for state in states)
        assert (record["id"] in rejects_of(outcome)) == (not finite)
    assert outcome.rejects > 0
    message = next(iter(rejects_of(outcome).values()))["message"]
    assert "not finite in float16: set model.dtype to bfloat16 or float32" in message


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_a_dictionary_that_overflows_rejects_and_names_its_hook(tmp_path, architecture):
    model = save_louder(tmp_path / "model")
    fine = tiny.save_sae(tmp_path / "fine", HOOKS[0])
    huge = save_scaled(tmp_path / "huge", HOOKS[1], encoder=3e38, architecture=architecture)
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(model, (fine, huge)).toml())
    (outcome,) = drain(tmp_path / "lensd.toml", tmp_path / "run", {"a.jsonl": texts(4)})
    assert (outcome.kind, outcome.reason) == ("failed", "no_usable_record")
    assert "what the SAE at blocks.1.hook_resid_post makes of it is not finite in float32" in outcome.message


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_huge_numbers_that_are_finite_stay_right(tmp_path, architecture):
    """Activations of 1e30 are numbers; their reconstruction overflows, and what depends on it is null."""
    model = tiny.save_llama(tmp_path / "model")
    folder = save_scaled(tmp_path / "sae", HOOKS[1], encoder=1e30, decoder=1e12, architecture=architecture)
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(model, (folder,)).toml())
    (outcome,) = drain(tmp_path / "lensd.toml", tmp_path / "run", {"a.jsonl": texts(4)})
    assert outcome.rejects == 0
    assert_accounted(outcome, 4)
    hf, sae = AutoModelForCausalLM.from_pretrained(model), SAE.load_from_disk(folder)
    for record in texts(4):
        ids = [tiny.BOS, *TOKENIZER(record["text"])["input_ids"]]
        with torch.no_grad():
            x = hf(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, -1:]
            features = sae.encode(x).double()
        row = rows_of(outcome)[record["id"]]
        assert row["l1_text_l0_norm"] == int((features > 0).sum())
        assert row["l1_text_l2_norm"] == pytest.approx(float(features.norm()), rel=1e-3)
        assert row["l1_text_gini"] > 0
        assert row["l1_text_shape_class"] != "None"
        assert row["l1_text_reconstruction_error"] is None
        assert row["l1_text_relative_error"] is None
    assert manifest_of(outcome)["saes"][0]["fvu"] is None
    assert manifest_of(outcome)["saes"][0]["mean_l0"] > 0


def test_many_small_files_and_one_large_one_account_for_every_record(tmp_path):
    toml = toml_of(tmp_path, save_overflowing(tmp_path / "model", UNPROBED))
    large = [
        {**record, "text": record["text"] + UNPROBED * (i % 7 == 3)} for i, record in enumerate(texts(150))
    ]
    files = {f"{i:02}.jsonl": [large[i]] for i in range(20)} | {"large.jsonl": large}
    *small, whole = drain(toml, tmp_path / "run", files, inbox__part_records=40)
    expected = {record["id"] for record in large if UNPROBED in record["text"]}
    assert set(rejects_of(whole)) == expected
    assert_accounted(whole, 150)
    for number, outcome in enumerate(small):
        if f"s{number}" in expected:
            assert (outcome.kind, outcome.reason) == ("failed", "no_usable_record")
            assert "not_finite_activation" in outcome.message
        else:
            assert outcome.rejects == 0
            assert_accounted(outcome, 1)


def test_noise_beyond_float32_leaves_stability_undefined(tmp_path):
    toml = toml_of(tmp_path, tiny.save_llama(tmp_path / "model"))
    files = {"a.jsonl": contrasts(3)}
    (outcome,) = drain(toml, tmp_path / "run", files, analysis__noise_sigma=1e39)
    for row in rows_of(outcome).values():
        assert {name: row[name] for name in row if name.startswith("stability")} == dict.fromkeys(
            [f"stability_{of}" for of in ("fact", "fact_std", "hall", "hall_std", "diff")]
        )
    (outcome,) = drain(toml, tmp_path / "small", files, analysis__noise_sigma=0.1)
    assert all(0 <= row["stability_fact"] <= 1 for row in rows_of(outcome).values())


def test_means_of_huge_numbers_are_not_infinite(tmp_path):
    """The sum over tokens overflows where each of them is finite."""
    model = tiny.save_llama(tmp_path / "model")
    folder = save_scaled(tmp_path / "sae", HOOKS[1], encoder=2e37, architecture="standard")
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(model, (folder,)).toml())
    records = [{"id": "long", "text": "a" * 200}, {"id": "short", "text": "a"}]
    flags = {"analysis__positions": "mean"}
    (outcome,) = drain(tmp_path / "lensd.toml", tmp_path / "run", {"a.jsonl": records}, **flags)
    assert_accounted(outcome, 2)
    assert set(rejects_of(outcome)) == {"long"}


@pytest.mark.parametrize("part_records", [1024, 40])
def test_activations_that_float16_does_not_hold_are_clipped_and_counted(tmp_path, part_records):
    model = tiny.save_llama(tmp_path / "model")
    folder = save_scaled(tmp_path / "sae", HOOKS[1], encoder=1e6, architecture="standard")
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(model, (folder,)).toml())
    files = {"large.jsonl": texts(90), "small.jsonl": texts(2)}
    flags = {"inbox__part_records": part_records}
    runs = [
        drain(tmp_path / "lensd.toml", tmp_path / values, files, outbox__values=values, **flags)
        for values in ("float32", "float16")
    ]
    for exact, stored in zip(*runs, strict=True):
        full, half = (
            [
                value
                for values in pq.read_table(one.folder / "features.parquet")["values"].to_pylist()
                for value in values
            ]
            for one in (exact, stored)
        )
        beyond = sum(value > 65504 for value in full)
        assert beyond > 0
        assert manifest_of(stored)["clipped"] == beyond + sum(value < 2**-24 for value in full)
        assert manifest_of(exact)["clipped"] == 0
        assert max(half) == 65504
        assert min(half) > 0
        assert_same_rows(rows_of(stored), rows_of(exact), 1e-6)
