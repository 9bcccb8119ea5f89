"""Words of features, against what the model itself makes of a small push along a decoder row."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from daemon.findings.study import open_study
from daemon.findings.words import WORDS, Vocabulary, words_of
from daemon.model.location import folder_sha256
from daemon.model.smollm2 import sha256_of
from tests.support import tiny
from tests.support.families import save_family
from tests.support.outboxes import make

FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "cohere", "granite", "olmo", "qwen3")
FEATURES = np.array([0, 5, 41])


def study_of(folder, model, saes, **changes):
    """A study whose manifest names a model's folder and dictionaries that lie here."""
    made = make(folder / f"a-{'1' * 12}", 4)
    manifest = made.manifest
    config = json.loads((model / "config.json").read_text())
    manifest["model"] |= {"weights_sha256": folder_sha256(model), "d_model": tiny.D_MODEL}
    manifest["config"] |= {
        "model": {"name": str(model)},
        "sae": [{"path": str(path), "release": None, "id": None, "name": None} for path in saes],
    }
    manifest["saes"] = [
        manifest["saes"][number]
        | {
            "source": path.name,
            "d_in": tiny.D_MODEL,
            "d_out": tiny.D_MODEL,
            "d_sae": tiny.D_SAE,
            "weights_sha256": sha256_of(path / "sae_weights.safetensors"),
        }
        | changes
        for number, path in enumerate(saes)
    ]
    assert config
    made.write()
    return open_study([made.path])


def pushed(model_folder, rows):
    """(k, vocab) by how much logits change with a small step along each row, where the last layer's output is
    of size 1 and has nothing of the row in it."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float64).eval()
    layers = next(
        module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 4
    )
    found = []
    for row in rows.double():
        apart = torch.stack([row, torch.ones_like(row)])
        start = torch.randn(tiny.D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        basis = torch.linalg.qr(apart.T)[0]
        start = start - basis @ (basis.T @ start)
        start = start / start.square().mean().sqrt()
        step = 1e-2  # norms run in float32 whatever the dtype
        logits = []
        for sign in (1, -1):

            def replace(module, args, output, value=start + sign * step * row):
                hidden = output[0] if isinstance(output, tuple) else output
                new = value.expand_as(hidden).clone()
                return (new, *output[1:]) if isinstance(output, tuple) else new

            handle = layers[-1].register_forward_hook(replace)
            with torch.no_grad():
                logits.append(model(torch.tensor([[3, 4]])).logits[0, -1])
            handle.remove()
        found.append((logits[0] - logits[1]) / (2 * step))
    return torch.stack(found)


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return tiny.save_sae(tmp_path_factory.mktemp("saes") / "one", "blocks.2.hook_resid_post")


@pytest.mark.parametrize("family", FAMILIES)
def test_words_are_those_that_the_model_itself_moves(family, sae, tmp_path):
    options = {"final_logit_softcapping": None} if family == "gemma2" else {}
    model = save_family(tmp_path / "model", family, **options)
    words = words_of(study_of(tmp_path, model, [sae]), {0: FEATURES})
    expected = pushed(model, load_file(sae / "sae_weights.safetensors")["W_dec"][FEATURES.tolist()])
    vocabulary = Vocabulary(model)
    for place, feature in enumerate(FEATURES.tolist()):
        found = words[0, feature]
        assert found.missing == ""
        order = expected[place].argsort(descending=True)
        for listed, tokens in ((found.promotes, order[:WORDS]), (found.suppresses, order.flip(0)[:WORDS])):
            assert [word for word, _ in listed] == [vocabulary.spelled(int(token)) for token in tokens]
            numbers = torch.tensor([number for _, number in listed], dtype=torch.float64)
            torch.testing.assert_close(numbers, expected[place][tokens], rtol=1e-3, atol=1e-4)


def test_a_model_in_shards_and_with_its_own_unembedding(sae, tmp_path):
    model = save_family(tmp_path / "model", "llama", tie_word_embeddings=False)
    whole = words_of(study_of(tmp_path / "a", model, [sae]), {0: FEATURES})
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for path in model.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "shards")
    shards = words_of(study_of(tmp_path / "b", tmp_path / "shards", [sae]), {0: FEATURES})
    assert shards == whole
    assert whole[0, 0].promotes


def test_folded_dictionaries_come_from_the_projects_loader(tmp_path):
    model = save_family(tmp_path / "model", "llama")
    folder = tiny.save_sae(tmp_path / "folded", "blocks.1.hook_resid_post")
    tiny.overwrite_sae_config(folder, normalize_activations="expected_average_only_in")
    (folder / "activation_scaler.json").write_text('{"scaling_factor": 2.0}')
    from daemon.findings.found_again import SaeSection
    from daemon.model.sae import load_sae

    loaded = load_sae(SaeSection(path=folder), device="cpu", dtype=torch.float32)
    study = study_of(tmp_path, model, [folder], weights_sha256=loaded.info.weights_sha256)
    words = words_of(study, {0: FEATURES})
    assert words[0, 5].missing == ""
    assert words[0, 5].promotes[0][1] > 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hook": "blocks.2.attn.hook_z", "hook_out": "blocks.2.attn.hook_z"}, "is not the residual stream"),
        ({"d_out": 7}, "writes 7 numbers, the model reads 32"),
        ({"weights_sha256": "0" * 64}, "is another here than it was"),
        ({"source": "other"}, "the dictionary other is not here"),
        ({"d_sae": 10_000_000, "weights_sha256": "0" * 64}, "more than a report takes"),
    ],
)
def test_why_a_dictionary_has_no_words(change, said, sae, tmp_path):
    model = tiny.save_llama(tmp_path / "model")
    words = words_of(study_of(tmp_path, model, [sae], **change), {0: FEATURES})
    assert {(one.promotes, one.suppresses) for one in words.values()} == {((), ())}
    assert all(said in one.missing for one in words.values())


def test_why_a_model_has_no_words(sae, tmp_path):
    model = tiny.save_llama(tmp_path / "model")
    study = study_of(tmp_path, model, [sae])
    other = tiny.save_gpt2(tmp_path / "other")
    (model / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    assert "is another than it was" in words_of(study, {0: FEATURES})[0, 5].missing
    shutil.rmtree(model)
    assert "is not here" in words_of(study, {0: FEATURES})[0, 5].missing


def test_models_and_dictionaries_of_a_hub_are_not_fetched(sae, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = tiny.save_llama(tmp_path / "model")
    study = study_of(tmp_path, model, [sae])
    hub = study.manifest.model.model_copy(update={"weights_sha256": None, "revision": "4" * 40})
    config = study.manifest.config | {"model": {"name": "someone/model"}}
    manifest = study.manifest.model_copy(update={"model": hub, "config": config})
    monkeypatch.setattr(type(study), "manifest", property(lambda self: manifest))
    assert "not in the cache" in words_of(study, {0: FEATURES})[0, 5].missing
    snapshot = tmp_path / "cache" / "models--someone--model" / "snapshots" / ("4" * 40)
    shutil.copytree(model, snapshot)
    assert words_of(study, {0: FEATURES})[0, 5].promotes
