"""Every Prometheus metric of lensd: names, labels and buckets, in one place.

Knows how to turn what happened into numbers, not when it happens. Labels never carry paths or ids.
"""

from __future__ import annotations

import platform
import shutil
from collections import deque
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info

from daemon.intake.reader import REJECT_REASONS
from daemon.pause import REASONS

if TYPE_CHECKING:
    from daemon.compute.packing import Batch
    from daemon.intake.scan import InboxLoad
    from daemon.output.delivery import Outcome
    from daemon.output.totals import StageSeconds
    from daemon.records import Block, ModelInfo, TokenizedPart

FILE_OUTCOMES = ("committed", "failed", "duplicate", "requeued")
SAMPLE_OUTCOMES = ("committed", "rejected")
TOKEN_KINDS = ("text", "computed", "padding")
STAGES = ("read", "tokenize", "queue", "pack", "forward", "sae", "analysis", "write", "commit")
RECOVERIES = ("taken_over", "staging_removed")

BUSY_WINDOW_SECONDS = 60.0

STAGE_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
LATENCY_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
TOKEN_BUCKETS = tuple(2.0**n for n in range(2, 17))
COUNT_BUCKETS = tuple(2.0**n for n in range(11))
L0_BUCKETS = (0, 1, 3, 10, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000)


