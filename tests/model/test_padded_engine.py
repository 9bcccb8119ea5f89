from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from daemon.model.float64 import full_precision
from daemon.model.padded_engine import PaddedEngine
from tests.support import tiny
from tests.support.engines import dense, padded, random_texts


def one_at_a_time(engine: PaddedEngine, text: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per SAE: the last residual and the dense features, through TransformerLens's own cache."""
    bridge = engine._bridge
    results = []
    with torch.inference_mode(), full_precision(engine._dtype):
        _, cache = bridge.run_with_cache(torch.tensor([text]))
    for entry in engine.saes:
        x = entry.residual(cache[entry.info.hook_name][0, -1:])
        results.append((x, entry.sae.encode(x)))
    return results


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> PaddedEngine:
    made = tiny.make_tiny(tmp_path_factory.mktemp("tiny"))
    return padded(made.model, made.saes)


@pytest.mark.parametrize("lengths", [[5], [5, 9, 2], [1, 30, 7, 7, 12, 3, 2, 19]])
def test_a_batch_equals_its_texts_one_at_a_time(llama, lengths):
    texts = random_texts(lengths)
    extraction = llama.extract(texts)
    for row, text in enumerate(texts):
        for layer, (x, feature_acts) in zip(extraction.layers, one_at_a_time(llama, text), strict=True):
            assert_close(layer.x[row], x[0], rtol=0, atol=1e-11)
            assert_close(dense(layer)[row], feature_acts[0], rtol=0, atol=1e-11)


def test_padding_is_counted_as_computed(llama):
    extraction = llama.extract(random_texts([4, 10]))
    assert extraction.computed_tokens == 20
    assert extraction.padding_tokens == 6


def test_reconstruction_is_the_dictionarys_own(llama):
    extraction = llama.extract(random_texts([6, 6]))
    for layer, entry in zip(extraction.layers, llama.saes, strict=True):
        assert_close(layer.reconstruction, entry.sae(layer.x), rtol=0, atol=1e-12)


def test_layers_after_the_last_sae_do_not_run(tmp_path):
    model = tiny.save_llama(tmp_path / "model", n_layers=4)
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    engine = padded(model, [sae])
    ran: list[int] = []
    for number, layer in enumerate(engine._bridge.original_model.model.layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    engine.extract(random_texts([5]))
    assert ran[:2] == [0, 1]
    assert 3 not in ran


def test_resid_pre_is_the_input_of_the_block(tmp_path):
    model = tiny.save_llama(tmp_path / "model")
    pre = tiny.save_sae(tmp_path / "pre", "blocks.2.hook_resid_pre")
    post = tiny.save_sae(tmp_path / "post", "blocks.1.hook_resid_post")
    engine = padded(model, [pre, post])
    first, second = engine.extract(random_texts([5, 8])).layers
    assert (first.layer, second.layer) == (1, 2)
    assert_close(first.x, second.x)


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
def test_gpt2_and_every_kind_of_dictionary(tmp_path, architecture):
    model = tiny.save_gpt2(tmp_path / "model")
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post", architecture=architecture)
    engine = padded(model, [sae])
    texts = random_texts([3, 11, 6])
    extraction = engine.extract(texts)
    for row, text in enumerate(texts):
        ((x, feature_acts),) = one_at_a_time(engine, text)
        assert_close(extraction.layers[0].x[row], x[0], rtol=0, atol=1e-11)
        assert_close(dense(extraction.layers[0])[row], feature_acts[0], rtol=0, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of HookedTransformer itself
def test_centred_dictionaries_read_what_a_processed_model_writes(tmp_path):
    """`center_writing_weights` of HookedTransformer against the mean subtracted here."""
    from transformer_lens import HookedTransformer, loading
    from transformers import AutoModelForCausalLM

    folder = tiny.save_gpt2(tmp_path / "model")
    sae = tiny.save_sae(
        tmp_path / "sae",
        "blocks.1.hook_resid_pre",
        model_from_pretrained_kwargs={"center_writing_weights": True},
    )
    engine = padded(folder, [sae])
    text = random_texts([9])[0]
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    cfg = loading.get_pretrained_model_config(
        str(folder), hf_cfg=hf_model.config.to_dict(), device="cpu", dtype=torch.float64
    )
    processed = HookedTransformer(cfg)
    processed.load_and_process_state_dict(
        loading.get_pretrained_state_dict(str(folder), cfg, hf_model, dtype=torch.float64),
        fold_ln=False,
        center_writing_weights=True,
        center_unembed=False,
        fold_value_biases=False,
    )
    with torch.inference_mode():
        _, cache = processed.run_with_cache(torch.tensor([text]))
    (layer,) = engine.extract([text]).layers
    assert_close(layer.x[0], cache["blocks.1.hook_resid_pre"][0, -1], rtol=0, atol=1e-6)
