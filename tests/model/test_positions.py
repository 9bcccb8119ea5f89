"""Features at the token positions read equal those of plain Hugging Face and SAELens, text by text."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from daemon.model.rereading import reread
from tests.support import tiny
from tests.support.engines import dense, packed, padded

HOOK = "blocks.1.hook_resid_post"
TEXTS = [[tiny.BOS, 97, 98], [tiny.BOS, 97], [tiny.BOS, 97, 98, 99, 100, 101], [tiny.BOS, 7, 8, 9]]
ENGINES = {"packed": packed, "padded": padded}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("model"), n_layers=3)


@pytest.fixture(scope="module")
def plain_residuals(model) -> list[torch.Tensor]:
    """Of each text (length, d_model) after block 1, as Hugging Face has it."""
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        return [hf(torch.tensor([text]), output_hidden_states=True).hidden_states[2][0] for text in TEXTS]


def normalising(folder: Path, architecture: str, mode: str) -> Path:
    sae = tiny.random_sae(HOOK, architecture=architecture)
    sae.cfg.normalize_activations = mode
    sae.save_model(folder)
    return folder


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
def test_features_and_reconstruction_are_those_of_saelens(
    tmp_path, model, plain_residuals, mode, architecture, positions, engine
):
    folder = normalising(tmp_path / "sae", architecture, mode)
    extraction = ENGINES[engine](model, [folder], torch.float32, positions).extract(TEXTS)
    (layer,) = extraction.layers
    sae = SAE.load_from_disk(folder)
    for row, residuals in enumerate(plain_residuals):
        with torch.no_grad():
            x = residuals[1 if positions in ("mean", "max") else -1 :]
            features = sae.encode(x)
            decoded = sae.decode(features)
        if positions == "max":
            assert_close(dense(layer)[row], features.amax(0), rtol=1e-4, atol=1e-5)
            assert layer.reconstruction is None
            continue
        assert_close(dense(layer)[row], features.mean(0), rtol=1e-4, atol=1e-5)
        assert_close(layer.x[row], x.mean(0), rtol=1e-4, atol=1e-5)
        assert_close(layer.reconstruction[row], decoded.mean(0), rtol=1e-4, atol=1e-5)
    if positions == "all":
        assert len(extraction.stored[0].rows) == sum(len(text) - 1 for text in TEXTS)


def mask_of(text: list[int], *places: int) -> bytes:
    return bytes(place in places for place in range(len(text)))


COUNTED = [(1,), (1,), (2, 3, 5), (1, 3)]  # of TEXTS


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_positions_are_among_the_tokens_that_count(tmp_path, model, plain_residuals, positions, engine):
    folder = tiny.save_sae(tmp_path / "sae", HOOK)
    made = ENGINES[engine](model, [folder], torch.float32, positions)
    masks = [mask_of(text, *places) for text, places in zip(TEXTS, COUNTED, strict=True)]
    extraction = made.finish(made.start(TEXTS, masks))
    (layer,) = extraction.layers
    sae = SAE.load_from_disk(folder)
    stored = []
    for row, (residuals, places) in enumerate(zip(plain_residuals, COUNTED, strict=True)):
        with torch.no_grad():
            features = sae.encode(residuals[list(places)])
        pooled = {"mean": features.mean(0), "max": features.amax(0)}.get(positions, features[-1])
        assert_close(dense(layer)[row], pooled, rtol=1e-4, atol=1e-5)
        stored += [(places[-1:] if positions == "last" else places, TEXTS[row])]
    if positions in ("last", "all"):
        assert extraction.stored[0].positions.tolist() == [place for places, _ in stored for place in places]
        assert extraction.stored[0].token_ids.tolist() == [
            text[at] for places, text in stored for at in places
        ]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_where_all_tokens_count_a_mask_changes_nothing(tmp_path, model, positions, engine):
    folder = tiny.save_sae(tmp_path / "sae", HOOK)
    made = ENGINES[engine](model, [folder], torch.float32, positions)
    plain = made.extract(TEXTS)
    masked = made.finish(made.start(TEXTS, [b"\1" * len(text) for text in TEXTS]))
    assert torch.equal(dense(plain.layers[0]), dense(masked.layers[0]))
    assert plain.stored[0].positions.tolist() == masked.stored[0].positions.tolist()


@pytest.mark.parametrize("positions", ["last", "all", "mean"])
@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_threads_that_share_a_normalising_dictionary_read_what_one_reads(tmp_path, model, mode, positions):
    folder = normalising(tmp_path / "sae", "jumprelu", mode)
    engine = packed(model, [folder], torch.float64, positions)
    assert engine.concurrent
    groups = [TEXTS, TEXTS[::-1], TEXTS[:2], [[*text, *text[1:]] for text in TEXTS]]
    alone = [engine.extract(texts) for texts in groups]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(engine.extract, groups * 5))
    for got, expected in zip(together, alone * 5, strict=True):
        (layer,), (other,) = got.layers, expected.layers
        assert_close(dense(layer), dense(other), rtol=0, atol=1e-11)
        assert_close(layer.reconstruction, other.reconstruction, rtol=0, atol=1e-11)


def test_texts_that_are_read_again_are_read_at_the_tokens_that_count(tmp_path, model):
    made = packed(model, [tiny.save_sae(tmp_path / "sae", HOOK)], torch.float32, "all")
    masks = [mask_of(text, *places) for text, places in zip(TEXTS, COUNTED, strict=True)]
    started = made.start(TEXTS, masks)
    expected = started.read[0].clone()
    (row,) = started.readings.rows[started.readings.offsets[2] + 1 : started.readings.offsets[2] + 2]
    with torch.inference_mode():
        started.read[0][row] = torch.nan
    asked = []

    def again(texts, counted):
        asked.append((texts, counted))
        return made.start(texts, counted)

    with torch.inference_mode():
        healed = reread(started, again)
    assert asked == [([TEXTS[2]], [masks[2]])]
    assert_close(healed.read[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["all", "mean", "max"])
def test_a_bos_of_the_texts_own_is_left_out_and_any_other_first_token_is_read(tmp_path, model, positions):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, prepend_bos=False)
    texts = [[tiny.BOS, 97, 98], [97, 98], [97, tiny.BOS]]
    extraction = packed(model, [folder], torch.float32, positions).extract(texts)
    hf = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sae = SAE.load_from_disk(folder)
    for row, (text, first) in enumerate(zip(texts, (1, 0, 0), strict=True)):
        with torch.no_grad():
            residuals = hf(torch.tensor([text]), output_hidden_states=True).hidden_states[2][0]
            features = sae.encode(residuals[first:])
        pooled = {"mean": features.mean(0), "max": features.amax(0)}.get(positions, features[-1])
        assert_close(dense(extraction.layers[0])[row], pooled, rtol=1e-4, atol=1e-5)
    if positions == "all":
        assert extraction.stored[0].positions.tolist() == [1, 2, 0, 1, 0, 1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("positions", "counted"), [("last", b"\0\0"), ("all", b"\1\0"), ("mean", b"\1\0")])
def test_a_text_without_a_token_to_read_is_no_other_texts_row(tmp_path, model, engine, positions, counted):
    made = ENGINES[engine](model, [tiny.save_sae(tmp_path / "sae", HOOK)], torch.float32, positions)
    masks = [b"\1" * len(TEXTS[0]), counted, b"\1" * len(TEXTS[2])]
    with pytest.raises(ValueError, match="text 1 of a batch has no token to read"):
        made.start(TEXTS[:3], masks)
