"""The daemon's engine reads the plain model's values, or refuses the model in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from daemon import model_wiring
from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model_wiring import load_engine
from tests.support import tiny
from tests.support.engines import padded, random_texts
from tests.support.families import save_family

TEXTS = random_texts([5, 17, 9])


def chosen_engine(folder: Path, model: Path, *saes: Path, dtype: str = "float32"):
    """The engine that the daemon would run."""
    toml = folder / "lensd.toml"
    toml.write_text(tiny.Tiny(model, saes).toml())
    engine, _ = load_engine(load_config(toml, {}, {"model.dtype": dtype}))
    return engine


def refusal(folder: Path, model: Path, *saes: Path, dtype: str = "float32") -> str:
    with pytest.raises(ConfigError) as caught:
        chosen_engine(folder, model, *saes, dtype=dtype)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def plain_value(model: Path, text: list[int], find, side: str) -> torch.Tensor:
    """The input or output of a module of the plain model, at the text's last token."""
    hf = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    got: list[torch.Tensor] = []
    if side == "in":
        find(hf).register_forward_pre_hook(lambda m, args: got.append(args[0]))
    else:
        find(hf).register_forward_hook(
            lambda m, args, out: got.append(out if torch.is_tensor(out) else out[0])
        )
    with torch.no_grad():
        hf(torch.tensor([text]))
    return got[0].reshape(len(text), -1)[-1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_resid_pre"])
def test_a_model_that_reads_in_both_directions_is_refused(hook, dtype, tmp_path):
    model = save_family(tmp_path / "bert", "bert")
    message = refusal(tmp_path, model, tiny.save_sae(tmp_path / "sae", f"blocks.1.{hook}"), dtype=dtype)
    assert f"blocks.1.{hook}" in message
    assert "reads texts in both directions" in message


@pytest.mark.parametrize("hook", ["hook_attn_out", "hook_mlp_out", "attn.hook_z"])
@pytest.mark.parametrize("family", ["cohere", "cohere2", "hunyuan"])
def test_values_that_transformer_lens_gets_wrong_are_read_packed_or_not_at_all(family, hook, tmp_path):
    model, sae = save_family(tmp_path / family, family), tiny.save_sae(tmp_path / "sae", f"blocks.1.{hook}")
    with pytest.raises(ConfigError, match=rf"at blocks.1.{hook} TransformerLens gives other values than the"):
        padded(model, [sae], torch.float32)
    path, side = {
        "hook_attn_out": ("self_attn", "out"),
        "hook_mlp_out": ("mlp", "out"),
        "attn.hook_z": ("self_attn.o_proj", "in"),
    }[hook]
    (layer,) = chosen_engine(tmp_path, model, sae).extract(TEXTS).layers
    for row, text in enumerate(TEXTS):
        x = plain_value(model, text, lambda hf: hf.model.layers[1].get_submodule(path), side)
        assert_close(layer.x[row], x, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_refusal_ends_the_command_with_one_line_and_2(tmp_path):
    model = save_family(tmp_path / "opt", "opt")
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, (tiny.save_sae(tmp_path / "sae", "blocks.1.attn.hook_pattern"),)).toml())
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "run", "--once", "--no-http", "--config", str(toml)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "blocks.1.attn.hook_pattern" in done.stderr + done.stdout


@pytest.mark.parametrize("transcoder", [False, True])
@pytest.mark.parametrize(
    "hook",
    [
        "hook_mlp_in",
        "hook_attn_in",
        "hook_q_input",
        "hook_k_input",
        "hook_v_input",
        "attn.hook_result",
        "attn.hook_attn_in",
        "attn.hook_q_input",
    ],
)
def test_hooks_behind_a_flag_are_refused_with_what_to_name_instead(hook, transcoder, tmp_path):
    model = tiny.save_llama(tmp_path / "model")
    name = f"blocks.1.{hook}"
    if transcoder:
        sae = tiny.save_transcoder(tmp_path / "sae", "blocks.1.mlp.hook_in", name, d_out=tiny.D_MODEL)
    else:
        sae = tiny.save_sae(tmp_path / "sae", name)
    message = refusal(tmp_path, model, sae)
    assert name in message
    assert " blocks.1." in message.partition("under a flag")[2]


