"""The engine and the analysis as one function: a batch in, its result out. Knows no files.

Everything here runs on the device thread; only NumPy arrays leave it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from daemon import mmap_arrays
from daemon.analysis.column_inputs import StudySettings
from daemon.analysis.features import feature_rows
from daemon.analysis.stability import Noise, noise_bank
from daemon.analysis.study import analyse, layer_sums
from daemon.batching.splitting import concat_results, split_batch
from daemon.devices import finish, on_cuda, on_mps, to_device
from daemon.model.engine import Engine
from daemon.model.extraction import Extraction, NotFinite, Started
from daemon.model_info import ModelInfo
from daemon.native.threads import side_by_side
from daemon.records import BatchResult, FeatureRows, Residuals, RowMessage, SampleBatch


@dataclass(frozen=True, slots=True)
class BegunBatch:
    """A batch that the device may still read."""

    batch: SampleBatch
    started: Started


class BatchRunner:
    """Runs batches: on a CPU each with `run`; on CUDA with `begin` and `finish`, so that two overlap."""

    def __init__(self, engine: Engine, settings: StudySettings) -> None:
        self.engine = engine
        self.settings = settings
        self.can_overlap = on_cuda(engine.info.device)
        self._noise = noise_of(engine, settings) if settings.positions in ("last", "all") else None
        finish(engine.info.device)  # what was loaded is there, for every stream

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    def run(self, batch: SampleBatch) -> BatchResult:
        """Every analysis column and the sparse features of a batch; on a CPU its pieces side by side."""
        pieces = split_batch(batch, torch.get_num_threads()) if self.engine.concurrent else [batch]
        results = side_by_side(lambda piece: self._finished(self.begin(piece)), pieces)
        return detach_from_heap(concat_results(results))

    def runs(self, batches: Iterable[SampleBatch]) -> Iterator[BatchResult]:
        """`run` of each batch; where batches overlap, the next one begins before one is read out."""
        if not self.can_overlap:
            yield from map(self.run, batches)
            return
        before: BegunBatch | None = None
        for batch in batches:
            begun = self.begin(batch)
            if before is not None:
                yield self.finish(before)
            before = begun
        if before is not None:
            yield self.finish(before)

    def begin(self, batch: SampleBatch) -> BegunBatch:
        """Have the device read the texts of a batch."""
        texts = [ids for sample in batch.samples for ids in sample.token_ids]
        counted = counted_tokens(batch)
        if self.info.reads_both_ways:
            bare = [ids for sample in batch.samples for ids in sample.bare_ids]
            if counted is not None:
                counted += [mask[-len(ids) :] for mask, ids in zip(counted, bare, strict=True)]
            texts += bare
        return BegunBatch(batch, self.engine.start(texts, counted))

    def finish(self, begun: BegunBatch) -> BatchResult:
        """Encode and analyse a batch, beside what was begun after it."""
        return detach_from_heap(self._finished(begun))

    def _finished(self, begun: BegunBatch) -> BatchResult:
        with begun.started.forward.followed():
            return self._analysed(begun.batch, self.engine.finish(begun.started))

    def _analysed(self, batch: SampleBatch, extraction: Extraction) -> BatchResult:
        samples = batch.samples
        began = time.perf_counter()
        columns = analyse(
            layers=extraction.layers,
            recipe=batch.recipe,
            sample_ids=[sample.sample.sample_id for sample in samples],
            token_counts=[[len(ids) for ids in sample.token_ids] for sample in samples],
            settings=self.settings,
            noise=self._noise,
            log_probs=extraction.log_probs,
        )
        n_texts = len(batch.recipe.templates)
        not_finite = self._messages(extraction.not_finite, batch.recipe.text_names)
        empty_rows(columns, [row for row, _ in not_finite])
        return BatchResult(
            columns=columns,
            features=feature_rows(extraction.stored, n_texts, residuals=self.settings.residuals),
            layers=tuple(layer_sums(layer, n_texts) for layer in extraction.layers),
            forward_seconds=extraction.forward_seconds,
            sae_seconds=extraction.sae_seconds,
            analysis_seconds=time.perf_counter() - began,
            computed_tokens=extraction.computed_tokens,
            padding_tokens=extraction.padding_tokens,
            not_finite=not_finite,
        )

    def _messages(self, found: Sequence[NotFinite], names: Sequence[str]) -> tuple[RowMessage, ...]:
        """One for each sample that has such a text: where it is not finite, and what helps."""
        messages: dict[int, str] = {}
        for text in found:
            row, number = divmod(text.text, len(names))
            if row not in messages:
                messages[row] = not_finite_message(names[number], text, self.engine.info)
        return tuple(RowMessage(*item) for item in sorted(messages.items()))


def counted_tokens(batch: SampleBatch) -> list[bytes] | None:
    """Which tokens of each text count; None where all do."""
    if all(sample.counted is None for sample in batch.samples):
        return None
    return [
        mask
        for sample in batch.samples
        for mask in sample.counted or tuple(b"\1" * len(ids) for ids in sample.token_ids)
    ]


def not_finite_message(name: str, found: NotFinite, info: ModelInfo) -> str:
    sae = info.saes[found.sae]
    wider = {"float16": "bfloat16 or float32", "bfloat16": "float64", "float32": "float64"}.get(info.dtype)
    remedy = f"set model.dtype to {wider}" if wider else "leave it out"
    if wider == "float64" and on_mps(info.device):
        remedy += " and model.device to cpu"
    if found.in_model:
        where = sae.where if sae.hook_name == sae.hook_name_out else f"{sae.where} or {sae.hook_name_out}"
        return f"text {name!r}: the model's values at {where} are not finite in {info.dtype}: {remedy}"
    dtype = "float64" if info.dtype == "float64" else "float32"
    return (
        f"text {name!r}: what the SAE at {sae.where} makes of it is not finite in {dtype}: {remedy},"
        " or look whether the SAE belongs to this model"
    )


def empty_rows(columns: dict[str, npt.NDArray[np.generic]], rows: Sequence[int]) -> None:
    """Leave no number in these rows of the float columns."""
    for column in columns.values() if rows else ():
        if column.dtype == np.float64:
            column[rows] = np.nan


def detach_from_heap(result: BatchResult) -> BatchResult:
    """The same result, whose large arrays lie outside the heap: long-lived allocations fragment it."""
    numbers = {name: column for name, column in result.columns.items() if column.dtype != object}
    names = [field.name for field in dataclasses.fields(FeatureRows) if field.name != "residuals"]
    features = [getattr(result.features, name) for name in names]
    residuals = result.features.residuals
    vectors: list[npt.NDArray[Any]] = [] if residuals is None else [residuals.row, *residuals.values]
    copies = iter(mmap_arrays.copies([*numbers.values(), *features, *vectors]))
    return dataclasses.replace(
        result,
        columns=result.columns | {name: next(copies) for name in numbers},
        features=FeatureRows(
            **{name: next(copies) for name in names},
            residuals=None if residuals is None else Residuals(next(copies), tuple(copies)),
        ),
    )


def noise_of(engine: Engine, settings: StudySettings) -> Noise:
    """The noise bank, projected by the first SAE."""
    info, encoder = engine.info, engine.encoders[0]
    dtype = torch.float64 if info.dtype == "float64" else torch.float32
    bank = noise_bank(settings.seed, info.saes[0].d_in, dtype)
    bank = to_device(bank, encoder.decoder.W_dec.device)
    with torch.inference_mode():
        projected = encoder.project(settings.noise_sigma * bank)
        sound = encoder.trusts_noise(projected)
    return Noise(encoder.pre_acts, encoder.activate, projected, encoder.bounds.trusts, sound)
