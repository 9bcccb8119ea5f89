from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from daemon.config import SaeSection
from daemon.model.cards import card_of, neuronpedia_id_of
from daemon.model.sae import load_sae
from daemon.model_info import Fit
from tests.support import tiny

HOOK = "blocks.1.hook_resid_post"
BUNDLED = Path(__file__).parents[2] / "daemon" / "presets" / "smollm2-135m"


@pytest.mark.parametrize(
    ("metadata", "card"),
    [
        ({}, Fit()),
        ({"l0": 64.5}, Fit(64.5, None)),
        ({"l0": 64.5, "expected_l0": 65}, Fit(65.0, None)),
        ({"variance_explained": 0.75}, Fit(None, 0.25)),
        ({"expected_fvu": 0.1, "variance_explained": 0.75}, Fit(None, 0.1)),
        ({"l0": "many", "fvu": float("nan")}, Fit()),
        ({"l0": True, "fvu": -1}, Fit()),
    ],
)
def test_a_card_is_read_from_the_metadata(metadata, card):
    sae = tiny.random_sae(HOOK, **metadata)
    assert card_of(sae, None, None) == card
    assert card_of(sae, "no such release", "x") == card


def test_the_card_of_a_release_is_that_of_saelens_registry():
    directory = get_pretrained_saes_directory()
    release, sae_id = next(
        (name, sae_id)
        for name, known in directory.items()
        for sae_id, explained in known.expected_var_explained.items()
        if explained < 1 and known.expected_l0[sae_id] > 0
    )
    known = directory[release]
    assert card_of(tiny.random_sae(HOOK), release, sae_id) == Fit(
        known.expected_l0[sae_id], 1 - known.expected_var_explained[sae_id]
    )
    unknown = next(
        (name, sae_id)
        for name, known in directory.items()
        for sae_id, l0 in known.expected_l0.items()
        if l0 == 0 and known.expected_var_explained[sae_id] == 1
    )
    assert card_of(tiny.random_sae(HOOK), *unknown) == Fit()


def test_the_bundled_dictionaries_bring_the_figures_of_their_model_card():
    lines = (BUNDLED / "README.md").read_text().splitlines()
    rows = [line.replace("`", "").split("|")[1:4] for line in lines if line.startswith("| `blocks.")]
    assert len(rows) == 3
    for hook, fvu, l0 in rows:
        sae = SAE.load_from_disk(BUNDLED / hook.strip())
        assert card_of(sae, None, None) == Fit(float(l0), float(fvu))


@pytest.mark.parametrize(
    ("told", "known"),
    [
        (None, None),
        ("gpt2-small/5-res-jb", "gpt2-small/5-res-jb"),
        ("no/such/set", None),
        ("../x", None),
        ('x"><script>/y', None),
        (7, None),
    ],
)
def test_the_id_at_neuronpedia_is_that_of_the_metadata(told, known):
    assert neuronpedia_id_of(tiny.random_sae(HOOK, neuronpedia_id=told), None, None) == known


def test_the_id_at_neuronpedia_of_a_release_is_that_of_saelens_registry():
    release = get_pretrained_saes_directory()["gpt2-small-res-jb"]
    sae_id, known = next(iter(release.neuronpedia_id.items()))
    sae = tiny.random_sae(HOOK)
    assert known == neuronpedia_id_of(sae, "gpt2-small-res-jb", sae_id) == "gpt2-small/0-res-jb"
    assert neuronpedia_id_of(sae, "gpt2-small-res-jb", "no such id") is None
    assert neuronpedia_id_of(sae, "no such release", sae_id) is None


def test_the_id_at_neuronpedia_is_in_no_unit(tmp_path):
    folder = tiny.save_sae(tmp_path / "s", HOOK)
    infos = []
    for told in ("gpt2-small/5-res-jb", "gpt2-small/6-res-jb"):
        tiny.overwrite_sae_config(folder, metadata=metadata_of(folder) | {"neuronpedia_id": told})
        infos.append(load_sae(SaeSection(path=folder), device="cpu", dtype=torch.float32).info)
    assert infos[0].neuronpedia_id != infos[1].neuronpedia_id
    assert infos[0].identity == infos[1].identity


def metadata_of(folder: Path) -> dict[str, object]:
    metadata: dict[str, object] = json.loads((folder / "cfg.json").read_text())["metadata"]
    return metadata
