from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from daemon.batching.assembler import Assembler
from daemon.recipes import PLAIN_RECIPE
from daemon.records import (
    Batch,
    BatchResult,
    Entry,
    FeatureRows,
    LayerSums,
    Part,
    PartExtent,
    Reject,
    Sample,
    TokenizedPart,
    TokenizedSample,
)
from tests.support.sources import unclaimed


def part_of(unit: str, number: int, n: int, rejects: tuple[Reject, ...] = ()) -> TokenizedPart:
    source = unclaimed(unit, unit)
    samples = [Sample(i, f"{unit}{i}", None, None, None, ("t",), None, 0) for i in range(n)]
    part = Part(
        source,
        PartExtent(number, 0, len(samples) + len(rejects), 0),
        False,
        PLAIN_RECIPE,
        tuple(samples),
        rejects,
        0.5,
        0.25,
    )
    return TokenizedPart(part, tuple(TokenizedSample(sample, ((1, 2),)) for sample in samples))


def block_of(n: int) -> BatchResult:
    """A block of n samples, of which sample i has l0 = i + 1 and residual sum (i, 1)."""
    none = np.zeros(0, dtype=np.int64)
    features = FeatureRows(
        none, none, none, none, none, np.zeros(1, dtype=np.int64), none.astype(np.uint32), none
    )
    sums = LayerSums(
        rows=np.ones(n, dtype=np.int64),
        l0=np.arange(1.0, n + 1),
        squared_error=np.ones(n),
        squared_norm=np.ones(n),
        total=np.stack([np.arange(float(n)), np.ones(n)], axis=1),
    )
    return BatchResult({}, features, (sums,), forward_seconds=4.0, sae_seconds=2.0, analysis_seconds=1.0)


@dataclasses.dataclass
class Clock:
    now: float = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def assembly(clock) -> Assembler:
    return Assembler((2,), clock)


def test_a_part_is_finished_when_its_last_sample_comes_back(assembly):
    part = part_of("u", 0, 3)
    assert assembly.open(part) is None
    entries = [Entry(part, row) for row in range(3)]
    assert assembly.scatter(Batch(PLAIN_RECIPE, (entries[2], entries[0])), block_of(2)) == []
    (finished,) = assembly.scatter(Batch(PLAIN_RECIPE, (entries[1],)), block_of(1))
    assert finished.part is part
    assert [piece.part_rows.tolist() for piece in finished.pieces] == [[2, 0], [1]]


def test_a_batch_shared_by_parts_gives_each_its_own_rows(assembly):
    first, second = part_of("u", 0, 1), part_of("v", 0, 2)
    for part in (first, second):
        assembly.open(part)
    entries = (Entry(second, 1), Entry(first, 0), Entry(second, 0))
    finished = {
        done.part.part.file.unit: done for done in assembly.scatter(Batch(PLAIN_RECIPE, entries), block_of(3))
    }
    assert finished["u"].pieces[0].result_rows.tolist() == [1]
    assert finished["v"].pieces[0].result_rows.tolist() == [0, 2]
    assert finished["v"].pieces[0].part_rows.tolist() == [1, 0]
    assert finished["u"].layers[0].l0 == 2.0
    assert finished["v"].layers[0].l0 == 4.0
    assert finished["v"].layers[0].total.tolist() == [2.0, 2.0]


def test_parts_weigh_what_they_hold_of_their_blocks(assembly):
    features = dataclasses.replace(
        block_of(4).features, indices=np.zeros(4000, np.uint32), values=np.zeros(4000, np.float32)
    )
    block = dataclasses.replace(block_of(4), columns={"a": np.zeros(4), "b": np.zeros(4)}, features=features)
    parts = part_of("u", 0, 1), part_of("v", 0, 3)
    for part in parts:
        assembly.open(part)
    entries = tuple(Entry(part, row) for part in parts for row in range(len(part.samples)))
    weights = [done.nbytes for done in assembly.scatter(Batch(PLAIN_RECIPE, entries), block)]
    assert sum(weights) == pytest.approx(2 * 16_000 + 2 * 32, rel=0.01)
    assert weights[1] == pytest.approx(3 * weights[0], rel=0.01)


def test_time_is_shared_by_samples_and_waiting_is_counted_once(assembly, clock):
    part, other = part_of("u", 0, 3), part_of("v", 0, 1)
    for each in (part, other):
        assembly.open(each)
    clock.now += 9.0
    entries = (Entry(part, 0), Entry(other, 0))
    (done,) = assembly.scatter(Batch(PLAIN_RECIPE, entries), block_of(2), plan_seconds=0.5)
    assert done.seconds.queue == pytest.approx(2.0)
    assert done.seconds.pack == pytest.approx(0.25)
    assert done.seconds.forward == pytest.approx(2.0)
    clock.now += 50.0
    (rest,) = assembly.scatter(Batch(PLAIN_RECIPE, (Entry(part, 1), Entry(part, 2))), block_of(2))
    assert rest.seconds.queue == pytest.approx(2.0)
    assert rest.seconds.forward == pytest.approx(6.0)
    assert (rest.seconds.read, rest.seconds.tokenize) == (0.5, 0.25)


def test_a_part_without_samples_is_finished_at_once(assembly):
    reject = Reject(0, None, 1, 0, "missing_field", "m")
    finished = assembly.open(part_of("u", 0, 0, (reject,)))
    assert finished is not None
    assert finished.rejects == (reject,)


def test_a_sample_set_aside_is_a_reject_and_the_others_keep_their_results(assembly):
    earlier = Reject(3, None, 1, 0, "missing_field", "m")
    part = part_of("u", 0, 3, (earlier,))
    assembly.open(part)
    assert assembly.set_aside(Entry(part, 1), "out_of_memory", "too long") == []
    (done,) = assembly.scatter(Batch(PLAIN_RECIPE, (Entry(part, 2), Entry(part, 0))), block_of(2))
    assert [entry.sample.sample_id for entry in done.part.samples] == ["u0", "u2"]
    assert [sample.sample_id for sample in done.part.part.samples] == ["u0", "u2"]
    assert [piece.part_rows.tolist() for piece in done.pieces] == [[1, 0]]
    assert [(reject.record_index, reject.reason) for reject in done.rejects] == [
        (3, "missing_field"),
        (1, "out_of_memory"),
    ]


def test_the_last_sample_set_aside_finishes_its_part(assembly):
    part = part_of("u", 0, 2)
    assembly.open(part)
    assert assembly.set_aside(Entry(part, 1), "out_of_memory", "m") == []
    (done,) = assembly.set_aside(Entry(part, 0), "out_of_memory", "m")
    assert done.part.samples == done.pieces == ()
    assert sorted(reject.record_index for reject in done.rejects) == [0, 1]
