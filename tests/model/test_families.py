"""Families of models: those that see, those whose attention is their own, those that do not run."""

from __future__ import annotations

import subprocess

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from daemon import model_wiring
from daemon.config import SaeSection, load_config
from daemon.model.sae import load_sae
from tests.support import families, tiny
from tests.support.engines import dense, packed, padded, random_texts
from tests.sweep import Case, sweep


@pytest.mark.parametrize("family", families.SEEING)
def test_of_a_model_that_sees_the_language_part_is_read(family, tmp_path):
    folder = families.save_family(tmp_path / "model", family)
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    texts = random_texts([19, 7])
    found = packed(folder, [sae], torch.float32).extract(texts)
    plain = AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    dictionary = load_sae(SaeSection(path=sae), device="cpu", dtype=torch.float32)
    expected = []
    for text in texts:
        with torch.inference_mode():
            hidden = plain(input_ids=torch.tensor([text]), output_hidden_states=True).hidden_states
        expected.append(dictionary.encode(hidden[2][0, -1:]))
    assert_close(dense(found.layers[0]), torch.cat(expected), rtol=1e-4, atol=1e-4)


def test_transformerlens_installs_no_packages(tmp_path, monkeypatch):
    started: list[object] = []
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda self, *args, **_: started.append(args))
    folder = families.save_family(tmp_path / "model", "gemma3_seeing")
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_mlp_out")
    engine = padded(folder, [sae], torch.float32)
    assert engine.info.engine == "padded"
    assert started == []


@pytest.mark.parametrize(
    ("family", "packs"), [("llama", True), ("gptj", False), ("gpt_oss", False), ("mamba", False)]
)
def test_a_model_whose_attention_is_its_own_is_loaded_once(family, packs, tmp_path, monkeypatch):
    load, loads = model_wiring.load_model, []
    monkeypatch.setattr(
        model_wiring, "load_model", lambda *args, **options: (loads.append(args), load(*args, **options))[1]
    )
    model = families.save_family(tmp_path / "model", family)
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(model, (sae,)).toml())
    engine, loaded = model_wiring.load_engine(load_config(tmp_path / "lensd.toml", {}, {}))
    assert engine.info.engine == ("packed" if packs else "padded")
    assert len(loads) == 1
    assert loaded.model.config._attn_implementation == ("lensd_packed" if packs else "eager")


@pytest.mark.parametrize("family", ["falcon_grouped", "openai_gpt", "t5", "xlnet"])
def test_a_family_that_does_not_run_says_so_in_one_line(family, tmp_path):
    (row,) = sweep(family, [Case("blocks.1.hook_resid_post", "standard")], tmp_path)
    assert row.engine == "refused"
    assert len(row.note) < 400
