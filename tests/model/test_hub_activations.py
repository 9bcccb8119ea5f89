"""One dictionary of every loader and place, through a hub on loopback: what runs, and that it runs right."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from structlog.testing import capture_logs
from torch import Tensor

from daemon.errors import ConfigError
from daemon.model.encoding import encoder_of
from daemon.model.loading import load_model
from daemon.model.location import locate_model
from daemon.model.sae import LoadedSae, load_sae
from daemon.model.trie_engine import TrieEngine
from daemon.tools.oracle import plain_dictionary
from tests.support.by_hand import by_hand, last
from tests.support.engines import dense, random_texts
from tests.support.hub import hub_here, running_hub
from tests.support.hub_dictionaries import (
    DICTIONARIES,
    MODELS,
    Dictionary,
    registered,
    save_dictionaries,
    save_models,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}  # of a row's length


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub, hub_here(hub, folder / "cache"), registered():
        save_dictionaries(hub, folder / "files")
        save_models(hub, folder / "files")
        yield folder / "files"


def place(hook_name: str, model: str) -> str:
    """Gemma Scope 2 calls by hook_mlp_in what the MLP reads; older ones leave `attn` out."""
    if model == "tiny/gemma-3":
        hook_name = hook_name.replace(".hook_mlp_in", ".mlp.hook_in")
    return hook_name


def check_rows(got: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    error = (got.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=1e-12)
    assert float(error.max()) < TOLERANCE[dtype], what


def saelens(one: Dictionary, dtype: torch.dtype):
    """As SAELens loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sae = SAE.from_pretrained(one.release, one.id, device="cpu", dtype=str(dtype).removeprefix("torch."))
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae.requires_grad_(False)


def centred(x: Tensor, sae) -> Tensor:
    kwargs = sae.cfg.metadata.model_from_pretrained_kwargs or {}
    return x - x.mean(-1, keepdim=True) if kwargs.get("center_writing_weights") else x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("model", MODELS)
def test_packed_activations_are_those_of_saelens_on_the_plain_model(model, dtype, files, tmp_path):
    ones = [one for one in DICTIONARIES if one.model == model and one.support == "packed"]
    hf = load_model(locate_model(model, tmp_path), device="cpu", dtype=dtype)
    sections = [one.section.model_copy(update={"prepend_bos": True}) for one in ones]  # all read these texts
    entries: list[LoadedSae] = [load_sae(section, device="cpu", dtype=dtype) for section in sections]
    engine = TrieEngine(hf, entries, [encoder_of(entry) for entry in entries], "last")
    assert engine.info.engine == "packed"
    a, b = random_texts([40, 17])
    texts = [a, a[:20] + b[1:], a[:20], b]
    names = [place(name, model) for one in ones for name in (one.hook_name, one.hook_name_out) if name]
    plain = by_hand(files / model, MODELS[model][0], names, texts, dtype)
    for one, layer in zip(ones, engine.extract(texts).layers, strict=True):
        sae = saelens(one, dtype)
        x = centred(last(plain[place(one.hook_name, model)]), sae)
        target = centred(last(plain[place(one.hook_name_out, model)]), sae) if one.hook_name_out else x
        with torch.inference_mode():
            expected = sae.encode(x), sae(x)
        assert (expected[0] > 0).any()
        check_rows(layer.x, x, dtype, f"{one.name}: what it reads")
        check_rows(dense(layer, one.d_sae), expected[0], dtype, f"{one.name}: activations")
        if one.reconstructs:
            check_rows(layer.target, target, dtype, f"{one.name}: what it predicts")
            check_rows(layer.reconstruction, expected[1], dtype, f"{one.name}: reconstruction")
        else:
            assert layer.reconstruction is None
            assert layer.errors.absolute.isnan().all()


def test_a_factor_that_the_registry_lacks_is_not_left_out_in_silence(files):
    """Llama Scope's activations were normalised in training, by factors that the registry has."""
    one = next(one for one in DICTIONARIES if one.release == "llama_scope_lxr_8x")
    registry = get_pretrained_saes_directory()
    registry[one.release] = dataclasses.replace(one.entry, norm_scaling_factor={})
    try:
        with pytest.raises(
            ConfigError, match=r"normalize_activations = expected_average_only_in.*fold it first"
        ):
            load_sae(one.section, device="cpu", dtype=torch.float32)
    finally:
        registry[one.release] = one.entry


def test_a_cross_layer_transcoder_says_once_that_it_has_no_error(files):
    one = next(one for one in DICTIONARIES if not one.reconstructs)
    with capture_logs() as logs:
        load_sae(one.section, device="cpu", dtype=torch.float32)
    assert [entry["event"] for entry in logs] == ["sae.not_for_reconstruction"]
    assert not plain_dictionary(one.section, "cpu", "float32").reconstructs


@pytest.mark.parametrize(
    "one", [one for one in DICTIONARIES if one.support == "refused"], ids=lambda one: one.name
)
def test_what_is_left_is_refused_in_one_line(one, files):
    with pytest.raises(ConfigError, match=one.says) as error:
        load_sae(one.section, device="cpu", dtype=torch.float32)
    assert "\n" not in str(error.value)
