"""Places inside a layer, read in packed runs: against hooks put by hand on plain Hugging Face modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from daemon.config import SaeSection
from daemon.errors import ConfigError
from daemon.model import trie_engine
from daemon.model.encoding import encoder_of
from daemon.model.float64 import full_precision
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.hook_points import canonical
from daemon.model.loading import bridge_of
from daemon.model.sae import load_sae
from daemon.model.trie_engine import CannotPack, TrieEngine
from daemon.native.rmsnorm_rope_attention import routines
from daemon.records import Positions
from tests.support import tiny
from tests.support.by_hand import by_hand, last
from tests.support.engines import dense, loaded, random_texts
from tests.support.families import save_family

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of a row's length
LAYER = 1


PLACES_READ = {
    "llama": [
        *("hook_resid_mid", "hook_attn_out", "hook_mlp_out", "mlp.hook_in", "mlp.hook_out", "mlp.hook_post"),
        *("attn.hook_in", "attn.hook_z", "attn.hook_q", "ln1.hook_normalized", "ln2.hook_normalized"),
        *("hook_in", "hook_out"),
    ],
    "gemma2": [
        *("hook_resid_mid", "hook_attn_out", "hook_mlp_out", "mlp.hook_in", "attn.hook_z"),
        "ln2.hook_normalized",
    ],
    "gpt2": [
        *("hook_resid_mid", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "attn.hook_v"),
        "ln2.hook_normalized",
    ],
    "gpt_neox": ["hook_attn_out", "hook_mlp_out", "mlp.hook_in", "attn.hook_z"],
}


def at(place: str) -> str:
    return f"blocks.{LAYER}.{place}"


def sharing_texts() -> list[list[int]]:
    """Texts that begin alike, contain one another, and are longer than a block of queries."""
    a, b, c = random_texts([90, 40, 13])
    return [a, a[:30] + b[1:], b, a[:30], c, c[:1], b + c]


def check_rows(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1)
    assert float(error.max()) < TOLERANCE[dtype], what


def engine_of(
    model: Path, folders: list[Path], dtype: torch.dtype, positions: Positions = "last"
) -> TrieEngine:
    """With any number of dictionaries at a layer."""
    hf, _ = loaded(model, [], dtype)
    sae_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    entries = [load_sae(SaeSection(path=folder), device="cpu", dtype=sae_dtype) for folder in folders]
    return TrieEngine(hf, entries, [encoder_of(entry) for entry in entries], positions)


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.float64) for family in PLACES_READ), ("llama", torch.float32)]
)
def test_any_place_inside_a_layer_is_read_packed(family, dtype, tmp_path):
    model = save_family(tmp_path / "model", family)
    names, texts = list(map(at, PLACES_READ[family])), sharing_texts()
    expected = {name: last(rows) for name, rows in by_hand(model, family, names, texts, dtype).items()}
    folders = [
        tiny.save_sae(tmp_path / name, name, d_in=values.shape[1], seed=number)
        for number, (name, values) in enumerate(expected.items())
    ]
    engine = engine_of(model, folders, dtype)
    layers = engine.extract(texts).layers
    for (name, values), layer, entry in zip(expected.items(), layers, engine._stage.saes, strict=True):
        check_rows(layer.x, values, dtype, name)
        check_rows(dense(layer), entry.sae.encode(values.to(layer.x.dtype)), dtype, name)


TRANSCODERS = {
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
    "jumprelu_transcoder": ("ln2.hook_normalized", "hook_mlp_out"),
    "skip_transcoder": ("hook_resid_mid", "hook_resid_post"),
    "jumprelu_skip_transcoder": ("attn.hook_in", "hook_attn_out"),
}


@pytest.mark.parametrize("positions", ["last", "mean"])
def test_transcoders_are_packed_and_measured_against_what_they_predict(positions, tmp_path):
    model, dtype = save_family(tmp_path / "model", "gemma3"), torch.float64
    pairs = [(at(read), at(written)) for read, written in TRANSCODERS.values()]
    folders = [
        tiny.save_transcoder(tmp_path / kind, *pair, architecture=kind, d_out=tiny.D_MODEL)
        for kind, pair in zip(TRANSCODERS, pairs, strict=True)
    ]
    engine = engine_of(model, folders, dtype, positions)
    texts = [text for text in sharing_texts() if len(text) > 1]
    layers = engine.extract(texts).layers
    plain = by_hand(model, "gemma3", [name for pair in pairs for name in pair], texts, dtype)
    skip = slice(1, None) if positions == "mean" else slice(-1, None)
    for (read, written), layer, entry in zip(pairs, layers, engine._stage.saes, strict=True):
        for row in range(len(texts)):
            x, target = plain[read][row][skip], plain[written][row][skip]
            with torch.inference_mode():
                expected = (entry.sae.encode(x), entry.sae(x), x, target)
            got = (dense(layer)[row], layer.reconstruction[row], layer.x[row], layer.target[row])
            for values, other in zip(got, expected, strict=True):
                check_rows(values[None], other.mean(0, keepdim=True), dtype, f"{read}: {row}")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_transformer_lens_has_the_same_values_there(family, tmp_path):
    """It finds a model's parts by rules of its own."""
    model = save_family(tmp_path / "model", family)
    names = [at(place) for place in PLACES_READ[family] if place != "attn.hook_v"]
    bridge = bridge_of(loaded(model, [], torch.float64)[0])
    texts = sharing_texts()
    with torch.inference_mode(), full_precision(torch.float64):
        caches = [bridge.run_with_cache(torch.tensor([text]))[1] for text in texts]
    expected = {
        name: torch.stack([cache[canonical(name)][0, -1].flatten() for cache in caches]) for name in names
    }
    folders = [
        tiny.save_sae(tmp_path / name, name, d_in=values.shape[1]) for name, values in expected.items()
    ]
    layers = engine_of(model, folders, torch.float64).extract(texts).layers
    for (name, values), layer in zip(expected.items(), layers, strict=True):
        check_rows(layer.x, values, torch.float64, name)


