"""`lensd verify`: the daemon's batched path against one text at a time, on the same samples.

The reference runs plain Hugging Face modules and SAELens on single unpadded texts (`daemon.tools.oracle`) and
the plain definitions of `daemon.tools.reference`; the batched path is the daemon's own. Where floating point
moves a pre-activation across a threshold, a feature flips: flips are counted and reported, and in float32 the
rows they touch are left out of the column differences. The rounding of a tensor turns its principal axis by
as much more as its two largest eigenvalues lie closer together (Davis and Kahan, 1970): differences of angles
of axes are weighted with that gap, relative to the largest eigenvalue.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from daemon.analysis.columns import Column, analysis_columns, layer_column_name
from daemon.batching.batcher import Batcher
from daemon.config import Config
from daemon.errors import ConfigError, FileError
from daemon.model_info import ModelInfo
from daemon.model_wiring import Compute, load_compute, study_settings
from daemon.observe.progress import Progress
from daemon.recipes import Recipe
from daemon.records import FloatArray, TokenizedSample
from daemon.tools.oracle import Oracle
from daemon.tools.reference import ReferenceLayer, reference_columns
from daemon.tools.samples import DEMO_SAMPLES, UNLIMITED, all_batches, one_part, tokenized_parts

ABSOLUTE_TOLERANCE = {"float64": 1e-6}
RELATIVE_TOLERANCE = {"float32": 1e-4}  # of the column's largest magnitude
MAX_FLIP_RATE = {"float64": 0.0, "float32": 1e-3}  # of active features
MAX_SET_FLIP_RATE = {"float64": 0.0, "float32": 1e-2}  # of stability values

SET_FLIP = 1e-9  # a stability changes by a whole feature or by rounding

Value = float | int | str
ObjectArray = npt.NDArray[np.object_]


@dataclass(frozen=True, slots=True)
class ColumnDifference:
    """The largest difference of one column."""

    column: str
    absolute: float
    relative: float  # to the column's largest magnitude, for angles of axes times their eigenvalues' gap
    mismatches: int  # rows that differ in kind: a shape class, or undefined on one side only


@dataclass(frozen=True, slots=True)
class BatchSizeReport:
    batch_size: int  # samples
    columns: tuple[ColumnDifference, ...]
    feature_flips: int  # features active on one side only
    flipped_samples: int
    set_flips: int  # stability values whose top-k sets differ


@dataclass(frozen=True, slots=True)
class Verification:
    model: str
    dtype: str
    samples: int
    rejects: int
    activations: int  # active features in the reference
    stability_values: int
    reports: tuple[BatchSizeReport, ...]

    @property
    def tolerance(self) -> str:
        if self.dtype in ABSOLUTE_TOLERANCE:
            return f"{ABSOLUTE_TOLERANCE[self.dtype]:g} absolute, no flips"
        if self.dtype not in RELATIVE_TOLERANCE:
            return "none: what this precision costs, against float32"
        flips = f"flips at most {MAX_FLIP_RATE[self.dtype]:g} of active features"
        return f"{RELATIVE_TOLERANCE[self.dtype]:g} relative, {flips}"

    @property
    def passed(self) -> bool:
        return all(self.accepts(report) for report in self.reports)

    def accepts(self, report: BatchSizeReport) -> bool:
        """Whether one batch size stays within the tolerance of the dtype, where there is one."""
        if self.dtype not in MAX_FLIP_RATE:
            return True
        return (
            all(self.within(difference) for difference in report.columns)
            and report.feature_flips <= MAX_FLIP_RATE[self.dtype] * self.activations
            and report.set_flips <= MAX_SET_FLIP_RATE[self.dtype] * self.stability_values
        )

    def within(self, difference: ColumnDifference) -> bool:
        if difference.mismatches:
            return False
        if self.dtype in ABSOLUTE_TOLERANCE:
            return difference.absolute <= ABSOLUTE_TOLERANCE[self.dtype]
        return self.dtype not in RELATIVE_TOLERANCE or difference.relative <= RELATIVE_TOLERANCE[self.dtype]

    def as_json(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "tolerance": self.tolerance, "passed": self.passed}


@dataclass(frozen=True, slots=True)
class Results:
    """One way's results for every sample of one recipe, in the order of the samples."""

    columns: dict[str, list[Value]]
    active: list[dict[tuple[int, int], frozenset[int]]]  # per sample: (text, SAE) -> active features
    not_finite: frozenset[int]  # samples that have no numbers, and no place in what else is here but zeros

    @property
    def activations(self) -> int:
        return sum(len(features) for sample in self.active for features in sample.values())


