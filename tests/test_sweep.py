"""A part of `make sweep`: some families, and every class of dictionary once in each engine."""

from __future__ import annotations

import pytest
from sae_lens.registry import SAE_CLASS_REGISTRY

from daemon.model.saeformat import ARCHITECTURES
from daemon.model.trie_engine import TrieEngine
from tests.sweep import CLASSES, Case, class_cases, sweep

PLACES = [
    Case("blocks.0.hook_attn_out", "topk"),
    Case("blocks.1.hook_resid_post", "gated"),
    Case("blocks.2.ln2.hook_normalized", "skip_transcoder"),
]


@pytest.mark.parametrize("family", ["gemma2", "opt", "bloom", "qwen3_moe", "olmo2", "cohere"])
def test_families_give_what_plain_modules_give_or_are_refused(family, tmp_path):
    rows = list(sweep(family, PLACES, tmp_path))
    assert len(rows) == len(PLACES)
    assert [str(row) for row in rows if row.fails] == []
    if family != "cohere":
        assert all(row.difference is not None for row in rows)


@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out", "attn.hook_z"])
def test_every_class_of_dictionary_gives_what_saelens_gives_or_is_refused(hook, tmp_path):
    cases = [Case(f"blocks.{number % 3}.{hook}", kind) for number, kind in enumerate(CLASSES)]
    rows = list(sweep("llama", cases, tmp_path))
    assert len(rows) == len(CLASSES)
    assert [str(row) for row in rows if row.fails or row.difference is None] == []


def test_every_class_that_loads_is_swept_with_every_normalisation():
    assert set(CLASSES) == set(ARCHITECTURES)
    assert {case.kind for case in class_cases()} == set(SAE_CLASS_REGISTRY)


def test_the_sweep_sees_a_difference(tmp_path, monkeypatch):
    right = TrieEngine.residuals
    monkeypatch.setattr(
        TrieEngine, "residuals", lambda *args: tuple([x * (1 + 1e-4) for x in xs] for xs in right(*args))
    )
    (row,) = sweep("llama", [Case("blocks.1.hook_resid_post", "standard")], tmp_path)
    assert row.fails
