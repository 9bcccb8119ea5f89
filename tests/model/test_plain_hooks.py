"""Hook names on plain modules, against hooks put by hand on the modules of each family."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from daemon.model import plain_hooks, plain_layer, plain_trace
from daemon.model.plain_hooks import PlainHooks
from daemon.model.plain_trace import Unreachable
from tests.support import tiny
from tests.support.engines import random_texts
from tests.support.families import FAMILIES, SEEING, save_family

TEXT = random_texts([12])[0]
# Whose layer 1 has no attention and MLP of the usual kind.
WITHOUT_BRANCHES = {"bert", "bert_decoder", "roberta", "electra", "xlnet", "mamba", "mamba2"}
WITHOUT_BRANCHES |= {"recurrent_gemma", "qwen3_next"}


def plain_model(folder, family):
    kind = AutoModelForImageTextToText if family in SEEING else AutoModelForCausalLM
    return kind.from_pretrained(save_family(folder, family), attn_implementation="eager").eval()


def read(model, *names: str) -> list[torch.Tensor]:
    names = tuple(f"blocks.1.{name}" for name in names)
    values = PlainHooks(model, names, tiny.BOS + 1).read(TEXT)
    return [values[name] for name in names]


def by_hand(model, *places: tuple[torch.nn.Module, str]) -> list[torch.Tensor]:
    """The text's inputs ("in") or outputs ("out") of modules."""
    got: dict[int, torch.Tensor] = {}

    def keep(number, tensor):
        got.setdefault(number, tensor.reshape(len(TEXT), -1).clone())

    handles = []
    for number, (module, side) in enumerate(places):

        def begins(module, args, kwargs, number=number):
            keep(number, (*args, *kwargs.values())[0])

        def ends(module, args, output, number=number):
            keep(number, output if torch.is_tensor(output) else output[0])

        if side == "in":
            handles.append(module.register_forward_pre_hook(begins, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(ends))
    with torch.no_grad():
        model(torch.tensor([TEXT]))
    for handle in handles:
        handle.remove()
    return [got[number] for number in range(len(places))]


def test_llamas_places_are_its_modules(tmp_path):
    model = plain_model(tmp_path / "m", "llama")
    layer = model.model.layers[1]
    names = ["hook_attn_out", "hook_mlp_out", "attn.hook_z", "attn.hook_v", "mlp.hook_pre", "mlp.hook_post"]
    got = read(model, *names, "hook_resid_mid", "mlp.hook_in")
    attention, mlp, norm = layer.self_attn, layer.mlp, layer.post_attention_layernorm
    expected = by_hand(
        model,
        (attention, "out"),
        (mlp, "out"),
        (attention.o_proj, "in"),
        (attention.v_proj, "out"),
        (mlp.gate_proj, "out"),
        (mlp.down_proj, "in"),
        (norm, "in"),
        (norm, "out"),
    )
    for value, other in zip(got, expected, strict=True):
        assert_close(value, other, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "glm4"])