class Metrics:
    """The metrics of one daemon, in the registry it is given."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        counter, gauge, histogram = self._counter, self._gauge, self._histogram
        self.files_total = counter("files", "Input files by how they ended.", "outcome", FILE_OUTCOMES)
        self.samples_total = counter("samples", "Records by how they ended.", "outcome", SAMPLE_OUTCOMES)
        self.rejects_total = counter("rejects", "Rejected records by reason.", "reason", REJECT_REASONS)
        self.tokens_total = counter(
            "tokens", "Tokens: in texts, run by the model, and padding among these.", "kind", TOKEN_KINDS
        )
        self.batches_total = counter("batches", "Device batches.")
        self.input_bytes_total = counter("input_bytes", "Bytes of input files read.")
        self.output_bytes_total = counter("output_bytes", "Bytes of output files published.")
        self.recovered_files_total = counter(
            "recovered_files", "What an earlier process left, by what became of it.", "action", RECOVERIES
        )
        self.oom_total = counter("oom", "Batches that the device's memory did not hold.")
        self.paused = gauge("paused", "1 while nothing is taken up for this reason.", "reason")
        for reason in REASONS:
            self.paused.labels(reason)
        self.inbox_files = gauge("inbox_files", "Files waiting in the inbox.")
        self.inbox_bytes = gauge("inbox_bytes", "Bytes of the files waiting in the inbox.")
        self.oldest_pending_seconds = gauge("oldest_pending_seconds", "Age of the oldest waiting file.")
        self.queue_items = gauge("queue_items", "Items waiting for a stage.", "stage")
        self.queue_tokens = gauge("queue_tokens", "Tokens waiting for the device.")
        self.disk_free_bytes = gauge("disk_free_bytes", "Free space under a folder.", "dir")
        self.device_busy_ratio = gauge(
            "device_busy_ratio", "Share of the last minute that the device worked."
        )
        self.max_batch_tokens = gauge("max_batch_tokens", "Tokens of a device batch, at most.")
        self.last_commit_timestamp_seconds = gauge(
            "last_commit_timestamp_seconds", "When a file was last published, in Unix time."
        )
        self.heartbeat_timestamp_seconds = gauge(
            "heartbeat_timestamp_seconds", "When a loop last made progress, in Unix time.", "loop"
        )
        self.sae_fvu = gauge("sae_fvu", "Fraction of variance unexplained, last file.", "layer")
        self.stage_duration_seconds = histogram(
            "stage_duration_seconds", "Work of a stage on a part, a batch or a file.", STAGE_BUCKETS, "stage"
        )
        for stage in STAGES:
            self.stage_duration_seconds.labels(stage)
        self.file_latency_seconds = histogram(
            "file_latency_seconds", "From first read to commit.", LATENCY_BUCKETS
        )
        self.batch_tokens = histogram("batch_tokens", "Tokens of a batch, padding included.", TOKEN_BUCKETS)
        self.batch_texts = histogram("batch_texts", "Texts of a batch.", COUNT_BUCKETS)
        self.sequence_tokens = histogram("sequence_tokens", "Tokens of a text.", TOKEN_BUCKETS)
        self.feature_l0 = histogram("feature_l0", "Active features of a text.", L0_BUCKETS, "layer")
        self.build_info = Info("lensd_build", "Versions.", registry=registry)
        self.model_info = Info("lensd_model", "The model and its SAEs.", registry=registry)
        self.build_info.info(
            {"version": version("lensd"), "python": platform.python_version(), "torch": version("torch")}
        )
        self._looks: deque[tuple[float, float]] = deque()  # (when, busy seconds until then)

    def _counter(
        self, name: str, text: str, label: str | None = None, values: tuple[str, ...] = ()
    ) -> Counter:
        labels = (label,) if label else ()
        counter = Counter(f"lensd_{name}", text, labels, registry=self.registry)
        for value in values:  # a series that starts at 0 has a rate from its first event on
            counter.labels(value)
        return counter

    def _gauge(self, name: str, text: str, label: str | None = None) -> Gauge:
        return Gauge(f"lensd_{name}", text, (label,) if label else (), registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], label: str | None = None
    ) -> Histogram:
        labels = (label,) if label else ()
        return Histogram(f"lensd_{name}", text, labels, buckets=buckets, registry=self.registry)

    def describe(self, info: ModelInfo, max_batch_tokens: int) -> None:
        """What was loaded."""
        self.max_batch_tokens.set(max_batch_tokens)
        self.model_info.info(
            {
                "model": info.name,
                "dtype": info.dtype,
                "device": info.device,
                "engine": info.engine,
                "saes": ",".join(sae.hook_name for sae in info.saes),
            }
        )

    def observe_tokenized(self, part: TokenizedPart) -> None:
        self.stage_duration_seconds.labels("tokenize").observe(part.part.tokenize_seconds)
        self.tokens_total.labels("text").inc(part.n_tokens)
        for sample in part.samples:
            for ids in sample.token_ids:
                self.sequence_tokens.observe(len(ids))
        for reject in part.part.rejects:
            self.rejects_total.labels(reject.reason).inc()

    def observe_block(self, batch: Batch, block: Block, info: ModelInfo, pack_seconds: float = 0.0) -> None:
        """One device batch."""
        self.batches_total.inc()
        self.tokens_total.labels("computed").inc(block.computed_tokens)
        self.tokens_total.labels("padding").inc(block.padding_tokens)
        self.batch_tokens.observe(block.computed_tokens)
        self.batch_texts.observe(sum(len(sample.token_ids) for sample in batch.samples))
        self.stage_duration_seconds.labels("pack").observe(pack_seconds)
        self.stage_duration_seconds.labels("forward").observe(block.forward_seconds)
        self.stage_duration_seconds.labels("sae").observe(block.sae_seconds)
        self.stage_duration_seconds.labels("analysis").observe(block.analysis_seconds)
        counts = block.features.offsets[1:] - block.features.offsets[:-1]
        for number, sae in enumerate(info.saes):
            histogram = self.feature_l0.labels(str(sae.layer))
            for count in counts[block.features.layer == number]:
                histogram.observe(count)

    def observe_outcome(self, outcome: Outcome, layers: tuple[int, ...]) -> None:
        """One file came to its end; `layers` are the SAEs'."""
        self.files_total.labels(outcome.kind).inc()
        self.samples_total.labels("committed").inc(outcome.rows)
        self.samples_total.labels("rejected").inc(outcome.rejects)
        if outcome.kind != "committed":
            return
        self.output_bytes_total.inc(outcome.output_bytes)
        self.file_latency_seconds.observe(outcome.seconds)
        self.last_commit_timestamp_seconds.set_to_current_time()
        if outcome.stages is not None:
            self._observe_stages(outcome.stages)
        for layer, fvu in zip(layers, outcome.fvu, strict=True):
            if fvu is not None:
                self.sae_fvu.labels(str(layer)).set(fvu)

    def _observe_stages(self, stages: StageSeconds) -> None:
        self.stage_duration_seconds.labels("queue").observe(stages.queue)
        self.stage_duration_seconds.labels("write").observe(stages.write)
        self.stage_duration_seconds.labels("commit").observe(stages.commit)

    def observe_device(self, busy_seconds: float, now: float) -> None:
        """Set the busy ratio; `busy_seconds` only grows, `now` is monotonic.

        Over a window, since `busy_seconds` grows by a whole call when the call ends.
        """
        self._looks.append((now, busy_seconds))
        while len(self._looks) > 2 and self._looks[1][0] <= now - BUSY_WINDOW_SECONDS:
            self._looks.popleft()
        then, busy_then = self._looks[0]
        if now > then:
            self.device_busy_ratio.set(min(1.0, (busy_seconds - busy_then) / (now - then)))

    def observe_inbox(self, load: InboxLoad, recovered: int) -> None:
        """What waits, and how many files were taken over from dead processes since the last call."""
        self.inbox_files.set(load.files)
        self.inbox_bytes.set(load.bytes)
        self.oldest_pending_seconds.set(load.oldest_seconds)
        self.recovered_files_total.labels("taken_over").inc(recovered)

    def observe_disk(self, folders: dict[str, Path]) -> None:
        """Free space under each folder, by the name it has in the configuration."""
        for name, folder in folders.items():
            self.disk_free_bytes.labels(name).set(shutil.disk_usage(folder).free)
