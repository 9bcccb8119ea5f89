"""A model spread over devices gives what it gives on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers.integrations.accelerate
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs
from torch import nn
from torch.testing import assert_close

from daemon.analysis import stability
from daemon.analysis.column_inputs import StudySettings
from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.executor.runner import BatchRunner
from daemon.model.buffers import memory_bytes
from daemon.model.encoding import encoder_of
from daemon.model.engine import Engine
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.loading import check_weights
from daemon.model.placement import Placement, asked_map, free_memory, move_inputs
from daemon.model.trie_engine import CannotPack, TrieEngine
from daemon.model.unembedding import unembedding_of
from daemon.model_info import compute_devices
from daemon.native import eigen as native_eigen
from daemon.native.rmsnorm_rope_attention import routines
from daemon.recipes import CONTRAST_RECIPE
from daemon.records import BatchResult, Outcome, Positions
from daemon.service import serve
from tests.batching.test_splitting import batch_of
from tests.support import stand_in_devices, tiny
from tests.support.engines import dense, loaded, packed, padded, random_texts
from tests.support.families import save_family
from tests.test_not_finite import TOKENIZER, UNPROBED, save_overflowing

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    return [tiny.save_sae(folder / hook, hook, seed=number) for number, hook in enumerate(HOOKS)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def little_memory(monkeypatch):
    """A host whose memory holds about half of a tiny model, so that "auto" leaves the rest on the disk."""
    monkeypatch.setattr(
        transformers.integrations.accelerate, "accelerate_max_memory", lambda *_: {"cpu": 200_000}
    )


def spread(first: int | str, second: int | str, n_layers: int = 4) -> dict[str, int | str]:
    """A device map of a Llama: every second layer, and the head, are elsewhere than the rest."""
    layers = {f"model.layers.{number}": (first, second)[number % 2] for number in range(n_layers)}
    rest = dict.fromkeys(("model.embed_tokens", "model.rotary_emb"), first)
    return {**rest, **layers, "model.norm": second, "lm_head": second}


def texts() -> list[list[int]]:
    a, b, c = random_texts([90, 40, 13])
    return [a, a[:30] + b[1:], b, a[:30], c, c, c[:1], a[:30] + c[1:], b + c]


def assert_same(one, other, tolerance: float) -> None:
    """The same features, and numbers within a share of their length."""
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(dense(ours).cpu() > 0, dense(theirs).cpu() > 0)
        for a, b in (
            (dense(ours), dense(theirs)),
            (ours.x, theirs.x),
            (ours.reconstruction, theirs.reconstruction),
        ):
            difference = torch.linalg.vector_norm(a.cpu() - b.cpu())
            assert difference <= tolerance * torch.linalg.vector_norm(b.cpu())
    for ours, theirs in zip(one.stored[0].acts, other.stored[0].acts, strict=True):
        assert_close(ours.counts.cpu(), theirs.counts.cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("positions", ["last", "all", "mean"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-14)], ids=str)
def test_layers_on_the_disk_give_what_they_give_in_memory(dtype, tolerance, positions, llama, saes):
    read = [text for text in texts() if len(text) > 1]
    engine = packed(llama, saes, dtype, positions, device_map=spread("cpu", "disk"))
    assert engine.info.device == "cpu,disk"
    assert not engine.concurrent  # the hooks of a layer serve one call at a time
    assert_same(engine.extract(read), packed(llama, saes, dtype, positions).extract(read), tolerance)


def test_a_head_on_the_disk_predicts_what_it_predicts_in_memory(llama, saes):
    engine = packed(llama, saes, device_map=spread("cpu", "disk"), log_probs=True)
    got, expected = (one.extract(texts()).log_probs for one in (engine, packed(llama, saes, log_probs=True)))
    np.testing.assert_allclose(got.values, expected.values, rtol=0, atol=1e-12)


@pytest.mark.skipif(routines() is None, reason="needs the compiled code")
def test_layers_in_memory_are_fused_beside_those_on_the_disk(llama, saes):
    engine = packed(llama, saes, torch.float32, device_map=spread("cpu", "disk"))
    fused = [isinstance(layer, FusedDecoderLayer) for layer in engine._trunk.layers]
    assert fused == [True, False, True]


def test_weights_on_the_disk_are_looked_at(llama, saes, tmp_path):
    model = tmp_path / "damaged"
    model.mkdir()
    for file in llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    hf, _ = loaded(model, saes, torch.float32, device_map=spread("cpu", "disk"))
    check_weights(hf, 0)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        check_weights(hf, 1)


def test_offloaded_layers_that_can_not_be_packed_are_refused_in_one_line(saes, tmp_path):
    model = save_family(tmp_path / "bloom", "bloom")
    parts = ("transformer.word_embeddings", "transformer.word_embeddings_layernorm", "transformer.ln_f")
    layers = {f"transformer.h.{number}": ("cpu", "disk")[number % 2] for number in range(4)}
    device_map = {**dict.fromkeys([*parts, "lm_head"], "cpu"), **layers}
    with pytest.raises(CannotPack):
        packed(model, saes, device_map=device_map)
    with pytest.raises(
        ConfigError, match=r"offloaded \(cpu,disk\), which TransformerLens can't run"
    ) as caught:
        padded(model, saes, device_map=device_map)
    assert "\n" not in str(caught.value)


def test_the_padded_engine_reads_a_mapped_model(saes, tmp_path):
    model = save_family(tmp_path / "bloom", "bloom")
    engine = padded(model, saes, device_map="auto")
    assert_same(engine.extract(texts()), padded(model, saes).extract(texts()), 1e-14)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_on_a_cpu_alone_auto_changes_nothing(llama, saes):
    engine, plain = (packed(llama, saes, torch.float32, device_map=given) for given in ("auto", None))
    assert engine.info == plain.info
    assert engine.concurrent == plain.concurrent
    assert_same(engine.extract(texts()), plain.extract(texts()), 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("fits", [True, False])
def test_the_daemon_writes_the_same_rows(fits, tiny_toml, inbox, request):
    def run(**flags: str) -> tuple[Path, list[str]]:
        """The folder that comes out, and the devices over which a model was spread."""
        tiny.write_json(inbox / "study.json", tiny.contrast_records(12))
        settings = {"inbox.path": inbox, "outbox.path": inbox.parent / f"out-{len(flags)}"}
        settings |= {"inbox.settle_seconds": 0, "http.enabled": False, "batching.max_batch_tokens": 512}
        outcomes: list[Outcome] = []
        with capture_logs() as logs:
            config = load_config(
                tiny_toml, {}, settings | {f"model.{name}": to for name, to in flags.items()}
            )
            serve(config, once=True, on_outcome=outcomes.append)
        return outcomes[0].folder, [entry["devices"] for entry in logs if entry["event"] == "model.spread"]

    one, _ = run()
    if not fits:
        request.getfixturevalue("little_memory")
    other, devices = run(device="auto", device_map="auto")
    assert devices == ([] if fits else ["cpu,disk"])
    assert one.name == other.name  # the unit: results are the same, wherever they come from
    ours, theirs = (pq.read_table(folder / "metrics.parquet") for folder in (one, other))
    assert ours.schema == theirs.schema
    for name in ours.column_names:
        if ours.schema.field(name).type == "double":
            expected = pytest.approx(theirs[name].to_pylist(), rel=1e-4, abs=1e-4)
            assert ours[name].to_pylist() == expected, name
        else:
            assert ours[name].to_pylist() == theirs[name].to_pylist(), name
    first, second = (pq.read_table(folder / "features.parquet") for folder in (one, other))
    assert first.drop(["values"]).equals(second.drop(["values"]))


def test_a_device_map_beside_a_device_is_refused(tiny_toml):
    for device in ("cpu", "cuda:1"):
        with pytest.raises(
            ConfigError, match=f"device_map = 'auto' spreads .* device = '{device}' names one"
        ):
            load_config(tiny_toml, {}, {"model.device": device, "model.device_map": "auto"})
    with pytest.raises(ConfigError, match="device_map: Input should be 'none' or 'auto'"):
        load_config(tiny_toml, {}, {"model.device_map": "balanced"})


def test_a_device_map_changes_no_results(tiny_toml):
    none, auto = (
        load_config(tiny_toml, {}, {"model.device": "auto", "model.device_map": given})
        for given in ("none", "auto")
    )
    assert none.results_fingerprint() == auto.results_fingerprint()


class Spread(nn.Module):
    """A model of four layers as Accelerate leaves it, without any device."""

    def __init__(self, device_map: dict[str, int | str], main: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, device="meta") for _ in range(4))
        self.embed = nn.Embedding(2, 1, device="meta")
        self.embed._hf_hook = self._hf_hook = SimpleNamespace(execution_device=main)
        self.hf_device_map = device_map
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=4))

    @property
    def base_model(self) -> nn.Module:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embed


def test_devices_are_named_in_order_and_then_what_else_holds_weights():
    device_map = {"embed": 0, "layers.0": 0, "layers.1": 1, "layers.2": "cpu", "layers.3.weight": "disk"}
    placement = Placement.of(Spread(device_map, main=0))
    assert placement.name == "cuda:0,cuda:1,cpu,disk"
    assert placement.offloads
    assert placement.layers == ("cuda:0", "cuda:1", "cuda:0", "cuda:0")
    assert placement.held == ("cuda:0", "cuda:1", "cpu", "disk")
    assert [placement.after(layer) for layer in (-1, 0, 1)] == ["cuda:0", "cuda:0", "cuda:1"]
    assert compute_devices(placement.name) == ("cuda:0", "cuda:1")
    assert not Placement.of(Spread({"embed": 0, "layers": 1}, main=0)).offloads
    assert Placement.of(Spread({"": 0}, main=0)) is None
    assert compute_devices("cpu") == compute_devices("cpu,disk") == ("cpu",)
    assert compute_devices("cuda:0,cpu") == ("cuda:0",)
    assert memory_bytes("cpu,disk").keys() == memory_bytes("cpu").keys()


def test_a_mac_has_nothing_to_spread_over(monkeypatch):
    for is_mac, expected in ((False, "auto"), (True, None)):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda is_mac=is_mac: is_mac)
        assert asked_map("auto") == expected
        assert asked_map("none") is None


def test_weights_leave_room_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert free_memory() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    module = transformers.integrations.accelerate
    monkeypatch.setattr(module, "get_max_memory", lambda: {0: 1000, 1: 2000, "cpu": 4000})
    assert free_memory() == {0: 850, 1: 1700, "cpu": 3400}


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setitem(stability.MAX_ACTIVATED, stand_in_devices.KIND, 64)
    monkeypatch.setattr(
        native_eigen, "eigen", lambda gram, counts: None
    )  # compiled code reads the host's memory
    with stand_in_devices.on_this_thread():
        yield


def over_two(model: Path, saes: list[Path], dtype: torch.dtype = torch.float64):
    """A Llama whose layers lie on two devices in turn, as `lighten_hooks` leaves it; and its dictionaries."""
    hf, entries = loaded(model, saes, dtype)
    layers = ("xpu:0", "xpu:1") * 2
    stand_in_devices.put(hf.model, "xpu:0")
    for layer, device in zip(hf.model.model.layers, layers, strict=True):
        stand_in_devices.put(layer, device)
        move_inputs(layer, torch.device(device))
    placement = Placement("xpu:0,xpu:1", "xpu:0", layers, layers)
    for entry in entries:
        before = entry.info.hook_name.endswith("hook_resid_pre")
        stand_in_devices.put(entry.sae, placement.after(entry.info.layer - before))
    return dataclasses.replace(hf, device="xpu:0", placement=placement), entries


def ran(engine: Engine, texts: Sequence[Sequence[int]], positions: Positions) -> BatchResult:
    settings = StudySettings(0, 0.1, 8, 10, 50, positions)
    ids = [tuple(texts[start : start + 3]) for start in range(0, len(texts), 3)]
    with torch.inference_mode():
        return BatchRunner(engine, settings).run(batch_of(ids, CONTRAST_RECIPE))


@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_a_batch_over_two_devices_gives_the_columns_of_one(positions, llama, saes, two_devices):
    read = [text for text in [*texts(), random_texts([20])[0]] if len(text) > 1]
    expected = ran(packed(llama, saes, torch.float64, positions), read, positions)
    hf, entries = over_two(llama, saes)
    engine = TrieEngine(hf, entries, [encoder_of(entry) for entry in entries], positions)
    got = ran(engine, read, positions)
    devices = [str(layer.acts.values.device) for layer in engine.extract(read).layers]
    assert devices == ["xpu:0", "xpu:1", "xpu:0"]
    assert got.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        if column.dtype == np.float64:
            np.testing.assert_allclose(got.columns[name], column, rtol=1e-7, atol=1e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(got.columns[name], column, name)
    np.testing.assert_array_equal(got.features.indices, expected.features.indices)
    np.testing.assert_allclose(got.features.values, expected.features.values, rtol=1e-9, atol=1e-12)


def test_tokens_are_predicted_over_two_devices_as_on_one(llama, saes, two_devices):
    hf, entries = over_two(llama, saes)
    for module in (hf.model.model.norm, hf.model.lm_head):
        move_inputs(module, torch.device("xpu:0"))
    engine = TrieEngine(
        hf,
        entries,
        [encoder_of(entry) for entry in entries],
        "last",
        unembedding=unembedding_of(hf.model),
    )
    expected = packed(llama, saes, log_probs=True).extract(texts()).log_probs
    np.testing.assert_allclose(engine.extract(texts()).log_probs.values, expected.values, rtol=0, atol=1e-12)


def test_places_inside_layers_over_two_devices_are_those_of_one(llama, tmp_path, two_devices):
    """Also where a dictionary predicts a value that is computed on the other device."""
    folders = [
        tiny.save_sae(tmp_path / "a", "blocks.1.hook_mlp_out"),
        tiny.save_transcoder(
            tmp_path / "b", "blocks.2.mlp.hook_in", "blocks.3.hook_attn_out", d_out=tiny.D_MODEL
        ),
        tiny.save_sae(tmp_path / "c", "blocks.3.attn.hook_z"),
    ]
    expected = packed(llama, folders).extract(texts()).layers
    hf, entries = over_two(llama, folders)
    engine = TrieEngine(hf, entries, [encoder_of(entry) for entry in entries], "last")
    for layer, other in zip(engine.extract(texts()).layers, expected, strict=True):
        for name in ("x", "target", "reconstruction"):
            got, one = getattr(layer, name).cpu(), getattr(other, name)
            torch.testing.assert_close(got, one, rtol=0, atol=1e-9)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_texts_over_two_devices_that_are_not_finite_are_told_apart(positions, saes, tmp_path, two_devices):
    model = save_overflowing(tmp_path / "model", UNPROBED)
    hf, entries = over_two(model, saes, torch.float32)
    engine = TrieEngine(hf, entries, [encoder_of(entry) for entry in entries], positions)
    read = [*random_texts([9, 8, 7, 6, 5]), [tiny.BOS, 3, *TOKENIZER(UNPROBED)["input_ids"], 4]]
    found = ran(engine, read, positions).not_finite
    plain = ran(packed(model, saes, torch.float32, positions), read, positions).not_finite
    assert [message.row for message in found] == [message.row for message in plain] == [1]


def test_a_plan_of_another_device_does_not_serve(llama, saes, two_devices, monkeypatch):
    """Without plans by device these tests would hold nothing."""
    monkeypatch.setattr(TrieEngine, "_plan", lambda engine, trie: engine._plan_on(trie, "xpu:0"))
    hf, entries = over_two(llama, saes)
    with pytest.raises(stand_in_devices.MismatchedDevices):
        TrieEngine(hf, entries, [encoder_of(entry) for entry in entries], "last")


@TWO_GPUS
@pytest.mark.parametrize("positions", ["last", "all", "mean"])
@pytest.mark.parametrize("offloaded", [False, True])
def test_layers_on_two_gpus_give_what_they_give_on_one(offloaded, positions, llama, saes):
    read = [text for text in texts() if len(text) > 1]
    device_map = spread(0, 1) | ({"model.layers.2": "cpu"} if offloaded else {})
    engine = packed(llama, saes, torch.float64, positions, device_map=device_map)
    assert engine.info.device == ("cuda:0,cuda:1,cpu" if offloaded else "cuda:0,cuda:1")
    got = engine.extract(read)
    assert [str(layer.x.device) for layer in got.layers] == ["cuda:0", "cuda:1", "cuda:0"]
    assert_same(got, packed(llama, saes, torch.float64, positions, device="cuda").extract(read), 1e-12)


@TWO_GPUS
def test_compiled_layers_on_two_gpus_give_what_they_give_uncompiled(saes, tmp_path):
    model = save_family(tmp_path, "llama", head_dim=32)
    with capture_logs() as logs:
        compiled = packed(model, saes, torch.float32, compiles=True, device_map=spread(0, 1))
    assert "engine.compiled" in [entry["event"] for entry in logs]
    plain = packed(model, saes, torch.float32, device="cuda")
    for ours, theirs in zip(compiled.extract(texts()).layers, plain.extract(texts()).layers, strict=True):
        error = torch.linalg.vector_norm(ours.x.cpu() - theirs.x.cpu()) / torch.linalg.vector_norm(theirs.x)
        assert error < 1e-5


@TWO_GPUS
def test_the_padded_engine_reads_two_gpus(llama, saes):
    engine = padded(llama, saes, device_map=spread(0, 1))
    got, expected = engine.extract(texts()), padded(llama, saes).extract(texts())
    assert_same(got, expected, 1e-12)
