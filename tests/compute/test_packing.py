from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.compute.packing import Packer
from daemon.records import (
    CONTRAST_RECIPE,
    PLAIN_RECIPE,
    Part,
    PartExtent,
    Recipe,
    Sample,
    TokenizedPart,
    TokenizedSample,
)
from tests.sources import unclaimed

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


def drain(packer: Packer) -> list[list[int]]:
    """Widths of the samples of each batch."""
    batches = []
    while packer:
        batches.append([sample.width for sample in packer.take().samples])
    return batches


@given(
    widths=st.lists(st.integers(1, 60), max_size=40),
    budget=st.integers(1, 200),
    most=st.none() | st.integers(1, 5),
)
def test_every_sample_runs_once_within_the_limits_or_alone(widths, budget, most):
    packer = Packer(budget, most)
    packer.add(part(widths))
    batches = drain(packer)
    assert sorted(width for batch in batches for width in batch) == sorted(widths)
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(batch) <= budget
        assert most is None or len(batch) <= most
    assert packer.tokens == 0


def test_samples_of_similar_length_share_a_batch():
    packer = Packer(max_batch_tokens=24)
    packer.add(part([2, 12, 3, 11, 2, 3]))
    assert drain(packer) == [[2, 2, 3, 3], [11, 12]]


def test_the_budget_counts_every_text_and_its_padding():
    packer = Packer(max_batch_tokens=30)
    packer.add(part([5, 5, 5], CONTRAST_RECIPE))
    assert drain(packer) == [[5, 5], [5]]


def test_recipes_never_share_a_batch_but_files_do():
    packer = Packer(max_batch_tokens=1000)
    packer.add(part([4], PLAIN_RECIPE, 0))
    packer.add(part([4], CONTRAST_RECIPE, 1))
    packer.add(part([4], PLAIN_RECIPE, 2))
    assert sorted(len(batch) for batch in drain(packer)) == [1, 2]


def test_an_empty_packer_refuses():
    with pytest.raises(IndexError):
        Packer(10).take()
