"""Dictionaries that SAELens would read otherwise than they were trained are refused with the cause."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from daemon.config import SaeSection, load_config
from daemon.errors import ConfigError
from daemon.model.sae import LoadedSae, load_sae
from daemon.model_wiring import load_engine
from tests.model.damage import damage
from tests.support import tiny
from tests.support.engines import random_texts

HOOK = "blocks.1.hook_resid_post"


def load(folder: Path) -> LoadedSae:
    """Raises ConfigError of one line."""
    try:
        return load_sae(SaeSection(path=folder), device="cpu", dtype=torch.float32)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 500
        assert str(error).startswith("SAE ")
        raise


def as_before_version_6(folder: Path, **settings: object) -> Path:
    """cfg.json as SAELens 3 to 5 wrote it."""
    path = folder / "cfg.json"
    cfg = json.loads(path.read_text())
    metadata = cfg.pop("metadata")
    cfg.pop("reshape_activations")
    old = {
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "finetuning_scaling_factor": False,
        "hook_name": metadata["hook_name"],
        "hook_layer": 1,
        "hook_head_index": None,
        "model_name": "tiny",
        "prepend_bos": True,
        "context_size": 128,
        "dataset_path": "x",
        "dataset_trust_remote_code": True,
        "sae_lens_training_version": "4.0.0",
        "neuronpedia_id": None,
        "model_from_pretrained_kwargs": {},
        "seqpos_slice": [None],
    }
    path.write_text(json.dumps({**cfg, **old, **settings}))
    return folder


def with_tensors(folder: Path, **tensors: torch.Tensor | None) -> Path:
    path = folder / "sae_weights.safetensors"
    kept = {name: tensor for name, tensor in {**load_file(path), **tensors}.items() if tensor is not None}
    save_file(kept, path)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.save_sae(tmp_path / "sae", HOOK, architecture="standard")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize(
    ("mode", "fold"),
    [
        ("covariance_whitening", "fold_activation_whitening"),
        ("expected_average_only_in", "fold_activation_norm_scaling_factor"),
    ],
)
def test_a_normalisation_that_is_left_out_is_refused(architecture, mode, fold, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, architecture=architecture)
    tiny.overwrite_sae_config(folder, normalize_activations=mode)
    with pytest.raises(ConfigError, match=rf"normalize_activations = {mode}.*fold it first \({fold}\)"):
        load(folder)


@pytest.mark.parametrize("value", [True, "expected_average_only_in"])
def test_a_normalisation_of_before_version_6_is_refused(value, folder):
    with pytest.raises(ConfigError, match="normalize_activations = expected_average_only_in"):
        load(as_before_version_6(folder, normalize_activations=value))


@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
def test_normalisations_that_are_applied_are_read(mode, folder):
    tiny.overwrite_sae_config(folder, normalize_activations=mode)
    x = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(3))
    expected = SAE.load_from_disk(folder).encode(x)
    assert_close(load(folder).encode(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["tanh-relu", "gelu", "leaky_relu", "", "relu2"])
def test_an_activation_function_that_is_left_out_is_refused(name, folder):
    with pytest.raises(ConfigError, match=rf"activation function '{name}', which SAELens leaves out"):
        load(as_before_version_6(folder, activation_fn_str=name))
    tiny.overwrite_sae_config(folder, activation_fn_str=name, sae_lens_version="6.1.0")
    with pytest.raises(ConfigError, match="activation function"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("relu", {"slope": 0.1}, "activation_fn_kwargs has slope"),
        ("topk", {}, "activation function 'topk'"),  # else it would be read with relu
        ("topk", None, "activation function 'topk'"),
        ("topk", {"k": 0}, "k = 0"),
        ("topk", {"k": 97}, "k = 97"),
        ("topk", {"k": "12"}, "k = '12'"),
        ("topk", {"k": 12, "postact_fn": "identity"}, "activation_fn_kwargs has postact_fn"),
    ],
)
def test_arguments_of_an_activation_function_that_are_left_out_are_refused(name, kwargs, said, folder):
    with pytest.raises(ConfigError, match=said):
        load(as_before_version_6(folder, activation_fn_str=name, activation_fn_kwargs=kwargs))


def test_relu_and_topk_of_before_version_6_are_read(folder):
    x = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(3))
    sae = SAE.load_from_disk(folder)
    pre_acts = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    assert_close(load(as_before_version_6(folder)).encode(x), pre_acts.relu(), rtol=0, atol=1e-6)
    tiny.overwrite_sae_config(folder, activation_fn_str="topk", activation_fn_kwargs={"k": 12})
    values, indices = pre_acts.topk(12, dim=-1)
    expected = torch.zeros_like(pre_acts).scatter(-1, indices, values.relu())
    assert_close(load(folder).encode(x), expected, rtol=0, atol=1e-6)


def test_topk_without_its_k_is_refused(tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, architecture="topk")
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["k"]
    (folder / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(ConfigError, match=r"k = None in its cfg\.json: expected a number from 1 to d_sae"):
        load(folder)


@pytest.mark.parametrize("key", ["hook_head_index", "hook_head_index_out"])
@pytest.mark.parametrize("place", ["metadata", "top", "old"])
def test_one_heads_dictionary_is_refused(key, place, folder):
    if place == "old":
        as_before_version_6(folder, **{key: 3})
    elif place == "top":
        tiny.overwrite_sae_config(folder, **{key: 3})
    else:
        cfg = json.loads((folder / "cfg.json").read_text())
        tiny.overwrite_sae_config(folder, metadata={**cfg["metadata"], key: 3})
    with pytest.raises(ConfigError, match=rf"reads one head alone \({key} = 3\)"):
        load(folder)


def test_a_scaling_factor_is_refused_unless_it_is_one(folder):
    with_tensors(folder, scaling_factor=torch.ones(tiny.D_SAE))
    load(as_before_version_6(folder))
    with_tensors(folder, scaling_factor=torch.full((tiny.D_SAE,), 2.0))
    for used in (False, True):
        tiny.overwrite_sae_config(folder, finetuning_scaling_factor=used)
        with pytest.raises(ConfigError, match="uses a scaling_factor on its features"):
            load(folder)
    with pytest.raises(ConfigError, match="says finetuning_scaling_factor"):
        load(with_tensors(folder, scaling_factor=None))


def test_a_rescaling_that_is_left_out_is_refused(folder):
    tiny.overwrite_sae_config(folder, rescale_acts_by_decoder_norm=True)
    with pytest.raises(
        ConfigError, match="rescale_acts_by_decoder_norm, which SAELens leaves out for standard"
    ):
        load(folder)


@pytest.mark.parametrize(
    ("kind", "config", "options", "said"),
    [
        (
            BatchTopKTrainingSAE,
            BatchTopKTrainingSAEConfig,
            {"k": 7.5},
            "of batchtopk training|it holds topk_threshold",
        ),
        (
            MatryoshkaBatchTopKTrainingSAE,
            MatryoshkaBatchTopKTrainingSAEConfig,
            {"k": 8, "matryoshka_widths": [48, tiny.D_SAE]},
            "of matryoshka_batchtopk training|it holds topk_threshold",
        ),
    ],
)
def test_checkpoints_of_training_say_how_to_export_them(kind, config, options, said, tmp_path):
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK, prepend_bos=True)
    sae = kind(config(d_in=tiny.D_MODEL, d_sae=tiny.D_SAE, metadata=metadata, **options))
    sae.save_model(tmp_path / "training")
    with pytest.raises(ConfigError, match=rf"(?:{said}).*save_inference_model"):
        load(tmp_path / "training")
    sae.save_inference_model(tmp_path / "inference")
    assert load(tmp_path / "inference").info.architecture == "jumprelu"
    cfg = json.loads((tmp_path / "training" / "cfg.json").read_text())
    (tmp_path / "training" / "cfg.json").write_text(json.dumps({**cfg, "architecture": "jumprelu"}))
    with pytest.raises(ConfigError, match=r"a checkpoint of training \(it holds topk_threshold\)"):
        load(tmp_path / "training")


def test_a_checkpoint_of_training_that_encodes_as_it_is_is_read(tmp_path):
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK, prepend_bos=True)
    config = JumpReLUTrainingSAEConfig(d_in=tiny.D_MODEL, d_sae=tiny.D_SAE, metadata=metadata)
    sae = JumpReLUTrainingSAE(config)
    sae.save_model(tmp_path / "sae")
    x = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        assert_close(load(tmp_path / "sae").encode(x), sae.encode(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"d_sae": 128}, "d_sae = 128 in its cfg.json, but its weights have 96"),
        ({"d_in": 64}, "d_in = 64 in its cfg.json, but its weights have 32"),
        ({"d_sae": -96}, "d_sae = -96"),
        ({"d_sae": "96"}, "d_sae = '96'"),
        ({"d_sae": None}, "d_sae = None"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input = 'false'.*wrong type"),
        ({"architecture": "jumprelu"}, "lack threshold, which a jumprelu has"),
        ({"architecture": "gated"}, "lack b_gate, b_mag, r_mag, which a gated has .they hold b_enc"),
        ({"architecture": "temporal"}, "architecture 'temporal' is not supported"),
        ({"architecture": "Standard"}, "did you mean standard"),
        ({"architecture": 5}, "architecture = 5"),
        ({"normalize_activations": "nope"}, "normalize_activations = 'nope' .* is not known"),
        ({"reshape_activations": "nope"}, "reshape_activations = 'nope'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations = 'hook_z' at 'blocks.1.hook_resid_post'"),
        ({"metadata": None}, "metadata in its cfg.json is no object"),
        ({"metadata": {"sae_lens_version": "6.0.0"}}, "hook None is not supported"),
        ({"metadata": []}, "metadata in its cfg.json is no object"),
        ({"metadata": {"hook_name": 5}}, "hook_name = 5"),
        ({"sae_lens_version": "x"}, "SAE "),
    ],
)
def test_a_configuration_that_does_not_fit_its_weights_is_one_line(change, said, folder):
    tiny.overwrite_sae_config(folder, **change)
    with pytest.raises(ConfigError, match=said):
        load(folder)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"b_dec": None}, "its weights lack b_dec, which a standard has"),
        (
            {"W_enc": torch.ones(tiny.D_SAE, tiny.D_MODEL)},
            r"W_enc is \(96, 32\), transposed: expected \(32, 96\)",
        ),
        ({"W_dec": torch.ones(tiny.D_MODEL, tiny.D_SAE)}, r"W_dec is \(32, 96\), transposed"),
        (
            {"W_dec": torch.ones(tiny.D_SAE, 5)},
            r"W_dec is \(96, 5\), where its cfg\.json asks for \(96, 32\)",
        ),
        ({"b_enc": torch.ones(5)}, r"b_enc is \(5,\)"),
        ({"threshold": torch.ones(96)}, "hold threshold, which a standard does not have"),
        ({"log_threshold": torch.ones(96)}, "a checkpoint of training"),
        ({"W_enc": torch.full((32, 96), torch.nan)}, "W_enc holds NaN or infinity"),
        ({"W_dec": torch.full((96, 32), torch.inf)}, "W_dec holds NaN or infinity"),
        ({"b_enc": torch.full((96,), 1e300, dtype=torch.float64)}, "b_enc holds NaN or infinity"),
        ({"W_dec": torch.ones(96, 32, dtype=torch.int8)}, "W_dec of type I8, not floating-point"),
        ({"W_dec": torch.ones(96, 32, dtype=torch.complex64)}, "W_dec of type C64, not floating-point"),
    ],
)
def test_weights_that_do_not_fit_are_named(tensors, said, folder):
    with pytest.raises(ConfigError, match=said):
        load(with_tensors(folder, **tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_every_floating_point_type_are_read(dtype, folder):
    path = folder / "sae_weights.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    x = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(3))
    expected = SAE.load_from_disk(folder, dtype="float32").encode(x)
    assert_close(load(folder).encode(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["sae_weights.safetensors", "cfg.json"])
@pytest.mark.parametrize("how", ["pointer", "empty", "cut"])
def test_files_that_are_not_whole_are_one_line(name, how, folder):
    with pytest.raises(ConfigError, match=damage(folder / name, how)):
        load(folder)


@pytest.mark.parametrize(
    ("key", "hook", "refused"),
    [
        ("fold_ln", "blocks.1.ln2.hook_normalized", True),
        ("fold_ln", HOOK, False),
        ("fold_value_biases", "blocks.1.attn.hook_z", True),
        ("fold_value_biases", "blocks.1.hook_attn_out", False),
        ("center_writing_weights", "blocks.1.attn.hook_z", True),
        ("center_unembed", HOOK, False),
    ],
)
def test_processed_weights_are_refused_where_they_change_what_is_read(key, hook, refused, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", hook, model_from_pretrained_kwargs={key: True})
    if not refused:
        load(folder)
        return
    with pytest.raises(ConfigError, match="was trained on weights that TransformerLens had processed"):
        load(folder)


@pytest.mark.parametrize("old", [False, True])
def test_heads_are_encoded_side_by_side_whatever_the_reshaping(old, tmp_path):
    model = tiny.save_llama(tmp_path / "model")
    plain = tiny.save_sae(tmp_path / "plain", "blocks.1.attn.hook_z", architecture="standard")
    folder = Path(shutil.copytree(plain, tmp_path / "sae"))
    if old:
        as_before_version_6(folder)
    else:
        tiny.overwrite_sae_config(folder, reshape_activations="hook_z")
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, (folder,)).toml())
    engine, _ = load_engine(load_config(toml, {}, {}))
    bare = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    sae = SAE.load_from_disk(plain)
    texts = random_texts([9, 4])
    layer = engine.extract(texts).layers[0]
    heads: list[torch.Tensor] = []
    bare.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: heads.append(args[0][0, -1])
    )
    with torch.inference_mode():
        for row, text in enumerate(texts):
            bare(torch.tensor([text]))
            assert_close(layer.x[row], heads[-1], rtol=1e-5, atol=1e-6)
            acts = sae.encode(heads[-1])
            assert_close(layer.acts.to_dense(tiny.D_SAE)[row], acts, rtol=1e-4, atol=1e-5)
            assert_close(layer.reconstruction[row], sae.decode(acts), rtol=1e-4, atol=1e-5)
