"""A model is accepted only with the weights of the layers that are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model.float64 import full_precision
from daemon.model.loading import check_weights, load_model
from daemon.model.location import locate_model
from daemon.model_wiring import load_engine
from tests.model.damage import damage
from tests.support import families, tiny
from tests.support.engines import random_texts

EXPERTS = {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
MIXTURES = {
    "MixtralConfig": EXPERTS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "Qwen3MoeConfig": EXPERTS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "GptOssConfig": EXPERTS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "DeepseekV3Config": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
    },
}
Tensors = dict[str, torch.Tensor]


def changed(folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def configured(folder: Path, **settings: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def accept(folder: Path, last_layer: int = 2, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model, its weights accepted up to a layer. Raises ConfigError of one line."""
    try:
        loaded = load_model(locate_model(str(folder), folder), device="cpu", dtype=dtype)
        check_weights(loaded, last_layer)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        raise
    return loaded.model


@pytest.mark.parametrize(
    ("prefix", "whose"),
    [
        ("_orig_mod.", "torch.compile"),
        ("module.", "DataParallel or DeepSpeed"),
        ("module._orig_mod.", "torch.compile"),
        ("base_model.model.", "PEFT"),
        ("_fsdp_wrapped_module.", "FSDP"),
        ("_checkpoint_wrapped_module.", "activation checkpointing"),
        ("student.", "strip the prefix 'student.'"),
    ],
)
def test_names_of_wrapped_modules_are_refused_with_the_remedy(prefix, whose, folder):
    changed(folder, lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()})
    with pytest.raises(
        ConfigError, match=r"its weights lack model\.embed_tokens\.weight, .* and hold"
    ) as error:
        accept(folder)
    assert whose in str(error.value)


def test_names_that_are_wrapped_inside_are_refused(folder):
    changed(
        folder, lambda tensors: {name.replace(".mlp.", ".mlp._orig_mod."): tensors[name] for name in tensors}
    )
    with pytest.raises(
        ConfigError, match=r"lack model\.layers\.0\.mlp\.down_proj\.weight, .* torch\.compile"
    ):
        accept(folder)


@pytest.mark.parametrize(
    "lost", ["layers.1.mlp", "embed_tokens", "layers.0.input_layernorm", "layers.2.self_attn.k_proj"]
)
def test_a_lost_part_of_a_layer_that_is_read_is_refused(lost, folder):
    changed(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if lost not in name})
    with pytest.raises(ConfigError, match=rf"its weights lack model\.{lost}"):
        accept(folder)


@pytest.mark.parametrize(
    "harmless",
    [
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if "layers.3" not in name},
        lambda tensors: {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"},
        lambda tensors: {
            name.removeprefix("model."): tensors[name] for name in tensors if "lm_head" not in name
        },
        lambda tensors: tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)},
        lambda tensors: tensors | {"model.layers.4.mlp.up_proj.weight": torch.ones(4, 4)},
        lambda tensors: (
            tensors | {"score.weight": torch.ones(2, 32), "v_head.summary.weight": torch.ones(1, 32)}
        ),
    ],
    ids=[
        "no head",
        "no last layer",
        "no final norm",
        "bare names",
        "frequencies",
        "a layer beyond",
        "other heads",
    ],
)
def test_what_is_not_read_may_be_missing_or_left_over(harmless, folder, llama):
    model = accept(changed(folder, harmless))
    expected = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.arange(9)[None]
    with torch.inference_mode():
        got, want = (m(ids, output_hidden_states=True).hidden_states[3] for m in (model, expected))
    assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "left_over",
    [
        "model.layers.1.mlp.up_proj.lora_A.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.self_attn.q_proj.bias",
        "model.layers.1.mlp.up_proj.weight_scale_inv",
        "model.embed_positions.weight",
    ],
)
def test_what_would_change_the_layers_read_is_not_dropped_in_silence(left_over, folder):
    changed(folder, lambda tensors: tensors | {left_over: torch.ones(4)})
    with pytest.raises(ConfigError, match=rf"hold {left_over}, which LlamaForCausalLM does not have"):
        accept(folder)


