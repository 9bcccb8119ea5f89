from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry

from daemon.model.buffers import memory_bytes
from daemon.model_info import ModelInfo, SaeInfo
from daemon.observe.metrics import FILE_OUTCOMES, MEMORY_KINDS, STAGES, Metrics
from daemon.observe.snapshot import Snapshot
from daemon.recipes import PLAIN_RECIPE
from daemon.records import (
    Batch,
    BatchResult,
    Departure,
    Entry,
    FeatureRows,
    InboxLoad,
    Outcome,
    Part,
    PartExtent,
    Reject,
    RowMessage,
    Sample,
    StageSeconds,
    TokenizedPart,
    TokenizedSample,
    WorkerLoad,
)
from tests.support.sources import unclaimed

SOURCE = unclaimed("f")
HOOK = "blocks.{}.hook_resid_post"
SAES = tuple(SaeInfo(HOOK.format(n), HOOK.format(n), n, 4, 8, 4, "jumprelu", "s", "h") for n in (3, 5))
INFO = ModelInfo("tiny", "Llama", 4, 6, "float32", "cpu", "packed", None, SAES)

DESIGN = [  # name, type, label
    ("files_total", "counter", "outcome"),
    ("samples_total", "counter", "outcome"),
    ("rejects_total", "counter", "reason"),
    ("cut_texts_total", "counter"),
    ("tokens_total", "counter", "kind"),
    ("batches_total", "counter"),
    ("input_bytes_total", "counter"),
    ("output_bytes_total", "counter"),
    ("oom_total", "counter"),
    ("retries_total", "counter", "stage"),
    ("rescan_found_total", "counter"),
    ("recovered_files_total", "counter", "action"),
    ("sync_errors_total", "counter"),
    ("config_reloads_total", "counter", "outcome"),
    ("inbox_files", "gauge"),
    ("inbox_bytes", "gauge"),
    ("inbox_left_files", "gauge"),
    ("oldest_pending_seconds", "gauge"),
    ("queue_items", "gauge", "stage"),
    ("queue_tokens", "gauge"),
    ("buffer_pool_bytes", "gauge"),
    ("disk_free_bytes", "gauge", "dir"),
    ("disk_size_bytes", "gauge", "dir"),
    ("paused", "gauge", "reason"),
    ("device_memory_bytes", "gauge", "kind"),
    ("device_busy_ratio", "gauge"),
    ("max_batch_tokens", "gauge"),
    ("executor_slots", "gauge"),
    ("batches_in_flight", "gauge"),
    ("coordinator_busy_ratio", "gauge"),
    ("workers_wanted", "gauge"),
    ("workers", "gauge", "state"),
    ("worker_memory_bytes", "gauge", "worker"),
    ("worker_restarts_total", "counter", "worker"),
    ("worker_batches_total", "counter", "worker"),
    ("worker_samples_total", "counter", "worker"),
    ("worker_busy_seconds_total", "counter", "worker"),
    ("last_commit_timestamp_seconds", "gauge"),
    ("heartbeat_timestamp_seconds", "gauge", "loop"),
    ("sae_fvu", "gauge", "layer", "sae"),
    ("sae_mean_l0", "gauge", "layer", "sae"),
    ("sae_departures_total", "counter", "layer", "sae", "kind", "against"),
    ("clipped_values_total", "counter"),
    ("stage_duration_seconds", "histogram", "stage"),
    ("file_latency_seconds", "histogram"),
    ("batch_tokens", "histogram"),
    ("batch_texts", "histogram"),
    ("sequence_tokens", "histogram"),
    ("feature_l0", "histogram", "layer", "sae"),
]


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry())


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"lensd_{name}", labels)


def tokenized(lengths: list[int], rejects: tuple[Reject, ...] = ()) -> TokenizedPart:
    samples = [Sample(i, str(i), None, None, None, ("t",), None, 0) for i in range(len(lengths))]
    part = Part(
        SOURCE,
        PartExtent(0, 0, len(samples) + len(rejects), 0),
        True,
        PLAIN_RECIPE,
        tuple(samples),
        rejects,
        tokenize_seconds=0.5,
    )
    return TokenizedPart(
        part, tuple(TokenizedSample(s, ((1,) * n,)) for s, n in zip(samples, lengths, strict=True))
    )