def verify(
    config: Config, file: Path | None, *, samples: int | None, batch_sizes: Sequence[int]
) -> Verification:
    """Compare on the samples of `file` (default: the demo's), at each batch size.

    Raises ConfigError for other positions than last tokens, FileError for an unusable file.
    """
    if config.analysis.positions != "last":
        raise ConfigError('verify reads last tokens: set analysis.positions = "last"')
    compute = load_compute(config)
    oracle = load_oracle(config)
    parts = tokenized_parts(config, compute.tokenizer, file or DEMO_SAMPLES)
    recipe = parts[0].part.recipe
    chosen = [sample for part in parts for sample in part.samples][:samples]
    if not chosen:
        raise FileError("no_usable_record", f"{file or DEMO_SAMPLES}: none of its records can be used")
    with torch.inference_mode():
        with Progress() as progress:
            reference = run_reference(config, oracle, compute.engine.info, recipe, chosen, progress)
        reports = tuple(
            compare(
                size,
                recipe,
                compute.engine.info,
                reference,
                run_batched(compute, recipe, chosen, size),
                strict=config.model.dtype in ABSOLUTE_TOLERANCE,
            )
            for size in batch_sizes
        )
    return Verification(
        model=compute.engine.info.name,
        dtype=config.model.dtype,
        samples=len(chosen),
        rejects=sum(len(part.part.rejects) for part in parts) + len(reference.not_finite),
        activations=reference.activations,
        stability_values=len(contrast_texts(recipe)) * len(chosen),
        reports=reports,
    )


def load_oracle(config: Config) -> Oracle:
    """For a reduced precision the reference is float32."""
    if config.model.dtype not in MAX_FLIP_RATE:
        config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "float32"})})
    return Oracle(config)


def run_reference(
    config: Config,
    oracle: Oracle,
    info: ModelInfo,
    recipe: Recipe,
    samples: Sequence[TokenizedSample],
    progress: Progress,
) -> Results:
    """Each sample alone, text by text; `info` tells the dictionaries' names and how they read texts."""
    settings = study_settings(config)
    saes = info.saes
    columns: dict[str, list[Value]] = {column.name: [] for column in columns_of(info, recipe)}
    active: list[dict[tuple[int, int], frozenset[int]]] = []
    not_finite: set[int] = set()
    progress.add_total(len(samples))
    for number, sample in enumerate(samples):
        progress.advance(1)
        layers = oracle.layers_of([texts_read(sample, sae.prepend_bos) for sae in saes])
        if not all(map(is_finite, layers)):
            not_finite.add(number)
            active.append({})
            for column in columns.values():
                column.append(0)
            continue
        values = reference_columns(
            sample_id=sample.sample.sample_id,
            recipe=recipe,
            settings=settings,
            saes=info.names,
            layers=layers,
            n_tokens=[len(ids) for ids in sample.token_ids],
            encode_first=oracle.dictionaries[0].encode,
            log_probs=counted_log_probs(oracle, sample) if info.log_probs else None,
        )
        for name, value in values.items():
            columns[name].append(value)
        active.append(
            {
                (text, sae): frozenset(np.flatnonzero(feature_acts > 0).tolist())
                for sae, layer in enumerate(layers)
                for text, feature_acts in enumerate(layer.feature_acts)
            }
        )
    return Results(columns, active, frozenset(not_finite))


def columns_of(info: ModelInfo, recipe: Recipe) -> tuple[Column, ...]:
    return analysis_columns(info.names, recipe, log_probs=info.log_probs)


def counted_log_probs(oracle: Oracle, sample: TokenizedSample) -> list[FloatArray]:
    """Of each text the log-probabilities of the tokens that count, its first one left out."""
    masks = sample.counted or [b"\1" * len(ids) for ids in sample.token_ids]
    return [
        oracle.log_probs(ids)[[at for at in range(1, len(ids)) if mask[at]]]
        for ids, mask in zip(sample.token_ids, masks, strict=True)
    ]


def texts_read(sample: TokenizedSample, prepend_bos: bool) -> tuple[tuple[int, ...], ...]:
    """Each text as an SAE reads it, up to the last token that counts: nothing after it changes that."""
    texts = sample.read_by(prepend_bos)
    if sample.counted is None:
        return texts
    after = [len(mask) - 1 - mask.rindex(1) for mask in sample.counted]  # tokens after that one
    return tuple(ids[: len(ids) - n] for ids, n in zip(texts, after, strict=True))


def is_finite(layer: ReferenceLayer) -> bool:
    """Whether all that an SAE read of a sample is, and what it made of that."""
    return all(bool(np.isfinite(values).all()) for values in (*layer.x, *layer.target, *layer.feature_acts))