def test_what_is_added_comes_after_a_post_norm(family, tmp_path):
    model = plain_model(tmp_path / "m", family)
    layer = model.model.layers[1]
    norms = (
        (layer.post_self_attn_layernorm, layer.post_mlp_layernorm)
        if family == "glm4"
        else (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
    )
    got = read(model, "hook_attn_out", "hook_mlp_out")
    for value, other in zip(got, by_hand(model, *((norm, "out") for norm in norms)), strict=True):
        assert_close(value, other, rtol=0, atol=0)


def test_what_granite_adds_is_multiplied(tmp_path):
    model = plain_model(tmp_path / "m", "granite")
    layer = model.model.layers[1]
    (attention,) = by_hand(model, (layer.self_attn, "out"))
    assert_close(read(model, "hook_attn_out")[0], attention * 0.22)


def test_bloom_adds_the_residual_stream_inside_its_modules(tmp_path):
    model = plain_model(tmp_path / "m", "bloom")
    layer = model.transformer.h[1]
    expected = by_hand(model, (layer.self_attention.dense, "out"), (layer.mlp.dense_4h_to_h, "out"))
    for value, other in zip(read(model, "hook_attn_out", "hook_mlp_out"), expected, strict=True):
        assert_close(value, other, rtol=0, atol=0)


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"t5", "gemma3n"}))
def test_the_sums_of_the_residual_stream_hold_wherever_its_parts_are_read(family, tmp_path):
    """The law that decides: what is read anywhere adds up, or is said to be out of reach."""
    model = plain_model(tmp_path / "m", family)
    pre, post = read(model, "hook_resid_pre", "hook_resid_post")
    assert pre.shape == post.shape == (len(TEXT), tiny.D_MODEL)
    try:
        attn_out, mlp_out = read(model, "hook_attn_out", "hook_mlp_out")
    except Unreachable:
        assert family in WITHOUT_BRANCHES
        return
    try:
        (mid,) = read(model, "hook_resid_mid")
    except Unreachable as error:
        assert "at once" in str(error)
    else:
        assert_close(mid, pre + attn_out, rtol=1e-5, atol=1e-5)
    if family in ("openai_gpt", "opt_post_norm", "gemma4"):  # norms, or another branch, come after the sum
        return
    assert_close(post, pre + attn_out + mlp_out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_bigcode", "phi3", "mpt", "gpt_neox", "bloom", "falcon"])
def test_queries_keys_and_values_of_one_product(family, tmp_path):
    """They lie one after the other, or so within each of the four heads."""
    model = plain_model(tmp_path / "m", family)
    product = {
        "gpt2": lambda: model.transformer.h[1].attn.c_attn,
        "gpt_bigcode": lambda: model.transformer.h[1].attn.c_attn,
        "phi3": lambda: model.model.layers[1].self_attn.qkv_proj,
        "mpt": lambda: model.transformer.blocks[1].attn.Wqkv,
        "gpt_neox": lambda: model.gpt_neox.layers[1].attention.query_key_value,
        "bloom": lambda: model.transformer.h[1].self_attention.query_key_value,
        "falcon": lambda: model.transformer.h[1].self_attention.query_key_value,
    }[family]()
    (qkv,) = by_hand(model, (product, "out"))
    if family in ("gpt_neox", "bloom"):
        expected = list(qkv.view(len(TEXT), 4, 3, 8).unbind(2))
    else:
        rest = {"gpt_bigcode": 8, "falcon": 8, "phi3": 16}.get(family, 32)  # of keys, and of values
        expected = list(qkv.split([32, rest, rest], dim=1))
    for got, other in zip(read(model, "attn.hook_q", "attn.hook_k", "attn.hook_v"), expected, strict=True):
        assert_close(got, other.reshape(len(TEXT), -1), rtol=0, atol=0)


def test_queries_keys_and_values_in_an_order_of_their_own_are_out_of_reach(tmp_path):
    """CodeGen has values before keys."""
    with pytest.raises(Unreachable, match="unknown order"):
        read(plain_model(tmp_path / "m", "codegen"), "attn.hook_k")


def test_normalized_is_what_a_norm_gives_before_its_weight(tmp_path):
    """Of RMSNorm, with and without an offset of its weight, and of LayerNorm."""
    for family in ("llama", "gemma2", "gpt2", "nemotron", "cohere", "olmo"):
        model = plain_model(tmp_path / family, family)
        place = "ln1" if family == "cohere" else "ln2"
        x, normalized = read(model, f"{place}.hook_in", f"{place}.hook_normalized")
        if family not in ("llama", "gemma2"):
            x = x - x.mean(-1, keepdim=True)
        epsilon = 1e-6 if family in ("llama", "gemma2") else 1e-5
        assert_close(normalized, x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt())


def test_a_place_that_no_module_gives_is_said_to_be_out_of_reach(tmp_path):
    model = plain_model(tmp_path / "m", "phi")
    for name in ("hook_resid_mid", "ln2.hook_normalized", "hook_nowhere", "attn.hook_pattern"):
        with pytest.raises(Unreachable):
            read(model, name)
    with pytest.raises(Unreachable, match=r"blocks\.9\.hook_resid_post"):
        PlainHooks(model, ["blocks.9.hook_resid_post"], tiny.BOS + 1)


def test_the_oracle_shares_nothing_with_what_it_checks():
    imported: set[str] = set()
    for module in (plain_hooks, plain_layer, plain_trace):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.ImportFrom):
                imported.add(str(node.module))
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.startswith("daemon")}
    assert ours == {
        "daemon.devices",
        *("daemon.model.float64", "daemon.model.plain_layer", "daemon.model.plain_trace"),
    }
    assert not any(name.startswith(("transformer_lens", "sae_lens", "transformers")) for name in imported)