def test_every_outcome_is_there_at_zero_before_it_happens(metrics):
    for outcome in FILE_OUTCOMES:
        assert value(metrics, "files_total", outcome=outcome) == 0
    assert value(metrics, "rejects_total", reason="missing_field") == 0
    assert value(metrics, "tokens_total", kind="padding") == 0
    for stage in STAGES:
        assert value(metrics, "stage_duration_seconds_count", stage=stage) == 0


def test_tokenized_parts_count_text_tokens_and_rejects(metrics):
    reject = Reject(2, None, 3, 0, "missing_field", "m")
    metrics.observe_tokenized(tokenized([3, 5], (reject,)))
    assert value(metrics, "tokens_total", kind="text") == 8
    assert value(metrics, "rejects_total", reason="missing_field") == 1
    assert value(metrics, "sequence_tokens_count") == 2
    assert value(metrics, "stage_duration_seconds_sum", stage="tokenize") == 0.5


def test_a_block_counts_what_the_model_really_ran(metrics):
    part = tokenized([3, 5])
    features = FeatureRows(
        sample_row=np.array([0, 0, 1, 1]),
        text=np.zeros(4, dtype=int),
        layer=np.array([0, 1, 0, 1]),
        position=np.zeros(4, dtype=int),
        token_id=np.zeros(4, dtype=int),
        offsets=np.array([0, 2, 2, 5, 6]),
        indices=np.zeros(6, dtype=np.uint32),
        values=np.zeros(6, dtype=np.float32),
    )
    block = BatchResult({}, features, (), 1.0, 2.0, 3.0, computed_tokens=10, padding_tokens=2)
    metrics.observe_batch(Batch(PLAIN_RECIPE, (Entry(part, 0), Entry(part, 1))), block, INFO)
    assert value(metrics, "batches_total") == 1
    assert value(metrics, "tokens_total", kind="computed") == 10
    assert value(metrics, "tokens_total", kind="padding") == 2
    assert value(metrics, "batch_texts_sum") == 2
    assert value(metrics, "feature_l0_sum", layer="3", sae="l3") == 5
    assert value(metrics, "feature_l0_sum", layer="5", sae="l5") == 1
    assert value(metrics, "stage_duration_seconds_sum", stage="analysis") == 3.0


def test_a_committed_file_counts_its_rows_and_its_fit(metrics):
    outcome = Outcome(
        "committed", "f", "u", Path("o"), rows=7, rejects=2, output_bytes=99, seconds=4.0, fvu=(0.1, None),
        stages=StageSeconds(write=0.25, commit=0.5),
    )  # fmt: skip
    metrics.observe_outcomes([outcome], SAES)
    assert value(metrics, "files_total", outcome="committed") == 1
    assert value(metrics, "samples_total", outcome="committed") == 7
    assert value(metrics, "samples_total", outcome="rejected") == 2
    assert value(metrics, "output_bytes_total") == 99
    assert value(metrics, "file_latency_seconds_sum") == 4.0
    assert value(metrics, "sae_fvu", layer="3", sae="l3") == 0.1
    assert value(metrics, "sae_fvu", layer="5", sae="l5") is None
    assert value(metrics, "stage_duration_seconds_sum", stage="commit") == 0.5
    assert value(metrics, "last_commit_timestamp_seconds") > 0


def test_files_far_from_what_is_known_of_saes_are_counted_and_start_at_zero(metrics):
    metrics.describe(INFO, 512)
    labels = {"layer": "5", "sae": "l5", "kind": "l0", "against": "card"}
    assert value(metrics, "sae_departures_total", **labels) == 0
    found = Departure(SAES[1], "l0", "card", 300, 60)
    outcome = Outcome("committed", "f", fvu=(0.1, 0.2), mean_l0=(50, None), clipped=4, departures=(found,))
    metrics.observe_outcomes([outcome, Outcome("committed", "g", fvu=(0.1, 0.2), mean_l0=(60, None))], SAES)
    assert value(metrics, "sae_departures_total", **labels) == 1
    assert value(metrics, "sae_departures_total", **{**labels, "kind": "fvu"}) == 0
    assert value(metrics, "sae_mean_l0", layer="3", sae="l3") == 60
    assert value(metrics, "sae_mean_l0", layer="5", sae="l5") is None
    assert value(metrics, "clipped_values_total") == 4


