from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daemon.analysis.column_inputs import StudySettings
from daemon.batching import splitting
from daemon.batching.splitting import PIECE_TOKENS, SHARED, concat_results, piece_count, split_batch
from daemon.executor.runner import BatchRunner
from daemon.model import encoding
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.trie import build_trie
from daemon.native.rmsnorm_rope_attention import routines
from daemon.recipes import CONTRAST_RECIPE, PLAIN_RECIPE
from daemon.records import BatchResult, Sample, SampleBatch, TokenizedSample
from tests.support import tiny
from tests.support.engines import packed, padded, random_texts
from tests.support.families import save_family
from tests.support.torch_threads import torch_threads

SETTINGS = StudySettings(seed=0, noise_sigma=0.1, noise_draws=4, stability_top_k=10, entropy_top_k=50)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama", head_dim=32)  # as compiled layers take them


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    return [tiny.save_sae(folder / str(n), f"blocks.{n}.hook_resid_post", seed=n) for n in (1, 2)]


def batch_of(samples: list[tuple[tuple[int, ...], ...]], recipe=PLAIN_RECIPE) -> SampleBatch:
    """A batch of samples given as the token ids of their texts."""
    plain = [Sample(i, str(i), None, None, None, ("",) * len(ids), None, 0) for i, ids in enumerate(samples)]
    tokenized = (TokenizedSample(sample, ids) for sample, ids in zip(plain, samples, strict=True))
    return SampleBatch(recipe, tuple(tokenized))


def tokens_of(batch: SampleBatch) -> int:
    return len(build_trie([ids for sample in batch.samples for ids in sample.token_ids]))


def rows(batch: SampleBatch) -> list[int]:
    return [sample.sample.record_index for sample in batch.samples]


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=30),
    shared=st.integers(0, 300),
    cores=st.integers(1, 9),
)
@example(lengths=[600], shared=0, cores=2)
@example(lengths=[6, 562, 17, 29], shared=0, cores=2)
@example(lengths=[19, 586, 29], shared=13, cores=8)
@settings(deadline=None)
def test_pieces_are_the_batch_in_its_order_and_compute_hardly_more(lengths, shared, cores):
    prefix = (0,) * shared
    batch = batch_of([((*prefix, *range(1 + n * 1000, 1 + n * 1000 + m)),) for n, m in enumerate(lengths)])
    pieces = split_batch(batch, cores)
    assert [row for piece in pieces for row in rows(piece)] == rows(batch)
    assert len(pieces) in (1, cores)
    tokens = tokens_of(batch)
    assert sum(tokens_of(piece) for piece in pieces) <= (1 + SHARED) * tokens
    assert len(pieces) == 1 or len(pieces) * PIECE_TOKENS <= tokens


def test_pieces_of_like_samples_are_equal():
    batch = batch_of([(tuple(range(n * 100, n * 100 + 64)),) for n in range(64)])
    pieces = split_batch(batch, 4)
    assert [len(piece.samples) for piece in pieces] == [16, 16, 16, 16]


def test_a_prompt_that_all_samples_share_keeps_a_batch_whole():
    prompt = tuple(range(400))
    batch = batch_of([((*prompt, 1000 + n, 7),) for n in range(1000)])
    assert split_batch(batch, 2) == [batch]


@pytest.mark.parametrize(("prompt", "samples"), [(50, [1, 1]), (51, [2])])
def test_pieces_may_compute_a_twentieth_once_more_and_no_token_over(prompt, samples):
    shared = tuple(range(prompt))
    batch = batch_of([((*shared, *range(1000, 1525 - prompt)),), ((*shared, *range(2000, 2475)),)])
    assert tokens_of(batch) == 1000
    assert [len(piece.samples) for piece in split_batch(batch, 2)] == samples


@pytest.mark.parametrize(
    ("tokens", "cores", "expected"),
    [(100, 8, 1), (8 * PIECE_TOKENS, 8, 8), (8 * PIECE_TOKENS - 1, 8, 1), (10**6, 6, 6), (0, 1, 1)],
)
def test_a_batch_is_split_where_there_is_enough_for_every_core(tokens, cores, expected):
    assert piece_count(tokens, cores) == expected


def contrast_batch(n: int) -> SampleBatch:
    texts = random_texts([5 + i % 9 for i in range(n)])
    return batch_of(
        [(tuple(ids), (*ids, 1, 2), (*ids, 3, 4 + i)) for i, ids in enumerate(texts)], CONTRAST_RECIPE
    )