@pytest.mark.parametrize("architecture", ["jumprelu_transcoder", "jumprelu_skip_transcoder"])
def test_gemma_scope_transcoders_at_hook_mlp_in_read_what_the_mlp_reads(architecture, tmp_path):
    model = save_family(tmp_path / "gemma3", "gemma3")
    transcoder = tiny.random_transcoder(
        "blocks.1.hook_mlp_in", "blocks.1.hook_mlp_out", architecture=architecture, d_out=tiny.D_MODEL
    )
    transcoder.cfg.metadata.model_name = "google/gemma-3-1b-pt"
    transcoder.save_model(tmp_path / "sae")
    (layer,) = chosen_engine(tmp_path, model, tmp_path / "sae").extract(TEXTS).layers
    for row, text in enumerate(TEXTS):
        x = plain_value(model, text, lambda hf: hf.model.layers[1].pre_feedforward_layernorm, "out")
        target = plain_value(model, text, lambda hf: hf.model.layers[1].post_feedforward_layernorm, "out")
        assert_close(layer.x[row], x, rtol=1e-5, atol=1e-5)
        assert_close(layer.target[row], target, rtol=1e-5, atol=1e-5)
        acts = transcoder.encode(x[None])
        assert_close(layer.acts.to_dense(tiny.D_SAE)[row], acts[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reshape", ["hook_z", "none"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_dictionaries_of_heads_give_saelens_encode(architecture, reshape, tmp_path):
    model = save_family(tmp_path / "gpt2", "gpt2")
    sae = tiny.random_sae("blocks.1.attn.hook_z", architecture=architecture)
    sae.cfg.reshape_activations = reshape
    sae.save_model(tmp_path / "sae")
    plain = SAE.load_from_disk(tmp_path / "sae")
    (layer,) = chosen_engine(tmp_path, model, tmp_path / "sae").extract(TEXTS).layers
    for row, text in enumerate(TEXTS):
        z = plain_value(model, text, lambda hf: hf.transformer.h[1].attn.c_proj, "in")
        acts = plain.encode(z.view(1, 4, 8) if reshape == "hook_z" else z[None])
        decoded = plain.decode(acts).reshape(-1)
        assert_close(layer.x[row], z, rtol=1e-5, atol=1e-5)
        assert_close(layer.acts.to_dense(tiny.D_SAE)[row], acts[0], rtol=1e-4, atol=1e-5)
        assert_close(layer.reconstruction[row], decoded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("place", ["ln2.hook_normalized", "ln2.hook_out", "mlp.hook_post", "mlp.hook_pre"])
def test_modules_that_work_on_all_rows_as_one_are_read_by_row(place, tmp_path):
    """OPT folds batch and position before its MLP."""
    model = save_family(tmp_path / "opt", "opt")
    find, side = {
        "ln2.hook_normalized": (lambda hf: hf.model.decoder.layers[1].final_layer_norm, "in"),
        "ln2.hook_out": (lambda hf: hf.model.decoder.layers[1].final_layer_norm, "out"),
        "mlp.hook_post": (lambda hf: hf.model.decoder.layers[1].fc2, "in"),
        "mlp.hook_pre": (lambda hf: hf.model.decoder.layers[1].fc1, "out"),
    }[place]
    width = 64 if place.startswith("mlp") else tiny.D_MODEL
    sae = tiny.save_sae(tmp_path / "sae", f"blocks.1.{place}", d_in=width)
    (layer,) = chosen_engine(tmp_path, model, sae).extract(TEXTS).layers
    for row, text in enumerate(TEXTS):
        x = plain_value(model, text, find, side)
        if place.endswith("normalized"):
            x = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()
        assert_close(layer.x[row], x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("hook", ["attn.hook_pattern", "attn.hook_attn_scores", "attn.hook_rot_q"])
def test_a_hook_without_a_row_for_each_token_is_one_line(hook, tmp_path):
    """Patterns have rows of another kind."""
    model = save_family(tmp_path / "opt", "opt")
    message = refusal(tmp_path, model, tiny.save_sae(tmp_path / "sae", f"blocks.1.{hook}"))
    assert f"blocks.1.{hook}" in message


@pytest.mark.parametrize(
    "family",
    ["falcon_grouped", "openai_gpt", "roberta", "electra", "ctrl", "xlnet", "ministral", "gemma3n", "t5"],
)
@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out"])
def test_families_that_transformer_lens_lacks_run_or_are_one_line(family, hook, tmp_path):
    model = save_family(tmp_path / family, family)
    sae = tiny.save_sae(tmp_path / "sae", f"blocks.1.{hook}")
    try:
        engine = chosen_engine(tmp_path, model, sae)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        return
    (layer,) = engine.extract(TEXTS).layers
    alone = torch.cat([engine.extract([text]).layers[0].x for text in TEXTS])
    assert_close(layer.x, alone, rtol=1e-4, atol=1e-4)


def test_the_model_is_loaded_once_where_it_is_clear_that_it_can_not_be_packed(tmp_path, monkeypatch):
    loads = []
    load_model = model_wiring.load_model

    def counted(*args, **options):
        loads.append(args)
        return load_model(*args, **options)

    monkeypatch.setattr(model_wiring, "load_model", counted)
    model = save_family(tmp_path / "model", "qwen3_next")  # has layers without attention
    engine = chosen_engine(tmp_path, model, tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post"))
    assert (engine.info.engine, len(loads)) == ("padded", 1)
    model = save_family(tmp_path / "jamba", "jamba")  # of which packing is tried, on the model itself
    engine = chosen_engine(tmp_path, model, tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post"))
    assert (engine.info.engine, len(loads)) == ("padded", 2)


def test_a_decoder_that_is_told_to_read_in_both_directions_is_refused(tmp_path):
    """As models that embed texts are, in either engine."""
    model = save_family(tmp_path / "gemma3", "gemma3", use_bidirectional_attention=True)
    for hook in ("hook_resid_post", "hook_mlp_out"):
        message = refusal(tmp_path, model, tiny.save_sae(tmp_path / hook, f"blocks.2.{hook}"))
        assert f"blocks.2.{hook}" in message
