"""Turns what happens in the pipeline into metrics, log lines, the progress line and the final count.

Implements `daemon.ports.Observer`. Knows no HTTP.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from daemon.model_info import ModelInfo
from daemon.observe.metrics import Metrics
from daemon.observe.progress import Progress
from daemon.observe.workload import Workload
from daemon.records import Batch, BatchResult, Departure, InputFile, KeptPart, Outcome, Part, TokenizedPart

log = structlog.get_logger()


@dataclass(slots=True)
class Tally:
    """Counts of a run, for its exit code and its last line."""

    committed: int = 0
    duplicate: int = 0
    requeued: int = 0
    failed: int = 0
    left: int = 0  # inputs that lay in the inbox at the end: not to be claimed, or not whole
    rows: int = 0
    rejects: int = 0


class Recorder:
    """Records one pipeline's work. The tally goes on over several pipelines of one run."""

    def __init__(
        self,
        info: ModelInfo,
        *,
        metrics: Metrics,
        progress: Progress,
        tally: Tally,
        departures: Callable[[Outcome], tuple[Departure, ...]],
        on_outcomes: Callable[[Sequence[Outcome]], None],
    ) -> None:
        """`departures` tells what of a file is far from what is known of its SAEs."""
        self.workload = Workload()
        self._info = info
        self._metrics = metrics
        self._progress = progress
        self._tally = tally
        self._on_outcomes = on_outcomes
        self._departures = departures

    def taken_up(self, file: InputFile) -> None:
        self.workload.begin(file)
        self._metrics.input_bytes_total.inc(file.size)

    def read(self, part: Part | KeptPart) -> None:
        self._progress.add_total(part.extent.records)
        self.workload.read(part.file, part.extent, last=part.last)
        if isinstance(part, KeptPart):
            self._progress.advance(part.extent.records)

    def tokenized(self, parts: Sequence[TokenizedPart]) -> None:
        self._metrics.observe_tokenized(*parts)
        self._progress.advance(sum(len(part.part.rejects) for part in parts))

    def computed(self, batch: Batch, result: BatchResult, plan_seconds: float) -> None:
        self._metrics.observe_batch(batch, result, self._info, plan_seconds)
        if result.not_finite:
            message = result.not_finite[0].message
            log.warning("samples.not_finite", samples=len(result.not_finite), message=message)
        self._progress.advance(len(batch.entries))

    def out_of_memory(self, batch: Batch, message: str, max_batch_tokens: int | None) -> None:
        self._metrics.oom_total.inc()
        log.warning("device.out_of_memory", samples=len(batch.entries), message=message)
        if max_batch_tokens is None:
            self._metrics.rejects_total.labels("out_of_memory").inc()
            self._progress.advance(1)
        else:
            self._metrics.observe_retry("forward")
            self._metrics.max_batch_tokens.set(max_batch_tokens)

    def workers_died(self, batch: Batch, message: str) -> None:
        log.warning("batch.workers_died", samples=len(batch.entries), message=message)
        if len(batch.entries) == 1:
            self._metrics.rejects_total.labels("worker_died").inc()
            self._progress.advance(1)
        else:
            self._metrics.observe_retry("forward")

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        outcomes = tuple(map(self._compared, outcomes))
        self._metrics.observe_outcomes(outcomes, self._info.saes)
        for outcome in outcomes:
            self._count(outcome)
            self.workload.end(outcome.unit)
            log.info("file.settled", **outcome.log_fields())
            if outcome.report_failed is not None:
                log.warning("report.failed", file=outcome.name, message=outcome.report_failed)
            for sae, far in itertools.groupby(outcome.departures, lambda one: one.sae):
                message = "; ".join(map(str, far))
                log.warning(
                    "sae.departs", file=outcome.name, sae=sae.name, hook_name=sae.hook_name, message=message
                )
        self._on_outcomes(outcomes)

    def _compared(self, outcome: Outcome) -> Outcome:
        """The outcome with what is far from what is known of its SAEs."""
        found = self._departures(outcome)
        return dataclasses.replace(outcome, departures=found) if found else outcome

    def _count(self, outcome: Outcome) -> None:
        setattr(self._tally, outcome.kind, getattr(self._tally, outcome.kind) + 1)
        self._tally.rows += outcome.rows
        self._tally.rejects += outcome.rejects
