from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from daemon.analysis import stability as module
from daemon.analysis.stability import NOISE_BANK_SIZE, noise_bank, noise_draws, stability, strongest
from daemon.tools.reference import noise_similarities
from tests.analysis.synthetic import QUICK, SETTINGS, random_sae, residuals, unprojected

names = st.text(st.characters(), max_size=4)  # any code point, lone surrogates too


@QUICK
@given(st.integers(-(1 << 70), 1 << 70), names, names, st.integers(1, NOISE_BANK_SIZE))
def test_draws_are_distinct_rows_of_the_bank(seed, sample_id, text, k):
    draws = noise_draws(seed, sample_id, text, k)
    assert draws.shape == (k,)
    assert draws.dtype == np.int64
    assert len(set(draws.tolist())) == k
    assert 0 <= draws.min() <= draws.max() < NOISE_BANK_SIZE
    assert draws.tolist() == noise_draws(seed, sample_id, text, k).tolist()


def test_more_draws_continue_fewer():
    assert noise_draws(0, "a", "fact", 64)[:8].tolist() == noise_draws(0, "a", "fact", 8).tolist()


def test_draws_differ_between_seeds_samples_and_texts_however_these_are_spelt():
    tuples = [
        (0, "a", "bc"),
        (1, "a", "bc"),
        (0, "ab", "c"),
        (0, "", "abc"),
        (0, "a\0", "bc"),
        (0, "\ud800", "bc"),
        (0, "\udc00", "bc"),
    ]
    drawn = {tuple(noise_draws(*arguments, k=16).tolist()) for arguments in tuples}
    assert len(drawn) == len(tuples)


def test_draws_and_bank_are_the_same_on_every_machine():
    assert noise_draws(0, "s0", "fact", 8).tolist() == [154, 100, 140, 114, 127, 147, 81, 7]
    bank = noise_bank(0, 4, torch.float64)
    assert bank[0].tolist() == pytest.approx(
        [0.03959643242655634, 0.835693563036256, 0.25897099845189697, -0.20514196429305373], abs=1e-14
    )


def test_draws_cover_the_bank_evenly():
    drawn = np.concatenate([noise_draws(0, str(sample), "fact", 8) for sample in range(2000)])
    frequency = np.bincount(drawn, minlength=NOISE_BANK_SIZE) / len(drawn)
    assert abs(frequency * NOISE_BANK_SIZE - 1).max() < 0.6  # five standard deviations


def test_more_draws_than_the_bank_holds_are_refused():
    with pytest.raises(ValueError, match="257 draws out of a noise bank of 256"):
        noise_draws(0, "a", "b", 257)


def test_the_bank_is_standard_normal_and_differs_between_seeds_and_widths():
    bank = noise_bank(5, 300, torch.float64)
    assert bank.shape == (NOISE_BANK_SIZE, 300)
    assert abs(bank.mean()) < 0.02
    assert abs(bank.std() - 1) < 0.02
    assert torch.equal(bank, noise_bank(5, 300, torch.float64))
    assert torch.equal(bank.float(), noise_bank(5, 300, torch.float32))
    assert not torch.equal(bank, noise_bank(-5, 300, torch.float64))
    assert not torch.equal(bank[:, :10], noise_bank(5, 10, torch.float64))


@QUICK
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 7, 512]))
def test_stability_is_that_of_each_sample_alone(seed, n, top_k, max_rows):
    d_in = 6
    sae = random_sae(seed, d_in, 24)
    x = residuals(seed, n, d_in)
    chosen = dataclasses.replace(SETTINGS, noise_sigma=0.3, stability_top_k=top_k)
    ids = [f"id{row}" for row in range(n)]
    draws = torch.from_numpy(np.stack([noise_draws(chosen.seed, i, "t", chosen.noise_draws) for i in ids]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MAX_ACTIVATED", {"cpu": max_rows})
        mean, deviation = stability(sae.noise(chosen.seed, chosen.noise_sigma), x, draws, top_k)
    for row, sample_id in enumerate(ids):
        alone = noise_similarities(
            x[row].numpy(), sample_id, "t", chosen, lambda v: sae.encode(torch.from_numpy(v)).numpy()
        )
        assert mean[row].item() == pytest.approx(np.mean(alone), abs=1e-12)
        assert deviation[row].item() == pytest.approx(np.std(alone), abs=1e-12)


def scripted(outputs: list[list[float]]):
    """An encoder that answers with these rows, whatever it is asked."""
    return lambda x: torch.tensor(outputs, dtype=torch.float64)


def test_stability_by_hand():
    encode = scripted([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]])
    draws = torch.tensor([[0, 1]])
    noise = unprojected(encode, noise_bank(0, 2, torch.float32), 0.1)
    mean, deviation = stability(noise, torch.zeros(1, 2), draws, 2)
    # {0, 1} against {3, 0} and against nothing: 1/3 and 0
    assert mean.tolist() == pytest.approx([1 / 6])
    assert deviation.tolist() == pytest.approx([1 / 6])


def test_a_silent_encoder_and_an_absence_of_noise_are_perfectly_stable():
    bank, draws = noise_bank(0, 3, torch.float64), torch.arange(8).view(2, 4)
    x = residuals(0, 2, 3)
    for encode, sigma in ((torch.zeros_like, 0.1), (torch.abs, 0.0)):
        mean, deviation = stability(unprojected(encode, bank, sigma), x, draws, 2)
        assert mean.tolist() == [1, 1]
        assert deviation.tolist() == [0, 0]


def test_noise_is_the_drawn_rows_times_sigma():
    seen = []

    def encode(x):
        seen.append(x)
        return x.abs()

    x, bank = residuals(0, 2, 3), noise_bank(0, 3, torch.float64)
    stability(unprojected(encode, bank, 0.5), x, torch.tensor([[4, 9], [2, 0]]), 1)
    expected = [
        x[0],
        x[0] + 0.5 * bank[4],
        x[0] + 0.5 * bank[9],
        x[1],
        x[1] + 0.5 * bank[2],
        x[1] + 0.5 * bank[0],
    ]
    assert_close(torch.cat(seen), torch.stack(expected))


@pytest.mark.parametrize(("n", "k"), [(200, 8), (3, 256)])
def test_the_dense_workspace_is_bounded(n, k):
    sizes = []

    def encode(x):
        sizes.append(len(x))
        return x.abs()

    draws = torch.arange(k).expand(n, k)
    noise = unprojected(encode, noise_bank(0, 2, torch.float32), 0.1)
    stability(noise, torch.ones(n, 2), draws, 1)
    assert sum(sizes) == n * (k + 1)
    assert max(sizes) <= module.MAX_ACTIVATED["cpu"]


entries = st.sampled_from([-1.0, 0.0, 1.0, 2.0, 3.0])


@QUICK
@given(st.lists(st.lists(entries, min_size=6, max_size=6), min_size=1, max_size=4), st.integers(1, 8))
def test_the_strongest_are_positive_and_ties_go_to_the_lower_index(rows, top_k):
    found = strongest(torch.tensor(rows), top_k)
    for row, indices in zip(rows, found.tolist(), strict=True):
        active = [i for i, value in enumerate(row) if value > 0]
        expected = sorted(active, key=lambda i: (-row[i], i))[:top_k]
        assert sorted(i for i in indices if i >= 0) == sorted(expected)