def test_samples_that_are_not_finite_count_as_rejects_and_not_as_features(metrics):
    part = tokenized([3, 5])
    features = FeatureRows(
        sample_row=np.array([0, 1]),
        text=np.zeros(2, dtype=int),
        layer=np.zeros(2, dtype=int),
        position=np.zeros(2, dtype=int),
        token_id=np.zeros(2, dtype=int),
        offsets=np.array([0, 2, 5]),
        indices=np.zeros(5, dtype=np.uint32),
        values=np.zeros(5, dtype=np.float32),
    )
    block = BatchResult({}, features, (), 1.0, 2.0, 3.0, not_finite=(RowMessage(1, "m"),))
    metrics.observe_batch(Batch(PLAIN_RECIPE, (Entry(part, 0), Entry(part, 1))), block, INFO)
    assert value(metrics, "rejects_total", reason="not_finite_activation") == 1
    assert value(metrics, "feature_l0_sum", layer="3", sae="l3") == 2


def test_a_failed_file_is_no_commit(metrics):
    metrics.observe_outcomes([Outcome("failed", "f", reason="empty", message="m")], SAES)
    assert value(metrics, "files_total", outcome="failed") == 1
    assert value(metrics, "file_latency_seconds_count") == 0
    assert value(metrics, "last_commit_timestamp_seconds") == 0


def test_the_model_and_the_build_are_named(metrics):
    metrics.describe(INFO, 512)
    saes = "blocks.3.hook_resid_post,blocks.5.hook_resid_post"
    assert (
        value(metrics, "model_info", model="tiny", dtype="float32", device="cpu", engine="packed", saes=saes)
        == 1
    )
    assert value(metrics, "max_batch_tokens") == 512


def test_busy_ratio_is_that_of_the_last_minute(metrics):
    metrics.observe_device(0.0, 1000.0)
    assert value(metrics, "device_busy_ratio") == 0
    metrics.observe_device(2.0, 1010.0)
    assert value(metrics, "device_busy_ratio") == pytest.approx(0.2)
    metrics.observe_device(2.0, 1060.0)
    assert value(metrics, "device_busy_ratio") == pytest.approx(2.0 / 60)
    metrics.observe_device(2.0, 1070.0)
    assert value(metrics, "device_busy_ratio") == 0