@pytest.mark.parametrize("positions", ["last", "all", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_batch_in_pieces_gives_what_it_gives_in_one(positions, dtype, llama, saes, cores, monkeypatch):
    study = BatchRunner(
        packed(llama, saes, dtype, positions=positions), dataclasses.replace(SETTINGS, positions=positions)
    )
    batch = contrast_batch(23)
    whole = study.run(batch)
    monkeypatch.setattr(splitting, "PIECE_TOKENS", 8)
    monkeypatch.setattr(splitting, "SHARED", 1.0)
    assert len(split_batch(batch, cores)) == cores
    block = study.run(batch)
    near, flips = (1e-9, 0) if dtype == torch.float64 else (1e-3, 2)  # of features that hardly fire
    for name, column in whole.columns.items():
        assert_nearly_all_equal(block.columns[name], column, near, flips)
    for name in ("sample_row", "text", "layer", "position", "token_id"):
        assert np.array_equal(getattr(block.features, name), getattr(whole.features, name))
    got, expected = activations(block), activations(whole)
    assert len(got.keys() ^ expected.keys()) <= flips
    assert all(abs(got[key] - expected[key]) <= near for key in got.keys() & expected.keys())
    for got_sums, expected_sums in zip(block.layers, whole.layers, strict=True):
        for field in dataclasses.fields(expected_sums):
            of_both = (getattr(sums, field.name) for sums in (got_sums, expected_sums))
            assert_nearly_all_equal(*of_both, near, flips)
    assert torch.get_num_threads() == cores


def activations(block: BatchResult) -> dict[tuple[int, int], float]:
    """By row and index."""
    features = block.features
    rows = np.repeat(np.arange(len(features.offsets) - 1), np.diff(features.offsets))
    return dict(
        zip(zip(rows.tolist(), features.indices.tolist(), strict=True), features.values.tolist(), strict=True)
    )


def assert_nearly_all_equal(got: np.ndarray, expected: np.ndarray, near: float, others: int) -> None:
    """All but so many rows are the same, or near where they are numbers."""
    same = got == expected if got.dtype == object else np.isclose(got, expected, near, near, equal_nan=True)
    assert (~same.reshape(len(same), -1).all(axis=1)).sum() <= others


@pytest.mark.skipif(routines() is None, reason="installed without a C compiler")
def test_in_float32_these_tests_run_the_compiled_layers(llama, saes):
    layers = packed(llama, saes, torch.float32)._trunk.layers
    assert all(type(layer) is FusedDecoderLayer for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_threads_that_read_different_texts_at_a_time_do_not_meet(dtype, llama, saes):
    engine = packed(llama, saes, dtype)
    texts = [random_texts([3 + n, 20 - n])[:: 1 if n % 2 else -1] for n in range(12)]
    alone = [engine.extract(of_one) for of_one in texts]
    together = [None] * len(texts)
    everyone = threading.Barrier(len(texts))

    def read(n: int) -> None:
        everyone.wait()
        together[n] = engine.extract(texts[n])

    threads = [threading.Thread(target=read, args=(n,)) for n in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, got in zip(alone, together, strict=True):
        for a, b in zip(expected.layers, got.layers, strict=True):
            assert torch.equal(b.x, a.x)
            assert torch.equal(b.acts.indices, a.acts.indices)
            assert torch.equal(b.acts.values, a.acts.values)


def test_only_an_engine_that_keeps_nothing_is_used_by_several_threads(llama, saes, tmp_path, monkeypatch):
    assert packed(llama, saes).concurrent
    assert not padded(llama, saes).concurrent
    normalising = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post", architecture="standard")
    tiny.overwrite_sae_config(normalising, normalize_activations="layer_norm")
    assert packed(llama, [normalising]).concurrent
    monkeypatch.setattr(encoding, "agree", lambda *_: False)  # so that SAELens itself encodes
    assert not packed(llama, saes).concurrent


def test_a_block_alone_is_itself(llama, saes):
    block = BatchRunner(packed(llama, saes), SETTINGS).run(contrast_batch(2))
    assert concat_results([block]) is block


@pytest.fixture
def cores():
    """As many threads of torch's as a machine with two cores has."""
    with torch_threads(2) as threads:
        yield threads