def run_batched(
    compute: Compute, recipe: Recipe, samples: Sequence[TokenizedSample], batch_size: int
) -> Results:
    """Batches as the daemon forms them, of at most `batch_size` samples."""
    batcher = Batcher(UNLIMITED, batch_size, shares_prefixes=compute.engine.shares_prefixes)
    columns: dict[str, list[Value]] = {
        column.name: [0] * len(samples) for column in columns_of(compute.engine.info, recipe)
    }
    active: list[dict[tuple[int, int], frozenset[int]]] = [{} for _ in samples]
    not_finite: set[int] = set()
    for batch in all_batches(batcher, [one_part(recipe, samples)]):
        result = compute.runner.run(batch.inputs)
        rows = [entry.row for entry in batch.entries]
        not_finite |= {rows[row] for row, _ in result.not_finite}
        for name, values in result.columns.items():
            for row, value in zip(rows, values.tolist(), strict=True):
                columns[name][row] = value
        features = result.features
        for i, (start, stop) in enumerate(itertools.pairwise(features.offsets.tolist())):
            place = (int(features.text[i]), int(features.layer[i]))
            active[rows[features.sample_row[i]]][place] = frozenset(features.indices[start:stop].tolist())
    return Results(columns, active, frozenset(not_finite))


def compare(
    batch_size: int,
    recipe: Recipe,
    info: ModelInfo,
    reference: Results,
    batched: Results,
    strict: bool,
) -> BatchSizeReport:
    """`strict` compares every row; else rows with a flip are counted, and left out of the differences.

    Left out too is what is not finite for either; for one of them alone, it is a mismatch of every column.
    """
    left_out = reference.not_finite | batched.not_finite
    unequal = len(reference.not_finite ^ batched.not_finite)
    finite = np.array([number not in left_out for number in range(len(reference.active))])
    flips = [
        sum(len(expected[place] ^ actual[place]) for place in expected) if is_there else 0
        for expected, actual, is_there in zip(reference.active, batched.active, finite, strict=True)
    ]
    flipped = np.array(flips) > 0
    differences = []
    set_flips = 0
    for column in columns_of(info, recipe):
        expected = np.array(reference.columns[column.name], dtype=object)
        actual = np.array(batched.columns[column.name], dtype=object)
        keep = finite if strict else finite & ~flipped
        if column.name.startswith("stability"):
            moved = keep & (np.abs((expected - actual).astype(float)) > SET_FLIP)
            if column.name.removeprefix("stability_") in contrast_texts(recipe):
                set_flips += int(moved.sum())
            keep = keep & (strict | ~moved)
        gap = axis_gap(column, info.names, recipe, reference.columns)
        difference = column_difference(
            column, expected[keep], actual[keep], 1.0 if gap is None else gap[keep]
        )
        differences.append(dataclasses.replace(difference, mismatches=difference.mismatches + unequal))
    return BatchSizeReport(
        batch_size=batch_size,
        columns=tuple(differences),
        feature_flips=sum(flips),
        flipped_samples=int(flipped.sum()),
        set_flips=set_flips,
    )


def contrast_texts(recipe: Recipe) -> tuple[str, ...]:
    contrast = recipe.contrast
    return (contrast.positive, contrast.negative) if contrast else ()


def axis_gap(
    column: Column, saes: Sequence[str], recipe: Recipe, columns: dict[str, list[Value]]
) -> FloatArray | None:
    """Where a column holds angles of principal axes, 1 - (second / largest eigenvalue) of each row.

    The smallest of the tensors whose axes it compares; 1 where a tensor has no shape. None for other columns.
    """
    contrast = recipe.contrast
    if column.name.endswith("_misalignment"):
        elongations = [column.name.removesuffix("misalignment") + "elongation"]
    elif contrast is not None and column.name.startswith("axis_twist_"):
        side = column.name.removeprefix("axis_twist_")
        sides = contrast_texts(recipe) if side == "diff" else (side,)
        elongations = [
            layer_column_name(saes[0], text, "elongation") for text in (contrast.reference, *sides)
        ]
    else:
        return None
    ratio = np.array([columns[name] for name in elongations], dtype=float) ** 2
    smallest: FloatArray = np.min(1 - np.nan_to_num(ratio), axis=0)
    return smallest


def column_difference(
    column: Column, expected: ObjectArray, actual: ObjectArray, gap: FloatArray | float
) -> ColumnDifference:
    if column.kind == "class":
        mismatches = int((expected != actual).sum())
        return ColumnDifference(column.name, 0.0, 0.0, mismatches)
    a, b = expected.astype(float), actual.astype(float)
    defined = ~(np.isnan(a) | np.isnan(b))
    mismatches = int((np.isnan(a) != np.isnan(b)).sum())
    difference = np.abs(a - b)
    absolute = float(difference[defined].max(initial=0.0))
    counted = float((difference * gap)[defined].max(initial=0.0))
    largest = float(np.abs(a)[defined].max(initial=0.0))
    return ColumnDifference(column.name, absolute, counted / largest if largest else counted, mismatches)
