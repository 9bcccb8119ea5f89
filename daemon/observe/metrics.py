"""Every Prometheus metric of lensd: names, types, labels and buckets, in one place.

Knows how to turn what happened into numbers, not when it happens. No label carries a path, an id or a text:
what each can be is written down beside its metric, so the number of series is bounded.
"""

from __future__ import annotations

import itertools
import platform
import shutil
import time
from collections import Counter as Counted
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from prometheus_client import CollectorRegistry, Counter, Gauge, Info, ProcessCollector
from prometheus_client.registry import Collector

from daemon.observe.histogram import ArrayHistogram
from daemon.observe.last_minute import LastMinute
from daemon.records import AGAINST, KINDS, PAUSE_REASONS, RETRIED, WORKER_STATES
from daemon.rejects import REJECT_REASONS

if TYPE_CHECKING:
    from daemon.model_info import ModelInfo, SaeInfo
    from daemon.observe.snapshot import Snapshot
    from daemon.records import Batch, BatchResult, InboxLoad, Outcome, TokenizedPart, WorkerLoad

M = TypeVar("M", Counter, Gauge, ArrayHistogram)

FILE_OUTCOMES = ("committed", "failed", "duplicate", "requeued")
SAMPLE_OUTCOMES = ("committed", "rejected")
TOKEN_KINDS = ("text", "computed", "padding")
STAGES = ("read", "tokenize", "queue", "pack", "forward", "sae", "analysis", "write", "commit")
RECOVERIES = ("taken_over", "staging_removed")
RELOADS = ("applied", "rejected")
QUEUES = ("tokenize", "compute", "write")
LOOPS = ("event_loop", "device")
FOLDERS = ("inbox", "outbox")
MEMORY_KINDS = ("resident", "allocated", "reserved", "total")

SUFFIXES = {"counter": "_total", "info": "_info"}  # that a scrape adds to a metric's name

STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
LATENCY_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
TOKEN_BUCKETS = tuple(2.0**n for n in range(2, 17))
COUNT_BUCKETS = tuple(2.0**n for n in range(11))
L0_BUCKETS = (0, 1, 3, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)


@dataclass(frozen=True, slots=True)
class Label:
    """A label: every value it can have, or in words what they are; neither where it never changes."""

    name: str
    values: tuple[str, ...] = ()
    meaning: str = ""


STAGE = Label("stage", STAGES)
LAYER = Label("layer", meaning="the layers of the SAEs")
SAE = Label("sae", meaning="the names of the SAEs")
FOLDER = Label("dir", FOLDERS)
WORKER = Label("worker", meaning="numbers from 0, one less than there are workers at most")


@dataclass(frozen=True, slots=True)
class Description:
    """A metric as it is scraped, for its documentation."""

    name: str
    kind: str  # as Prometheus calls it
    text: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()


