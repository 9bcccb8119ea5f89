"""Dictionaries whose activations were normalised in training, with and without the numbers for it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from sae_lens.training.activation_scaler import ActivationScaler, ActivationWhitening
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from daemon.config import SaeSection
from daemon.errors import ConfigError
from daemon.model.sae import load_sae
from daemon.tools.oracle import plain_dictionary
from tests.support import tiny

HOOK = "blocks.1.hook_resid_post"
D = tiny.D_MODEL
NAMES = ("activation_scaler.json", "activation_whitening.safetensors")


def scaler_of(mode: str) -> ActivationScaler:
    if mode == "expected_average_only_in":
        return ActivationScaler(scaling_factor=0.37)
    matrix = torch.randn(D, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mean = torch.linspace(-1, 1, D, dtype=torch.float64)
    return ActivationScaler(whitening=ActivationWhitening(mean, matrix, torch.linalg.inv(matrix)))


def checkpoint(folder: Path, mode: str, **options: object):
    """As SAELens's training saves one; also the dictionary itself, which reads normalised values."""
    sae = tiny.random_sae(HOOK, architecture="standard").to(torch.float64)
    for name, value in options.items():
        setattr(sae.cfg, name, value)
    sae.save_model(folder)
    tiny.overwrite_sae_config(folder, normalize_activations=mode)
    scaler_of(mode).save(str(folder / NAMES[0]))
    return sae


def loaded(folder: Path):
    return load_sae(SaeSection(path=folder), device="cpu", dtype=torch.float64)


@pytest.mark.parametrize("reads_less_b_dec", [False, True])
@pytest.mark.parametrize("mode", ["expected_average_only_in", "covariance_whitening"])
def test_a_checkpoints_normalisation_is_folded_into_its_weights(mode, reads_less_b_dec, tmp_path):
    raw = checkpoint(tmp_path / "sae", mode, apply_b_dec_to_input=reads_less_b_dec)
    scaler, entry = scaler_of(mode), loaded(tmp_path / "sae")
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.inference_mode():
        acts = raw.encode(scaler.scale(x))
        assert (acts > 0).any()
        assert_close(entry.sae.encode(x), acts, rtol=0, atol=1e-9)
        assert_close(entry.sae.decode(acts), scaler.unscale(raw.decode(acts)), rtol=0, atol=1e-9)
        with warnings.catch_warnings():
            oracle = plain_dictionary(SaeSection(path=tmp_path / "sae"), "cpu", "float64").sae
        assert_close(oracle.encode(x), acts, rtol=0, atol=1e-9)


def test_what_is_folded_in_is_part_of_a_dictionarys_identity(tmp_path):
    hashes = set()
    for factor in (0.37, 0.38):
        checkpoint(tmp_path / "sae", "expected_average_only_in")
        ActivationScaler(scaling_factor=factor).save(str(tmp_path / "sae" / NAMES[0]))
        hashes.add(loaded(tmp_path / "sae").info.weights_sha256)
    assert len(hashes) == 2


@pytest.mark.parametrize("mode", ["expected_average_only_in", "covariance_whitening"])
def test_without_the_numbers_it_is_refused(mode, tmp_path):
    checkpoint(tmp_path / "sae", mode)
    for name in NAMES:
        (tmp_path / "sae" / name).unlink(missing_ok=True)
    with pytest.raises(ConfigError, match=f"normalize_activations = {mode}, .* fold it first"):
        loaded(tmp_path / "sae")


@pytest.mark.parametrize("factor", [0, -1.0, True, "1", float("nan")])
def test_a_factor_that_is_none_is_refused(factor, tmp_path):
    checkpoint(tmp_path / "sae", "expected_average_only_in")
    (tmp_path / "sae" / NAMES[0]).write_text(json.dumps({"scaling_factor": factor}))
    with pytest.raises(ConfigError, match="expected a number above 0") as error:
        loaded(tmp_path / "sae")
    assert "\n" not in str(error.value)


def test_a_whitening_of_another_width_is_refused(tmp_path):
    checkpoint(tmp_path / "sae", "covariance_whitening")
    path = tmp_path / "sae" / NAMES[1]
    save_file({name: tensor[: D // 2].contiguous() for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ConfigError, match=f"is not the whitening of {D} values"):
        loaded(tmp_path / "sae")


def test_a_transcoders_normalisation_is_not_guessed(tmp_path):
    folder = tiny.save_transcoder(tmp_path / "sae", HOOK, HOOK, d_out=D)
    tiny.overwrite_sae_config(folder, normalize_activations="expected_average_only_in")
    scaler_of("expected_average_only_in").save(str(folder / NAMES[0]))
    with pytest.raises(ConfigError, match="fold it first"):
        loaded(folder)
