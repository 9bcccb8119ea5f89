"""Dictionaries that read other places than the residual stream, and transcoders."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model.float64 import full_precision
from daemon.tools.verify import verify
from tests.support import tiny
from tests.support.engines import dense, padded, random_texts

READ, WRITTEN = "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.save_llama(tmp_path_factory.mktemp("model"))


def inside(engine, text: list[int], *modules) -> list[torch.Tensor]:
    """The outputs (length, d) of Hugging Face modules for one text, by hooks on these modules."""
    captured: dict[int, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, number=number: captured.__setitem__(number, output[0])
        )
        for number, module in enumerate(modules)
    ]
    with torch.inference_mode(), full_precision(torch.float64):
        engine._bridge.original_model(torch.tensor([text]))
    for handle in handles:
        handle.remove()
    return [captured[number] for number in range(len(modules))]


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
@pytest.mark.parametrize("positions", ["last", "all", "mean"])
def test_a_transcoder_is_measured_against_what_it_predicts(architecture, positions, model, tmp_path):
    folder = tiny.save_transcoder(
        tmp_path / "t", READ, WRITTEN, architecture=architecture, d_out=tiny.D_MODEL
    )
    engine = padded(model, [folder], positions=positions)
    texts = random_texts([5, 9, 2])
    layer = engine.extract(texts).layers[0]
    sae = engine.saes[0].sae
    block = engine._bridge.original_model.model.layers[1]
    for row, text in enumerate(texts):
        normalised, predicted = inside(engine, text, block.post_attention_layernorm, block.mlp)
        rows = slice(1, None) if positions == "mean" else slice(-1, None)
        x, target = normalised[rows].mean(0), predicted[rows].mean(0)
        acts = sae.encode(normalised[rows]).mean(0)
        skip = 0 if engine.saes[0].W_skip is None else x @ sae.W_skip.T
        assert_close(layer.target[row], target, rtol=0, atol=1e-10)
        assert_close(dense(layer)[row], acts, rtol=0, atol=1e-10)
        assert_close(layer.reconstruction[row], sae.decode(acts) + skip, rtol=0, atol=1e-10)


def test_heads_are_read_side_by_side(model, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", "blocks.1.attn.hook_z")
    layer = padded(model, [folder]).extract(random_texts([4, 6])).layers[0]
    assert layer.x.shape == (2, tiny.D_MODEL)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("blocks.1.hook_RESID_POST", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_resid_pots", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_mlp_outt", "blocks.1.hook_mlp_out"),
        ("blocks.1.ln2.normalized", "blocks.1.ln2.hook_normalized"),
    ],
)
def test_a_place_that_is_misspelt_names_the_dictionary_and_what_it_may_mean(name, meant, model, tmp_path):
    with pytest.raises(ConfigError, match=rf"^SAE mine: .* no hook point {name}: did you mean {meant}\?"):
        padded(model, [tiny.save_sae(tmp_path / "mine", name)])


def test_a_place_that_the_model_lacks_and_a_width_that_differs_are_refused(model, tmp_path):
    with pytest.raises(
        ConfigError, match=r"SAE a: .* has no hook point blocks\.1\.hook_nowhere: .* cfg\.json"
    ):
        padded(model, [tiny.save_sae(tmp_path / "a", "blocks.1.hook_nowhere")])
    narrow = tiny.save_sae(tmp_path / "b", "blocks.1.mlp.hook_post")
    with pytest.raises(ConfigError, match=r"expects 32 values at blocks\.1\.mlp\.hook_post, where .* has 64"):
        padded(model, [narrow])


def test_a_study_of_transcoders_equals_one_text_at_a_time(model, tmp_path):
    folders = [
        tiny.save_transcoder(
            tmp_path / "t0", "blocks.0.mlp.hook_post", "blocks.0.hook_mlp_out", d_in=64, d_out=tiny.D_MODEL
        ),
        tiny.save_sae(tmp_path / "t1", "blocks.1.hook_resid_post"),
        tiny.save_transcoder(
            tmp_path / "t2",
            "blocks.2.ln2.hook_normalized",
            "blocks.2.hook_mlp_out",
            architecture="skip_transcoder",
            d_out=tiny.D_MODEL,
        ),
    ]
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, tuple(folders)).toml())
    config = load_config(toml, {}, {"model.dtype": "float64", "batching.max_batch_tokens": 512})
    file = tiny.write_json(tmp_path / "some.json", tiny.contrast_records(7))
    verification = verify(config, file, samples=None, batch_sizes=(1, 3, 7))
    assert all(report.feature_flips == 0 for report in verification.reports)
    assert verification.passed