def test_a_layer_that_the_configuration_leaves_out_matters_only_if_read(folder):
    accept(configured(folder, num_hidden_layers=3))
    accept(configured(folder, num_hidden_layers=6))
    with pytest.raises(ConfigError, match=r"lack model\.layers\.4\."):
        accept(folder, last_layer=4)


def test_masks_of_older_versions_are_harmless(tmp_path):
    folder = tiny.save_gpt2(tmp_path / "model")
    masks = {f"transformer.h.{n}.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool) for n in range(3)}
    masks |= {f"transformer.h.{n}.attn.masked_bias": torch.tensor(-1e9) for n in range(3)}
    accept(changed(folder, lambda tensors: tensors | masks), last_layer=1)
    strange = {"transformer.h.0.attn.c_attn.lora_A": torch.ones(8, 8)}  # what is no mask is refused
    with pytest.raises(ConfigError, match="PEFT"):
        accept(changed(folder, lambda tensors: tensors | strange), last_layer=1)


@pytest.mark.parametrize("shape", [(5, 32), (32, 64), (64,), (0, 32)])
def test_a_tensor_of_another_shape_is_refused(shape, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    changed(folder, lambda tensors: tensors | {name: torch.ones(shape)})
    with pytest.raises(ConfigError, match=rf"do not belong together: {name} is \({shape[0]}"):
        accept(folder)


@pytest.mark.parametrize(
    "setting",
    [{"intermediate_size": 10**8}, {"vocab_size": 10**9}, {"num_hidden_layers": 10**7}, {"hidden_size": -32}],
)
def test_a_configuration_of_absurd_size_is_refused_before_it_is_built(setting, folder):
    with pytest.raises(ConfigError, match="model model: "):
        accept(configured(folder, **setting))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_by_name_where_they_are_read(value, folder):
    def spoil(tensors: Tensors, layer: int) -> Tensors:
        tensors[f"model.layers.{layer}.mlp.up_proj.weight"][3, 3] = value
        return tensors

    changed(folder, lambda tensors: spoil(tensors, 3))
    accept(folder)
    changed(folder, lambda tensors: spoil(tensors, 2))
    with pytest.raises(ConfigError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or infinity"):
        accept(folder)


def test_weights_beyond_float16_say_which_type_holds_them(folder):
    changed(
        folder, lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.full((64, 32), 1e5)}
    )
    accept(folder)
    with pytest.raises(ConfigError, match=r"infinity in float16: .* set model\.dtype = float32 or bfloat16"):
        accept(folder, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.complex64])
def test_numbers_that_are_not_floating_point_are_not_cast_in_silence(dtype, folder):
    name = "model.layers.1.mlp.up_proj.weight"
    changed(folder, lambda tensors: tensors | {name: tensors[name].to(dtype)})
    with pytest.raises(ConfigError, match=rf"{name} of type \w+, not floating-point"):
        accept(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
@pytest.mark.parametrize("how", ["pointer", "empty", "cut"])
def test_files_that_are_not_whole_are_one_line(name, how, folder):
    with pytest.raises(ConfigError, match=damage(folder / name, how)):
        accept(folder)


def test_a_missing_shard_and_a_lost_entry_are_named(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:20], "model-00002-of-00002.safetensors": names[20:]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    accept(folder)
    index.write_text(
        json.dumps(
            {"metadata": {}, "weight_map": weight_map | {names[0]: "model-00002-of-00002.safetensors"}}
        )
    )
    with pytest.raises(ConfigError, match=r"model-00002-of-00002\.safetensors lacks lm_head\.weight"):
        accept(folder)
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"the shard model-00002-of-00002\.safetensors is missing"):
        accept(folder)


@pytest.mark.parametrize(
    ("quantization", "packages"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum and gptqmodel"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "fbgemm_fp8"}, "fbgemm-gpu"),
        ({"quant_method": "torchao"}, "torchao"),
        ({"quant_method": "quanto"}, "optimum-quanto"),
        ({"quant_method": "hqq"}, "hqq"),
        ({"quant_method": "aqlm"}, "aqlm"),
        ({"quant_method": "quark"}, "amd-quark"),
        ({"quant_method": "auto-round"}, "auto-round"),
    ],
)
def test_a_quantised_checkpoint_names_the_package_that_it_needs(quantization, packages, folder, monkeypatch):
    monkeypatch.setattr("daemon.model.quantized.installed", lambda module: False)
    with pytest.raises(ConfigError, match=rf"which needs {packages}: pip install"):
        accept(configured(folder, quantization_config=quantization))


@pytest.mark.parametrize("quantization", [{}, {"quant_method": "nope"}, 5, "x"])
def test_a_quantisation_that_nobody_knows_is_one_line(quantization, folder):
    with pytest.raises(ConfigError, match="model model: "):
        accept(configured(folder, quantization_config=quantization))


def test_an_adapter_is_not_left_out_in_silence(folder):
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"adapter_config\.json beside the weights.*merge_and_unload"):
        accept(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match="a PEFT adapter without its model"):
        accept(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_type": "nope"}, "Transformers knows no model_type nope"),
        ({"model_type": "t5"}, "T5 is no causal language model"),
        ({"hidden_act": "nope"}, "nope"),
        ({"rms_norm_eps": "x"}, "expected float, got str"),
        ({"num_attention_heads": 0}, "model model: can't be loaded"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, "nope"),
        ({"max_position_embeddings": -1}, "max_position_embeddings = -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps in its config.json is NaN"),
        ({"model_type": "gpt2"}, "its weights lack transformer"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_line(settings, said, folder):
    with pytest.raises(ConfigError, match=said):
        accept(configured(folder, **settings))


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_of_experts_are_right_in_float64(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(families.FAMILIES, kind, (kind, families.COMMON | MIXTURES[kind]))
    folder = families.save_family(tmp_path / "model", kind)
    sae = tiny.save_sae(tmp_path / "sae", "blocks.2.hook_resid_post")
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(folder, (sae,)).toml())
    engine, _ = load_engine(load_config(toml, {}, {"model.dtype": "float64"}))
    plain = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    texts = random_texts([9, 14])
    layer = engine.extract(texts).layers[0]
    for row, text in enumerate(texts):
        with torch.inference_mode(), full_precision(torch.float64):
            states = plain(torch.tensor([text]), output_hidden_states=True).hidden_states
        assert_close(layer.x[row], states[3][0, -1], rtol=1e-9, atol=1e-9)


OTHER_FAMILIES = {
    "FalconConfig": {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "OpenAIGPTConfig": {"n_embd": tiny.D_MODEL, "n_layer": 4, "n_head": 4, "n_positions": 512},
    "RobertaConfig": {"is_decoder": True, "pad_token_id": 0},
    "XLNetConfig": {"d_model": tiny.D_MODEL, "n_layer": 4, "n_head": 4, "d_inner": 64},
    "CTRLConfig": {"n_embd": tiny.D_MODEL, "n_layer": 4, "n_head": 4, "dff": 64},
    "Gemma3nTextConfig": {
        "vocab_size_per_layer_input": tiny.BOS + 1,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 1,
        "laurel_rank": 8,
        "layer_types": ["full_attention"] * 4,
        "activation_sparsity_pattern": None,
        "num_key_value_heads": 2,
        "head_dim": 8,
    },
}


@pytest.mark.parametrize("kind", OTHER_FAMILIES)
def test_families_that_can_not_be_read_are_a_short_line_and_others_are_right(kind, tmp_path, monkeypatch):
    common = {
        key: value
        for key, value in families.COMMON.items()
        if kind not in ("OpenAIGPTConfig", "XLNetConfig", "CTRLConfig") or key == "vocab_size"
    }
    monkeypatch.setitem(families.FAMILIES, kind, (kind, common | OTHER_FAMILIES[kind]))
    folder = families.save_family(tmp_path / "model", kind)
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(folder, (tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post"),)).toml())
    try:
        engine, _ = load_engine(load_config(toml, {}, {}))
    except ConfigError as error:
        assert 20 < len(str(error)) < 400 and "\n" not in str(error)
        assert "network" not in str(error)
        return
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = random_texts([9, 4])
    layer = engine.extract(texts).layers[0]
    for row, text in enumerate(texts):
        with torch.inference_mode():
            states = plain(torch.tensor([text]), output_hidden_states=True).hidden_states
        assert_close(layer.x[row], states[2][0, -1], rtol=1e-4, atol=1e-4)
