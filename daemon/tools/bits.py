"""`lensd verify --bits`: whether each sample's results are the same bits, whatever shares its batch.

Runs the same samples in batches of several sizes, in several orders, on one thread and on all, and compares
every cell and every stored feature with those of one batch of all samples. Where layers can be read, compares
what each of them gives for texts together and for each text alone, so that the first difference is found.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from daemon.config import Config
from daemon.errors import FileError
from daemon.model.trie_engine import TrieEngine
from daemon.model_wiring import Compute, load_compute
from daemon.recipes import Recipe
from daemon.records import BatchResult, SampleBatch, TokenizedSample
from daemon.tools.samples import DEMO_SAMPLES, tokenized_parts

BATCH_SIZES = (64, 16, 3, 1)  # samples, shuffled

Cell = float | int | str
Features = tuple[bytes, bytes]  # of a row: its indices and its values


@dataclass(frozen=True, slots=True)
class Grouping:
    """Samples in batches, on so many threads."""

    name: str
    batches: tuple[tuple[int, ...], ...]
    threads: int


@dataclass(frozen=True, slots=True)
class Results:
    """Every cell of each sample, by column, and the features of each row that is stored."""

    cells: dict[str, dict[int, Cell]]
    features: dict[tuple[int, int, int, int], Features]  # by sample, text, SAE and position


@dataclass(frozen=True, slots=True)
class GroupingReport:
    """What differs in bits from one batch of all samples."""

    name: str
    threads: int
    cells: int
    columns: dict[str, int]  # those with differing cells, and how many
    feature_rows: int


@dataclass(frozen=True, slots=True)
class LayerReport:
    layer: int
    tokens: int  # that differ between texts together and each text alone


@dataclass(frozen=True, slots=True)
class BitsReport:
    model: str
    dtype: str
    bits: str  # what the manifest says
    samples: int
    cells: int
    feature_rows: int
    groupings: tuple[GroupingReport, ...]
    layers: tuple[LayerReport, ...]  # empty where they can't be read

    @property
    def passed(self) -> bool:
        return not any(one.cells or one.feature_rows for one in self.groupings)

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "passed": self.passed}


def verify_bits(config: Config, file: Path | None, *, samples: int | None) -> BitsReport:
    """Compare on the samples of `file` (default: the demo's). Raises FileError for an unusable file."""
    compute = load_compute(config)
    parts = tokenized_parts(config, compute.tokenizer, file or DEMO_SAMPLES)
    recipe = parts[0].part.recipe
    chosen = [sample for part in parts for sample in part.samples][:samples]
    if not chosen:
        raise FileError("no_usable_record", f"{file or DEMO_SAMPLES}: none of its records can be used")
    threads = torch.get_num_threads()
    together = Grouping("one batch", (tuple(range(len(chosen))),), threads)
    expected = run(compute, recipe, chosen, together)
    reports = tuple(
        compared(grouping, expected, run(compute, recipe, chosen, grouping))
        for grouping in groupings(len(chosen), threads)
    )
    info = compute.engine.info
    return BitsReport(
        model=info.name,
        dtype=info.dtype,
        bits=info.bits,
        samples=len(chosen),
        cells=sum(map(len, expected.cells.values())),
        feature_rows=len(expected.features),
        groupings=reports,
        layers=layer_reports(compute, [ids for sample in chosen for ids in sample.token_ids]),
    )


def groupings(n: int, threads: int) -> list[Grouping]:
    """Ways to batch n samples: shuffled, in batches of several sizes, on one thread and all."""
    chance = random.Random(0)
    found = []
    for count in sorted({1, threads}):
        order = list(range(n))
        chance.shuffle(order)
        found.append(Grouping("one batch, shuffled", (tuple(order),), count))
        for size in BATCH_SIZES:
            if size < n:
                batches = tuple(tuple(order[start : start + size]) for start in range(0, n, size))
                found.append(Grouping(f"{size} samples a batch, shuffled", batches, count))
    return found


def run(compute: Compute, recipe: Recipe, samples: Sequence[TokenizedSample], grouping: Grouping) -> Results:
    results = Results({}, {})
    before = torch.get_num_threads()
    torch.set_num_threads(grouping.threads)
    try:
        for batch in grouping.batches:
            inputs = SampleBatch(recipe, tuple(samples[number] for number in batch))
            take(results, batch, compute.runner.run(inputs))
    finally:
        torch.set_num_threads(before)
    return results


def take(results: Results, batch: Sequence[int], result: BatchResult) -> None:
    """Put a batch's cells and features where its samples belong."""
    for name, values in result.columns.items():
        results.cells.setdefault(name, {}).update(zip(batch, values.tolist(), strict=True))
    features = result.features
    for row, (start, stop) in enumerate(itertools.pairwise(features.offsets.tolist())):
        place = (features.text[row], features.layer[row], features.position[row])
        key = (batch[features.sample_row[row]], *map(int, place))
        results.features[key] = features.indices[start:stop].tobytes(), features.values[start:stop].tobytes()


def compared(grouping: Grouping, expected: Results, got: Results) -> GroupingReport:
    columns = {
        name: sum(not same_cell(cell, got.cells[name][sample]) for sample, cell in cells.items())
        for name, cells in expected.cells.items()
    }
    rows = sum(features != got.features.get(place) for place, features in expected.features.items())
    return GroupingReport(
        name=grouping.name,
        threads=grouping.threads,
        cells=sum(columns.values()),
        columns={name: count for name, count in columns.items() if count},
        feature_rows=rows + len(got.features.keys() - expected.features.keys()),
    )


def same_cell(one: Cell, other: Cell) -> bool:
    return one == other or (one != one and other != other)  # NaN is like NaN


def layer_reports(compute: Compute, texts: Sequence[Sequence[int]]) -> tuple[LayerReport, ...]:
    """Per layer how many tokens of texts differ in bits from those of each text alone."""
    engine = compute.engine
    if not isinstance(engine, TrieEngine):
        return ()
    differing: Counter[int] = Counter()
    together = engine.layer_outputs(texts)
    start = 0
    for text in texts:
        for layer, (values, alone) in enumerate(zip(together, engine.layer_outputs([text]), strict=True)):
            differing[layer] += int((values[start : start + len(text)] != alone).any(-1).sum())
        start += len(text)
    return tuple(LayerReport(layer, differing[layer]) for layer in range(len(together)))