class Metrics:
    """The metrics of one daemon, in the registry it is given. `descriptions` says what there is."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.descriptions: list[Description] = []
        self._device, self._coordinator = LastMinute(), LastMinute()
        self._worker_numbers: set[int] = set()  # of the last look
        self._declare_work()
        self._declare_trouble()
        self._declare_moment()
        self._declare_workers()
        self._declare_distributions()
        self._declare_identity()

    def _declare_work(self) -> None:
        counter = partial(self._add, Counter)
        self.files_total = counter("files", "Input files by how they ended.", Label("outcome", FILE_OUTCOMES))
        self.samples_total = counter(
            "samples", "Records by how they ended, when their file did.", Label("outcome", SAMPLE_OUTCOMES)
        )
        self.rejects_total = counter(
            "rejects", "Rejected records by reason, when they are met.", Label("reason", REJECT_REASONS)
        )
        self.cut_texts_total = counter(
            "cut_texts", "Texts of too many tokens, cut as batching.long_texts says."
        )
        self._files = {kind: self.files_total.labels(kind) for kind in FILE_OUTCOMES}
        self._samples = {kind: self.samples_total.labels(kind) for kind in SAMPLE_OUTCOMES}
        self.tokens_total = counter(
            "tokens",
            "Tokens: in texts, run by the model, and padding among these.",
            Label("kind", TOKEN_KINDS),
        )
        self.batches_total = counter("batches", "Device batches.")
        self.input_bytes_total = counter("input_bytes", "Bytes of input files read.")
        self.output_bytes_total = counter("output_bytes", "Bytes of output files published.")
        self.clipped_values_total = counter(
            "clipped_values", "Activations that the type of outbox.values does not hold, in published files."
        )

    def _declare_trouble(self) -> None:
        counter = partial(self._add, Counter)
        self.oom_total = counter("oom", "Batches that the device's memory did not hold.")
        self.retries_total = counter(
            "retries", "Tries that the machine refused and that were repeated.", Label("stage", RETRIED)
        )
        self.sync_errors_total = counter(
            "sync_errors", "fsync calls that the disk refused; the process ends after one."
        )
        self.rescan_found_total = counter(
            "rescan_found", "Files first seen by a look that no event had asked for."
        )
        self.recovered_files_total = counter(
            "recovered_files",
            "What an earlier process left, by what became of it.",
            Label("action", RECOVERIES),
        )
        self.config_reloads_total = counter(
            "config_reloads", "Reloads of the settings, by outcome.", Label("outcome", RELOADS)
        )
        self.sae_departures_total = counter(
            "sae_departures",
            "Files whose mean L0 or FVU at an SAE is far from its card, or from the file before.",
            LAYER,
            SAE,
            Label("kind", KINDS),
            Label("against", AGAINST),
        )
        self.paused = self._add(
            Gauge, "paused", "1 while nothing is taken up for this reason.", Label("reason", PAUSE_REASONS)
        )
        for reason in PAUSE_REASONS:
            self.paused.labels(reason)

    def _declare_moment(self) -> None:
        gauge = partial(self._add, Gauge)
        self.inbox_files = gauge("inbox_files", "Files waiting in the inbox.")
        self.inbox_bytes = gauge("inbox_bytes", "Bytes of the files waiting in the inbox.")
        self.inbox_left_files = gauge(
            "inbox_left_files", "Files in the inbox that are left alone: by their names they are no inputs."
        )
        self.oldest_pending_seconds = gauge(
            "oldest_pending_seconds", "Age of the oldest waiting file, 0 where none waits."
        )
        self.queue_items = gauge("queue_items", "Items waiting for a stage.", Label("stage", QUEUES))
        self.queue_tokens = gauge("queue_tokens", "Tokens waiting for the device.")
        self.buffer_pool_bytes = gauge(
            "buffer_pool_bytes", "Memory kept for batches, in use or free, where it is counted."
        )
        self.device_memory_bytes = gauge(
            "device_memory_bytes",
            "On a CPU the process's resident memory; on CUDA and MPS torch's allocated and reserved, and the"
            " total, over all GPUs of the model.",
            Label("kind", MEMORY_KINDS),
        )
        self.disk_free_bytes = gauge("disk_free_bytes", "Free space under a folder.", FOLDER)
        self.disk_size_bytes = gauge("disk_size_bytes", "Size of the file system of a folder.", FOLDER)
        self.device_busy_ratio = gauge(
            "device_busy_ratio", "Share of the last minute that the device worked."
        )
        self.max_batch_tokens = gauge(
            "max_batch_tokens", "Tokens of a device batch, at most; 0 until the model is loaded."
        )
        self.last_commit_timestamp_seconds = gauge(
            "last_commit_timestamp_seconds",
            "When this process last published a file, in Unix time; 0 before.",
        )
        self.heartbeat_timestamp_seconds = gauge(
            "heartbeat_timestamp_seconds",
            "When a loop last made progress or was idle, in Unix time.",
            Label("loop", LOOPS),
        )
        self.sae_fvu = gauge("sae_fvu", "Fraction of variance unexplained, last file.", LAYER, SAE)
        self.sae_mean_l0 = gauge("sae_mean_l0", "Mean number of active features, last file.", LAYER, SAE)

    def _declare_workers(self) -> None:
        counter, gauge = partial(self._add, Counter), partial(self._add, Gauge)
        self.executor_slots = gauge("executor_slots", "Batches that the executor takes at a time.")
        self.batches_in_flight = gauge("batches_in_flight", "Batches that the executor has.")
        self.coordinator_busy_ratio = gauge(
            "coordinator_busy_ratio",
            "Processor time of the daemon's process without its device thread, over the wall time of the"
            " last minute; 1 is one core. On a CPU that computes itself, helpers of the device thread count.",
        )
        self.workers_wanted = gauge(
            "workers_wanted", "Workers that there are to be; 0 where the executor computes itself."
        )
        self.workers = gauge(
            "workers",
            "Workers of the executor by state; none where it computes itself.",
            Label("state", WORKER_STATES),
        )
        self.worker_restarts_total = counter(
            "worker_restarts", "Workers that were lost, or stalled, and started again.", WORKER
        )
        self.worker_batches_total = counter("worker_batches", "Batches that a worker computed.", WORKER)
        self.worker_samples_total = counter("worker_samples", "Samples of these.", WORKER)
        self.worker_busy_seconds_total = counter(
            "worker_busy_seconds", "Seconds that the device of a worker worked.", WORKER
        )
        self.worker_memory_bytes = gauge(
            "worker_memory_bytes", "The most memory that the process of a worker has had.", WORKER
        )
        for state in WORKER_STATES:
            self.workers.labels(state)

    def _declare_distributions(self) -> None:
        histogram = partial(self._add, ArrayHistogram)
        self.stage_duration_seconds = histogram(
            "stage_duration_seconds",
            "Work of a stage on a part, a batch or a file.",
            STAGE,
            buckets=STAGE_BUCKETS,
        )
        for stage in STAGES:
            self.stage_duration_seconds.labels(stage)
        self.file_latency_seconds = histogram(
            "file_latency_seconds", "From first read to commit.", buckets=LATENCY_BUCKETS
        )
        self.batch_tokens = histogram(
            "batch_tokens", "Tokens of a batch, padding included.", buckets=TOKEN_BUCKETS
        )
        self.batch_texts = histogram("batch_texts", "Texts of a batch.", buckets=COUNT_BUCKETS)
        self.sequence_tokens = histogram("sequence_tokens", "Tokens of a text.", buckets=TOKEN_BUCKETS)
        self.feature_l0 = histogram(
            "feature_l0", "Active features at a position.", LAYER, SAE, buckets=L0_BUCKETS
        )

    def _declare_identity(self) -> None:
        self.build_info = self._info("build", "Versions; always 1.", ("version", "python", "torch"))
        self.model_info = self._info(
            "model", "The model and its SAEs; always 1.", ("model", "dtype", "device", "engine", "saes")
        )
        self.build_info.info(
            {"version": version("lensd"), "python": platform.python_version(), "torch": version("torch")}
        )
        self._describe(ProcessCollector(registry=self.registry))

    def _add(self, kind: type[M], name: str, text: str, *labels: Label, **options: Any) -> M:
        """Register a metric and describe it."""
        names = [label.name for label in labels]
        metric = kind(f"lensd_{name}", text, names, registry=self.registry, **options)
        self._describe(metric, labels, options.get("buckets", ()))
        if isinstance(metric, Counter) and labels:
            # A series that starts at 0 has a rate from then on.
            for values in itertools.product(*(label.values for label in labels)):
                metric.labels(*values)
        return metric

    def _info(self, name: str, text: str, names: tuple[str, ...]) -> Info:
        info = Info(f"lensd_{name}", text, registry=self.registry)
        self._describe(info, tuple(map(Label, names)))  # one value each in the life of a process
        return info

    def _describe(
        self, collector: Collector, labels: tuple[Label, ...] = (), buckets: tuple[float, ...] = ()
    ) -> None:
        """Keep what documents a collector's metrics."""
        for family in collector.collect():
            name = family.name + SUFFIXES.get(family.type, "")
            self.descriptions.append(Description(name, family.type, family.documentation, labels, buckets))

    def describe(self, info: ModelInfo, max_batch_tokens: int) -> None:
        """The loaded model and its SAEs."""
        self.max_batch_tokens.set(max_batch_tokens)
        for sae, kind, against in itertools.product(info.saes, KINDS, AGAINST):
            self.sae_departures_total.labels(*sae_labels(sae), kind, against)
        self.model_info.info(
            {
                "model": info.name,
                "dtype": info.dtype,
                "device": info.device,
                "engine": info.engine,
                "saes": ",".join(sae.where for sae in info.saes),
            }
        )

    def observe_tokenized(self, *parts: TokenizedPart) -> None:
        """Parts were read and tokenized."""
        self._observe_stages(
            read=[part.part.read_seconds for part in parts],
            tokenize=[part.part.tokenize_seconds for part in parts],
        )
        for part in parts:
            for reject in part.part.rejects:
                self.rejects_total.labels(reject.reason).inc()
        self.cut_texts_total.inc(sum(part.cut_texts for part in parts))
        lengths = [len(ids) for part in parts for sample in part.samples for ids in sample.token_ids]
        self.tokens_total.labels("text").inc(sum(lengths))
        self.sequence_tokens.observe(lengths)

    def observe_batch(
        self, batch: Batch, result: BatchResult, info: ModelInfo, plan_seconds: float = 0.0
    ) -> None:
        """Count one batch."""
        self.batches_total.inc()
        self.tokens_total.labels("computed").inc(result.computed_tokens)
        self.tokens_total.labels("padding").inc(result.padding_tokens)
        self.batch_tokens.observe(result.computed_tokens)
        self.batch_texts.observe(sum(len(sample.token_ids) for sample in batch.samples))
        self._observe_stages(
            pack=plan_seconds,
            forward=result.forward_seconds,
            sae=result.sae_seconds,
            analysis=result.analysis_seconds,
        )
        rows = [row for row, _ in result.not_finite]
        if rows:
            self.rejects_total.labels("not_finite_activation").inc(len(rows))
        counts = result.features.offsets[1:] - result.features.offsets[:-1]
        counted = ~np.isin(result.features.sample_row, rows)
        for number, sae in enumerate(info.saes):
            self.feature_l0.labels(*sae_labels(sae)).observe(
                counts[(result.features.layer == number) & counted]
            )

    def _observe_stages(self, **seconds: npt.ArrayLike) -> None:
        """Seconds of work by stage, of one or several pieces of work."""
        for stage, values in seconds.items():
            self.stage_duration_seconds.labels(stage).observe(values)

    def observe_outcomes(self, outcomes: Sequence[Outcome], saes: Sequence[SaeInfo]) -> None:
        """Files came to their ends."""
        for kind, number in Counted(outcome.kind for outcome in outcomes).items():
            self._files[kind].inc(number)
        self._samples["committed"].inc(sum(outcome.rows for outcome in outcomes))
        self._samples["rejected"].inc(sum(outcome.rejects for outcome in outcomes))
        committed = [outcome for outcome in outcomes if outcome.kind == "committed"]
        if not committed:
            return
        self.output_bytes_total.inc(sum(outcome.output_bytes for outcome in committed))
        self.clipped_values_total.inc(sum(outcome.clipped for outcome in committed))
        for found in itertools.chain.from_iterable(outcome.departures for outcome in committed):
            self.sae_departures_total.labels(*sae_labels(found.sae), found.kind, found.against).inc()
        self.file_latency_seconds.observe([outcome.seconds for outcome in committed])
        self.last_commit_timestamp_seconds.set_to_current_time()
        seconds = [outcome.stages for outcome in committed if outcome.stages is not None]
        self._observe_stages(
            queue=[stages.queue for stages in seconds],
            write=[stages.write for stages in seconds],
            commit=[stages.commit for stages in seconds],
        )
        set_last(self.sae_fvu, saes, [outcome.fvu for outcome in committed])
        set_last(self.sae_mean_l0, saes, [outcome.mean_l0 for outcome in committed])

    def observe_snapshot(self, snapshot: Snapshot, load: InboxLoad | None, now: float) -> None:
        """Set the gauges that describe this moment; `load` is what waits in the inbox, `now` is monotonic."""
        self.observe_device(snapshot.device_busy_seconds, now)
        self.recovered_files_total.labels("taken_over").inc(snapshot.recovered)
        self.rescan_found_total.inc(snapshot.found)
        self.coordinator_busy_ratio.set(self._coordinator.rate(snapshot.coordinator_seconds, now))
        self.executor_slots.set(snapshot.slots)
        self.batches_in_flight.set(snapshot.batches_in_flight)
        self.observe_workers(snapshot.workers, snapshot.workers_wanted)
        if load is not None:
            self.observe_load(load)
        if snapshot.queued is not None:
            for stage in QUEUES:
                self.queue_items.labels(stage).set(getattr(snapshot.queued, stage))
            self.queue_tokens.set(snapshot.queued.tokens)
            self.observe_memory(snapshot.memory_bytes, snapshot.pool_bytes)

    def observe_workers(self, workers: Sequence[WorkerLoad], wanted: int) -> None:
        """Set the gauges of the workers there are, and how many there are to be."""
        self.workers_wanted.set(wanted)
        states = Counted(worker.state for worker in workers)
        for state in WORKER_STATES:
            self.workers.labels(state).set(states[state])
        for worker in workers:
            for total in (
                self.worker_restarts_total,
                self.worker_batches_total,
                self.worker_samples_total,
                self.worker_busy_seconds_total,
            ):
                total.labels(str(worker.number))  # a series that starts at 0 has a rate from then on
            self.worker_memory_bytes.labels(str(worker.number)).set(worker.memory_bytes)
        numbers = {worker.number for worker in workers}
        for number in self._worker_numbers - numbers:
            self.worker_memory_bytes.remove(str(number))
        self._worker_numbers = numbers

    def worker_restarted(self, number: int) -> None:
        self.worker_restarts_total.labels(str(number)).inc()

    def worker_computed(self, number: int, samples: int, busy_seconds: float) -> None:
        self.worker_batches_total.labels(str(number)).inc()
        self.worker_samples_total.labels(str(number)).inc(samples)
        self.worker_busy_seconds_total.labels(str(number)).inc(busy_seconds)

    def observe_device(self, busy_seconds: float, now: float) -> None:
        """Set the busy ratio of the last minute; `busy_seconds` only grows, `now` is monotonic."""
        self.device_busy_ratio.set(min(1.0, self._device.rate(busy_seconds, now)))

    def observe_load(self, load: InboxLoad) -> None:
        """Set the gauges of the files that wait."""
        self.inbox_files.set(load.files)
        self.inbox_bytes.set(load.bytes)
        self.inbox_left_files.set(load.left)
        self.oldest_pending_seconds.set(load.oldest_seconds(time.time()))

    def observe_disk(self, folders: dict[str, Path]) -> None:
        """Free space under each folder, and how much there is, by the folder's name in the configuration."""
        for name, folder in folders.items():
            usage = shutil.disk_usage(folder)
            self.disk_free_bytes.labels(name).set(usage.free)
            self.disk_size_bytes.labels(name).set(usage.total)

    def observe_memory(self, kinds: Mapping[str, int], pool_bytes: int) -> None:
        """Bytes by MEMORY_KINDS, as far as the device has them, and what is kept for batches."""
        for kind, size in kinds.items():
            self.device_memory_bytes.labels(kind).set(size)
        self.buffer_pool_bytes.set(pool_bytes)

    def observe_retry(self, stage: str) -> None:
        """The machine refused a try of this stage, which will be repeated."""
        self.retries_total.labels(stage).inc()


def sae_labels(sae: SaeInfo) -> tuple[str, str]:
    """The values of LAYER and SAE."""
    return str(sae.layer), sae.name


def set_last(gauge: Gauge, saes: Sequence[SaeInfo], of_files: Sequence[Sequence[float | None]]) -> None:
    """The gauge of each SAE to the value of the last file that has one."""
    for sae, values in zip(saes, zip(*of_files, strict=True), strict=False):
        known = [value for value in values if value is not None]
        if known:
            gauge.labels(*sae_labels(sae)).set(known[-1])
