from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.batching.batcher import Batcher, TrieCost, sample_cost
from daemon.model.trie import build_trie
from daemon.prefixes import shared_length
from daemon.recipes import CONTRAST_RECIPE, PLAIN_RECIPE, Recipe
from daemon.records import Entry, Part, PartExtent, Sample, TokenizedPart, TokenizedSample
from tests.support.sources import unclaimed

SOURCE = unclaimed("f")


def part(widths: list[int], recipe: Recipe = PLAIN_RECIPE, number: int = 0) -> TokenizedPart:
    texts = len(recipe.templates)
    samples = [Sample(i, str(i), None, None, None, ("",) * texts, None, 0) for i in range(len(widths))]
    return TokenizedPart(
        Part(SOURCE, PartExtent(number, 0, len(samples), 0), False, recipe, tuple(samples), ()),
        tuple(
            TokenizedSample(sample, ((0,) * width,) * texts)
            for sample, width in zip(samples, widths, strict=True)
        ),
    )


def drain(batcher: Batcher) -> list[list[int]]:
    """Widths of the samples of each batch."""
    batches = []
    while batcher:
        batches.append([sample.width for sample in batcher.take().samples])
    return batches


@given(
    widths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(1, 200),
    most=st.none() | st.integers(1, 5),
)
def test_every_sample_runs_once_within_the_limits_or_alone(widths, budget, most):
    batcher = Batcher(budget, most, shares_prefixes=False)
    batcher.add(part(widths))
    batches = drain(batcher)
    assert sorted(width for batch in batches for width in batch) == sorted(widths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(batch) <= budget
        assert most is None or len(batch) <= most
    assert batcher.tokens == 0


def test_texts_that_add_no_token_fill_a_batch_too():
    batcher = Batcher(64, shares_prefixes=True)
    batcher.add(part([5] * 500))
    sizes = [len(batch) for batch in drain(batcher)]
    assert sum(sizes) == 500
    assert max(sizes) <= 64


def test_samples_of_similar_length_share_a_batch():
    batcher = Batcher(24, shares_prefixes=False)
    batcher.add(part([2, 12, 3, 11, 2, 3]))
    assert drain(batcher) == [[2, 2, 3, 3], [11, 12]]


def test_the_budget_counts_every_text_and_its_padding():
    batcher = Batcher(30, shares_prefixes=False)
    batcher.add(part([5, 5, 5], CONTRAST_RECIPE))
    assert drain(batcher) == [[5, 5], [5]]


@pytest.mark.parametrize("shares_prefixes", [False, True])
def test_a_batch_may_have_exactly_the_tokens_of_the_budget(shares_prefixes):
    texts = [[(n,) * 5] for n in range(4)]
    for budget, sizes in ((20, [4]), (19, [3, 1])):
        batcher = Batcher(budget, shares_prefixes=shares_prefixes)
        batcher.add(part_of(texts))
        assert [len(batch) for batch in drain(batcher)] == sizes


def test_a_batch_may_have_exactly_the_samples_of_the_limit():
    batcher = Batcher(1000, 3, shares_prefixes=False)
    batcher.add(part([4] * 8))
    assert [len(batch) for batch in drain(batcher)] == [3, 3, 2]


def test_recipes_never_share_a_batch_but_files_do():
    batcher = Batcher(1000, shares_prefixes=False)
    batcher.add(part([4], PLAIN_RECIPE, 0))
    batcher.add(part([4], CONTRAST_RECIPE, 1))
    batcher.add(part([4], PLAIN_RECIPE, 2))
    assert sorted(len(batch) for batch in drain(batcher)) == [1, 2]


def test_an_empty_packer_refuses():
    with pytest.raises(IndexError):
        Batcher(10, shares_prefixes=False).take()


def part_of(token_ids: list[list[tuple[int, ...]]]) -> TokenizedPart:
    """A part of samples with these texts."""
    samples = [Sample(i, str(i), None, None, None, ("",), None, 0) for i in range(len(token_ids))]
    return TokenizedPart(
        Part(SOURCE, PartExtent(0, 0, len(samples), 0), False, PLAIN_RECIPE, tuple(samples), ()),
        tuple(TokenizedSample(sample, tuple(ids)) for sample, ids in zip(samples, token_ids, strict=True)),
    )


tokens = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.lists(tokens, min_size=1, max_size=3), max_size=20), st.integers(1, 30))
def test_packed_batches_stay_within_the_budget_of_their_trie(token_ids, budget):
    batcher = Batcher(budget, shares_prefixes=True)
    batcher.add(part_of(token_ids))
    seen = []
    while batcher:
        batch = batcher.take()
        seen += [sample.token_ids for sample in batch.samples]
        texts = [ids for sample in batch.samples for ids in sample.token_ids]
        assert len(batch.samples) == 1 or len(build_trie(texts)) <= budget
    assert sorted(seen) == sorted(tuple(ids) for ids in token_ids)


