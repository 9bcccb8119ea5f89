"""SAEs that read texts with BOS beside SAEs that read them without: as two studies of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from daemon.model.extraction import Extraction
from daemon.model.trie_engine import TrieEngine
from tests.support import tiny
from tests.support.engines import dense, packed, padded, random_texts
from tests.test_not_finite import TOKENIZER, UNPROBED, save_overflowing

HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.1.hook_resid_post")
WAYS = (True, False, True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def saes(tmp_path_factory) -> list[Path]:
    """Two that expect BOS, and between them one that does not, at the place of one of the others."""
    root = tmp_path_factory.mktemp("saes")
    folders = []
    for number, (hook, way) in enumerate(zip(HOOKS, WAYS, strict=True)):
        sae = tiny.random_sae(hook, seed=number, prepend_bos=way)
        if number == 2:  # of another width
            sae = tiny.random_sae(hook, architecture="topk", seed=2, prepend_bos=way)
        sae.save_model(root / str(number))
        folders.append(root / str(number))
    return folders


@pytest.fixture(autouse=True)
def alike_named(monkeypatch):
    """Both at layer 1 have the width of all dictionaries here."""
    monkeypatch.setattr(
        "daemon.model.sae.names_of", lambda infos, given: tuple(f"s{n}" for n in range(len(infos)))
    )


def with_bos() -> list[list[int]]:
    texts = random_texts([9, 2, 14, 9, 30])
    return [*texts, texts[2][:9]]


def without(texts: Sequence[Sequence[int]]) -> list[list[int]]:
    return [list(text[1:]) for text in texts]


def rows_at(extraction: Extraction, sae: int) -> list[tuple[int, int, int, list[int], list[float]]]:
    """What is stored of an SAE: text, position, token, features and activations."""
    (group,) = [group for group in extraction.stored if sae in group.saes]
    acts = group.acts[group.saes.index(sae)]
    text = np.repeat(np.arange(len(group.offsets) - 1), np.diff(group.offsets)).tolist()
    found = []
    for row, number, position, token in zip(
        group.rows.tolist(), text, group.positions.tolist(), group.token_ids.tolist(), strict=True
    ):
        n = int(acts.counts[row])
        found.append((number, position, token, acts.indices[row, :n].tolist(), acts.values[row, :n].tolist()))
    return found


@pytest.mark.parametrize("make", [packed, padded])
@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_each_sae_is_given_what_a_study_of_its_kind_gives_it(make, positions, llama, saes):
    texts = with_bos()
    both = make(llama, saes, positions=positions).extract([*texts, *without(texts)])
    of_bos = make(llama, [saes[0], saes[2]], positions=positions).extract(texts)
    of_bare = make(llama, [saes[1]], positions=positions).extract(without(texts))
    apart = [(of_bos, 0), (of_bare, 0), (of_bos, 1)]
    assert [layer.name for layer in both.layers] == ["s0", "s1", "s2"]
    for sae, (alone, number) in enumerate(apart):
        ours, theirs = both.layers[sae], alone.layers[number]
        assert torch.equal(dense(ours) > 0, dense(theirs) > 0)
        assert_close(dense(ours), dense(theirs), rtol=0, atol=1e-10)
        if positions != "max":
            assert_close(ours.x, theirs.x, rtol=0, atol=1e-10)
            assert_close(ours.reconstruction, theirs.reconstruction, rtol=0, atol=1e-10)
        got, expected = rows_at(both, sae), rows_at(alone, number)
        assert [row[:4] for row in got] == [row[:4] for row in expected]
        for row, other in zip(got, expected, strict=True):
            np.testing.assert_allclose(row[4], other[4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [packed, padded])
@pytest.mark.parametrize("positions", ["last", "all", "mean"])
def test_of_each_text_the_tokens_that_count_are_those_of_a_study_of_its_kind(make, positions, llama, saes):
    added, own = with_bos(), [tiny.BOS, 70, 71]  # to the last no BOS was added: both ways read it as it is
    masks = [bytes(at in (0, 1, len(text) - 2) for at in range(len(text))) for text in added]
    masks[0] = b"\1" * len(added[0])  # all of it counts
    texts, bare = [*added, own], [*without(added), own]
    masks, bare_masks = [*masks, b"\1\1\0"], [*[mask[1:] for mask in masks], b"\1\1\0"]
    engine = make(llama, saes, positions=positions)
    both = engine.finish(engine.start([*texts, *bare], [*masks, *bare_masks]))
    if positions == "all":
        assert [[row[1] for row in rows_at(both, sae) if row[0] == len(added)] for sae in (0, 1)] == [
            [1],
            [1],
        ]
    for sae, read, counted in ((0, texts, masks), (1, bare, bare_masks)):
        engine = make(llama, [saes[sae]], positions=positions)
        alone = engine.finish(engine.start(read, counted))
        assert_close(dense(both.layers[sae]), dense(alone.layers[0]), rtol=0, atol=1e-10)
        assert [row[:4] for row in rows_at(both, sae)] == [row[:4] for row in rows_at(alone, 0)]


def test_both_ways_are_read_in_one_pass_which_is_counted_once(llama, saes, monkeypatch):
    passes = []
    run = TrieEngine._run
    monkeypatch.setattr(TrieEngine, "_run", lambda *args: passes.append(args) or run(*args))
    engine = packed(llama, saes)
    passes.clear()
    texts = with_bos()
    extraction = engine.extract([*texts, *without(texts)])
    assert len(passes) == 1
    distinct = {tuple(text[:n]) for text in texts for n in range(1, len(text) + 1)}
    bare = {tuple(text[:n]) for text in without(texts) for n in range(1, len(text) + 1)}
    assert extraction.computed_tokens - extraction.padding_tokens == len(distinct) + len(bare)


def test_a_text_that_is_not_finite_is_named_once_and_takes_no_other_along(tmp_path, saes):
    model = save_overflowing(tmp_path / "m", UNPROBED)
    (bad,) = TOKENIZER(UNPROBED)["input_ids"]
    texts = random_texts([5, 4, 6])
    texts[1] = [tiny.BOS, 70, bad]
    together = packed(model, saes, torch.float32).extract([*texts, *without(texts)])
    assert [(one.text, one.sae, one.in_model) for one in together.not_finite] == [(1, 0, True)]
    kept = [texts[0], texts[2]]
    alone = packed(model, saes, torch.float32).extract([*kept, *without(kept)])
    for ours, theirs in zip(together.layers, alone.layers, strict=True):
        assert_close(dense(ours)[[0, 2]], dense(theirs), rtol=1e-4, atol=1e-5)
