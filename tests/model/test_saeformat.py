"""Settings of cfg.json that contradict one another, or that SAELens does not read, are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from structlog.testing import capture_logs
from torch.testing import assert_close

from daemon.errors import ConfigError
from daemon.model.sae import LoadedSae
from tests.model.test_dictionaries import HOOK, as_before_version_6, load
from tests.support import tiny

ARCHITECTURES = ["standard", "jumprelu", "topk", "gated"]
OLD_TOPK = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 12}}


@pytest.fixture
def folder(tmp_path) -> Path:
    return tiny.save_sae(tmp_path / "sae", HOOK, architecture="standard")


def unknown_settings(folder: Path) -> tuple[LoadedSae, list[str]]:
    """The loaded dictionary, and the keys that were warned of."""
    with capture_logs() as logs:
        loaded = load(folder)
    told = [entry["keys"] for entry in logs if entry["event"] == "sae.unknown_settings"]
    assert len(told) <= 1
    return loaded, told[0] if told else []


@pytest.mark.parametrize("old", [False, True], ids=["version 6", "before version 6"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_unknown_settings_are_warned_of_by_name(architecture, old, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, architecture=architecture)
    if old:
        as_before_version_6(folder, **OLD_TOPK if architecture == "topk" else {})
    tiny.overwrite_sae_config(folder, scale_features=2.0, layernorm_input=True, tied_weights=True)
    assert unknown_settings(folder)[1] == ["layernorm_input", "scale_features", "tied_weights"]


@pytest.mark.parametrize("old", [False, True], ids=["version 6", "before version 6"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_settings_as_saelens_writes_them_raise_no_warning(architecture, old, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, architecture=architecture)
    if old:
        as_before_version_6(folder, **OLD_TOPK if architecture == "topk" else {})
    assert unknown_settings(folder)[1] == []


def test_settings_as_saelens_writes_them_after_training_raise_no_warning(tmp_path):
    shape = {"d_in": tiny.D_MODEL, "d_sae": tiny.D_SAE}
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK, prepend_bos=True)
    JumpReLUTrainingSAE(JumpReLUTrainingSAEConfig(**shape, metadata=metadata)).save_model(tmp_path / "a")
    batchtopk = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, k=7.5, metadata=metadata))
    batchtopk.save_inference_model(tmp_path / "b")
    transcoder = tiny.save_transcoder(tmp_path / "c", HOOK, "blocks.1.hook_mlp_out")
    for folder in (tmp_path / "a", tmp_path / "b", transcoder):
        assert unknown_settings(folder)[1] == []


@pytest.mark.parametrize("old", [False, True], ids=["version 6", "before version 6"])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "gated"])
def test_a_k_beside_an_architecture_that_has_none_is_refused(architecture, old, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, architecture=architecture)
    if old:
        as_before_version_6(folder)
    tiny.overwrite_sae_config(folder, k=12)
    with pytest.raises(ConfigError, match=rf"k = 12 in its cfg\.json, which a {architecture} does not have"):
        load(folder)
    tiny.overwrite_sae_config(folder, k=None)
    assert load(folder).info.architecture == architecture


def test_settings_of_jumprelu_beside_another_architecture_are_refused(folder):
    tiny.overwrite_sae_config(folder, jumprelu_init_threshold=0.01)
    with pytest.raises(
        ConfigError, match=r"jumprelu_init_threshold = 0\.01 in its cfg\.json, which a standard does not have"
    ):
        load(folder)
    as_before_version_6(folder)  # which wrote it for every architecture
    assert load(folder).info.architecture == "standard"


@pytest.mark.parametrize(
    "names",
    [
        {"activation_fn_str": None, "activation_fn": "tanh-relu"},
        {"activation_fn_str": "relu", "activation_fn": "tanh-relu"},
        {"activation_fn_str": "tanh-relu", "activation_fn": "relu"},
        {"activation_fn_str": "relu", "activation_fn": "topk"},
    ],
)
def test_every_name_of_an_activation_function_is_looked_at(names, folder):
    tiny.overwrite_sae_config(folder, **names)
    with pytest.raises(ConfigError, match=r"activation function '(tanh-relu|topk)'"):
        load(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prepend_bos", False),
        ("hook_name", "blocks.2.hook_resid_post"),
        ("model_from_pretrained_kwargs", {"center_writing_weights": True}),
    ],
)
def test_a_setting_that_saelens_reads_in_metadata_is_refused_elsewhere(key, value, folder):
    tiny.overwrite_sae_config(folder, **{key: value})
    with pytest.raises(ConfigError, match=rf"{key} = .* top level of its cfg\.json.*move it into metadata"):
        load(folder)


def test_the_same_setting_at_both_places_is_read(folder):
    tiny.overwrite_sae_config(folder, prepend_bos=True, hook_name=HOOK, model_from_pretrained_kwargs={})
    assert load(folder).info.hook_name == HOOK


def test_metadata_that_saelens_leaves_out_for_lack_of_a_version_is_refused(folder):
    cfg = json.loads((folder / "cfg.json").read_text())
    del cfg["metadata"]["sae_lens_version"]
    cfg["metadata"]["prepend_bos"] = False
    (folder / "cfg.json").write_text(json.dumps({**cfg, "hook_name": HOOK}))
    with pytest.raises(ConfigError, match=r"prepend_bos = False .* metadata.*add sae_lens_version"):
        load(folder)


@pytest.mark.parametrize("value", [None, False, True, 0.5])
def test_a_normalisation_that_version_6_can_not_read_says_what_to_write(value, folder):
    tiny.overwrite_sae_config(folder, normalize_activations=value)
    with pytest.raises(
        ConfigError, match=r"normalize_activations = .* expected one of none, layer_norm|wrong"
    ):
        load(folder)


@pytest.mark.parametrize("value", [None, False])
def test_no_normalisation_of_before_version_6_is_read(value, folder):
    x = torch.randn(5, tiny.D_MODEL, generator=torch.Generator().manual_seed(3))
    expected = SAE.load_from_disk(folder).encode(x)
    loaded = load(as_before_version_6(folder, normalize_activations=value))
    assert_close(loaded.encode(x), expected, rtol=0, atol=0)