@given(
    st.lists(st.lists(st.tuples(tokens, st.booleans()), min_size=1, max_size=3), max_size=20),
    st.integers(1, 40),
)
def test_batches_that_are_read_both_ways_stay_within_the_budget_of_both_tries(texts, budget):
    bos = 9
    given = part_of([[(bos, *ids) for ids, _ in of_one] for of_one in texts])
    samples = tuple(
        replace(sample, bos_added=tuple(added for _, added in of_one))
        for sample, of_one in zip(given.samples, texts, strict=True)
    )
    batcher = Batcher(budget, shares_prefixes=True)
    batcher.add(TokenizedPart(given.part, samples))
    n = 0
    while batcher:
        batch = batcher.take()
        n += len(batch.samples)
        read = [ids for sample in batch.samples for ids in (*sample.token_ids, *sample.bare_ids)]
        assert len(batch.samples) == 1 or len(build_trie(read)) <= budget
    assert n == len(texts)
    assert batcher.tokens == 0


def test_batches_are_as_few_as_it_takes_and_of_about_the_same_cost():
    batcher = Batcher(100, shares_prefixes=True)
    batcher.add(part_of([[tuple(range(100 * n, 100 * n + 9))] for n in range(13)]))
    assert [len(batcher.take().samples) for _ in range(2)] == [7, 6]
    assert not batcher


def test_batches_of_samples_unlike_in_cost_are_of_about_the_same_cost():
    batcher = Batcher(100, shares_prefixes=False)
    batcher.add(part([10] * 8 + [20] * 6))
    costs = [len(batch) * max(batch) for batch in drain(batcher)]
    assert costs == [80, 80, 40]


def test_a_beginning_that_all_share_counts_once():
    batcher = Batcher(130, shares_prefixes=True)
    batcher.add(part_of([[(*range(100), 200 + n)] for n in (3, 1, 2)] + [[(7,) * 100]]))
    assert [len(batcher.take().samples) for _ in range(2)] == [3, 1]


def test_a_packed_batch_that_was_too_much_comes_back_in_halves():
    batcher = Batcher(1000, shares_prefixes=True)
    batcher.add(part_of([[(*range(10), 100 + n)] for n in range(6)]))
    batcher.shrink(batcher.take())
    assert batcher.max_batch_tokens == 8
    assert len(batcher) == 6


def test_a_batch_of_two_that_was_too_much_comes_back_one_by_one():
    batcher = Batcher(1000, shares_prefixes=True)
    batcher.add(part_of([[(1,)], [(2,)]]))
    batcher.shrink(batcher.take())
    assert batcher.max_batch_tokens == 1
    assert [len(batch) for batch in drain(batcher)] == [1, 1]


@pytest.mark.parametrize("give_back", [Batcher.put_back, Batcher.shrink])
def test_what_is_given_back_waits_again(give_back):
    batcher = Batcher(10, shares_prefixes=False)
    batcher.add(part([5, 5, 4]))
    batch = batcher.take()
    left = batcher.tokens
    give_back(batcher, batch)
    assert batcher.tokens == left + sum(sample.width for sample in batch.samples) == 14
    assert len(batcher) == 3
    drain(batcher)
    assert batcher.tokens == 0


def test_the_next_batch_is_a_full_one_from_the_budget_on():
    batcher = Batcher(10, shares_prefixes=False)
    assert batcher.is_partial
    batcher.add(part([5, 4]))
    assert batcher.is_partial
    batcher.add(part([1]))
    assert not batcher.is_partial  # exactly the budget


def test_a_batch_that_is_planned_waits_for_no_company():
    batcher = Batcher(10, shares_prefixes=False)
    batcher.add(part([6, 6]))
    batcher.take()
    assert batcher.tokens < batcher.max_batch_tokens
    assert not batcher.is_partial


@given(st.lists(st.lists(tokens, min_size=1, max_size=3), min_size=1, max_size=10))
def test_what_a_sample_shares_is_what_it_costs_more_alone(token_ids):
    entries = [Entry(part_of(token_ids), row) for row in range(len(token_ids))]
    cost = TrieCost()
    for entry in sorted(entries, key=TrieCost.order):
        before = cost.total
        cost.add(entry.sample)
        assert cost.total - before + cost.shared == sample_cost(TrieCost, entry)


@given(tokens | st.text("ab"), tokens | st.text("ab"))
def test_shared_length_is_that_of_the_longest_common_beginning(a, b):
    expected = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    assert shared_length(a, b) == expected


def test_batches_that_ran_beside_each_other_halve_the_limit_once():
    batcher = Batcher(8, shares_prefixes=False)
    batcher.add(part([4] * 8))
    beside = [batcher.take() for _ in range(4)]
    for batch in beside:
        batcher.shrink(batch)
    assert batcher.max_batch_tokens == 4


def test_suspect_halves_stay_what_they_are_when_another_batch_does_not_fit():
    batcher = Batcher(8, shares_prefixes=False)
    batcher.add(part([2] * 8))
    first, second = batcher.take(), batcher.take()
    batcher.halve(first)
    batcher.shrink(second)
    assert [batcher.take().suspect for _ in range(2)] == [True, True]
    assert batcher.tokens == 2 * len(second.entries)