def test_a_device_always_in_long_calls_counts_as_busy(metrics):
    for second in range(201):
        metrics.observe_device(20.0 * (second // 20), 1000.0 + second)
        if second >= 60:
            assert value(metrics, "device_busy_ratio") == pytest.approx(1.0, abs=20 / 60 + 1e-9)
    assert value(metrics, "device_busy_ratio") == 1.0


def snapshot_of(**changes: object) -> Snapshot:
    quiet = {"device_alive": True, "device_busy_seconds": 0.0, "coordinator_seconds": 0.0}
    return Snapshot(**{**quiet, "done": 0, "total": 0, "rate": 0.0, **changes})  # type: ignore[arg-type]


def test_the_coordinators_share_is_that_of_the_last_minute_in_cores(metrics):
    for second in range(100):
        used = 0.3 * second if second < 60 else 18 + 1.5 * (second - 60)
        metrics.observe_snapshot(snapshot_of(coordinator_seconds=5 + used), None, 1000.0 + second)
        if second == 59:
            assert value(metrics, "coordinator_busy_ratio") == pytest.approx(0.3)
    assert value(metrics, "coordinator_busy_ratio") == pytest.approx((21 * 0.3 + 39 * 1.5) / 60, rel=0.02)


def test_workers_are_told_by_state_and_number(metrics):
    workers = (
        WorkerLoad(0, "ready", "a", memory_bytes=7),
        WorkerLoad(1, "ready", "b", memory_bytes=8),
        WorkerLoad(2, "starting", ""),
    )
    snapshot = snapshot_of(workers=workers, workers_wanted=4, slots=4, batches_in_flight=3)
    metrics.observe_snapshot(snapshot, None, 0.0)
    states = ("ready", "starting", "draining")
    assert [value(metrics, "workers", state=state) for state in states] == [2, 1, 0]
    gauges = ("workers_wanted", "executor_slots", "batches_in_flight")
    assert [value(metrics, name) for name in gauges] == [4, 4, 3]
    assert [value(metrics, "worker_memory_bytes", worker=number) for number in "0123"] == [7, 8, 0, None]
    for name in ("restarts", "batches", "samples", "busy_seconds"):  # there before anything happens
        assert value(metrics, f"worker_{name}_total", worker="2") == 0
    metrics.worker_restarted(1)
    metrics.worker_computed(1, samples=5, busy_seconds=0.5)
    metrics.worker_computed(1, samples=5, busy_seconds=0.25)
    for name, expected in {"restarts": 1, "batches": 2, "samples": 10, "busy_seconds": 0.75}.items():
        assert value(metrics, f"worker_{name}_total", worker="1") == expected
    metrics.observe_snapshot(snapshot_of(workers=workers[:1], workers_wanted=1), None, 1.0)
    assert [value(metrics, "worker_memory_bytes", worker=number) for number in "01"] == [7, None]
    assert value(metrics, "worker_samples_total", worker="1") == 10


def test_free_space_is_told_by_the_folders_role(metrics, tmp_path):
    metrics.observe_disk({"inbox": tmp_path})
    free, size = (value(metrics, name, dir="inbox") for name in ("disk_free_bytes", "disk_size_bytes"))
    assert 0 < free < size


def test_memory_is_told_by_kind_and_what_is_kept_for_batches_beside_it(metrics):
    metrics.observe_memory({"allocated": 3, "reserved": 5, "total": 9}, pool_bytes=5)
    kinds = ("allocated", "reserved", "total", "resident")
    assert [value(metrics, "device_memory_bytes", kind=kind) for kind in kinds] == [3, 5, 9, None]
    assert value(metrics, "buffer_pool_bytes") == 5


def test_what_is_told_once_about_the_inbox_adds_up(metrics):
    for recovered, found in ((2, 1), (0, 3)):
        snapshot = snapshot_of(recovered=recovered, found=found)
        metrics.observe_snapshot(snapshot, None, now=0.0)
    assert value(metrics, "recovered_files_total", action="taken_over") == 2
    assert value(metrics, "rescan_found_total") == 4


def test_what_waits_is_told_with_its_age_by_now(metrics):
    metrics.observe_load(InboxLoad(files=4, bytes=9, oldest_at=time.time() - 1e6, counted_at=0.0, left=3))
    assert (value(metrics, "inbox_files"), value(metrics, "inbox_bytes")) == (4, 9)
    assert value(metrics, "inbox_left_files") == 3
    assert value(metrics, "oldest_pending_seconds") >= 1e6
    metrics.observe_load(InboxLoad(files=0, bytes=0, oldest_at=None, counted_at=0.0))
    assert value(metrics, "oldest_pending_seconds") == 0


def test_every_metric_of_the_design_exists_with_its_type_and_label(metrics):
    described = {(d.name, d.kind, *(label.name for label in d.labels)) for d in metrics.descriptions}
    plain = [entry for entry in described if entry[1] != "info" and not entry[0].startswith("process_")]
    assert set(plain) == {(f"lensd_{name}", kind, *labels) for name, kind, *labels in DESIGN}
    assert {"lensd_build_info", "lensd_model_info", "process_start_time_seconds"} <= {
        d.name for d in metrics.descriptions
    }


def test_every_series_in_the_registry_is_described_and_within_its_bounds(metrics):
    """Every existing series keeps to the labels that bound the number of series."""
    metrics.observe_retry("read")
    described = {d.name: d for d in metrics.descriptions}
    for family in metrics.registry.collect():
        name = family.name + {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = {label.name: label.values for label in described[name].labels}
        for sample in family.samples:
            for key in sample.labels.keys() - {"le"}:
                assert sample.labels[key] in labels[key] or labels[key] == ()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_kinds_of_memory_are_those_that_are_described(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=3))
    kinds = memory_bytes(device)
    assert kinds.keys() <= set(MEMORY_KINDS)
    assert all(size > 0 for size in kinds.values())
    assert ("resident" in kinds) == (device == "cpu")