def test_only_layers_that_are_read_inside_keep_their_modules(tmp_path):
    model = save_family(tmp_path / "model", "llama")
    folders = [
        tiny.save_sae(tmp_path / "a", "blocks.1.hook_mlp_out"),
        tiny.save_sae(tmp_path / "b", "blocks.2.hook_resid_post"),
    ]
    engine = engine_of(model, folders, torch.float32)
    fused = [isinstance(layer, FusedDecoderLayer) for layer in engine._trunk.layers]
    assert fused == [routines() is not None, False, routines() is not None]


def test_nothing_after_the_last_place_runs(tmp_path):
    model = save_family(tmp_path / "model", "llama")
    engine = engine_of(model, [tiny.save_sae(tmp_path / "a", "blocks.1.attn.hook_z")], torch.float64)
    ran: list[str] = []
    for path, module in engine._trunk.layers[1].named_modules():
        module.register_forward_hook(lambda *_, path=path: ran.append(path))
    engine.extract(sharing_texts())
    assert "self_attn.v_proj" in ran
    assert not any(path.startswith(("mlp", "post_attention")) for path in ran)


def test_a_place_of_another_width_and_one_that_no_module_gives_are_not_packed(tmp_path):
    model = save_family(tmp_path / "model", "llama")
    with pytest.raises(
        ConfigError, match=r"expects 32 values at blocks\.1\.mlp\.hook_post, where the model has 64"
    ):
        engine_of(model, [tiny.save_sae(tmp_path / "a", "blocks.1.mlp.hook_post")], torch.float64)
    with pytest.raises(CannotPack, match="hook_pattern is none of the places"):
        engine_of(model, [tiny.save_sae(tmp_path / "b", "blocks.1.attn.hook_pattern")], torch.float64)


def test_a_packed_run_that_reads_another_place_is_not_used(tmp_path, monkeypatch):
    """The start-up probe is what tells."""
    model = save_family(tmp_path / "model", "llama")
    right = trie_engine.place_of

    def wrong(model, tap):
        return dataclasses.replace(right(model, tap), path="post_attention_layernorm")

    monkeypatch.setattr(trie_engine, "place_of", wrong)
    with pytest.raises(CannotPack, match="packed and plain runs differ"):
        engine_of(model, [tiny.save_sae(tmp_path / "a", "blocks.1.hook_mlp_out")], torch.float64)
