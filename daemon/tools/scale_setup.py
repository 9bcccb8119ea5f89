"""Costs and sizes of a model of scale, and its answer. `deploy/ray/SCALE.md` has their sources."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Setup:
    """Costs and sizes. Workers are alike, and so are daemons."""

    batch_samples: int = 140  # in a batch
    file_samples: int = 1000  # in a file
    out_kb: float = 1.0  # shipped to a worker for a sample
    back_kb: float = 24.0  # and back
    parquet_kb: float = 5.5  # written for a sample
    worker_sample_ms: float = 26.0  # of a worker's device, for a sample
    worker_batch_ms: float = 0.0  # and for a batch of any size
    slots: int = 2  # batches at a time that a worker has, one of which waits
    spread: float = 0.1  # standard deviation of the logarithm of a batch's time
    tail: float = 0.002  # share of batches that take 2 to 20 times as long
    model_gb: float = 0.57  # read to load a model and its dictionaries
    per_node: int = 64  # workers of a machine, which read the model's files once
    load_seconds: float = 20.0  # to start a worker, besides reading
    load_gbps: float = 0.0  # GB/s over which all models are read; 0: what the store gives
    latency_ms: float = 1.0  # between a daemon and a worker, one way
    mtbf_hours: float = 1000.0  # mean time until a worker is lost
    cores: float = 1.0  # that a daemon makes use of
    sample_ms: float = 0.17  # of a daemon's core, for a sample
    mb_ms: float = 21.0  # and for a MB of Parquet
    file_ms: float = 5.0  # and for a file
    batch_ms: float = 0.04  # and for a batch
    worker_us: float = 1.7  # and for a batch and each of its workers, through which it looks
    link_gbps: float = 1.25  # GB/s of a daemon's network, each way
    queue_mb: float = 128.0  # results that wait to be published, beyond which a daemon ships no batch
    store_ops: float = 10_000.0  # operations and syncs a second that the store does for all daemons
    op_ms: float = 0.5  # that one operation takes
    sync_ms: float = 5.0  # that one sync takes
    store_gbps: float = 2.0  # GB/s

    @property
    def worker_rate(self) -> float:
        """Samples a second of a worker that never waits."""
        batch_ms = self.worker_batch_ms + self.batch_samples * self.worker_sample_ms
        return 1000 * self.batch_samples / batch_ms


@dataclass(frozen=True, slots=True)
class Prediction:
    """For one number of workers and daemons."""

    workers: int
    daemons: int
    samples_per_second: float  # steadily; of a fixed job, from the start to its last file
    efficiency: float  # of workers that never wait
    binds: str
    busy: dict[str, float]  # share of the time of what could bind
    load_seconds: float  # until every worker is loaded, when all start at once
    tail_seconds: float  # from the last batch shipped to the last file published
    file_seconds: float  # from a part's claim to its publication, median
    held_gb: float  # results in a daemon's memory that wait for the rest of their parts, at most


DOCUMENTS = Setup(batch_samples=11, out_kb=1.5, back_kb=1020.0, parquet_kb=662.0, worker_sample_ms=1010.0)
GPU = Setup(
    batch_samples=1109,
    back_kb=62.0,
    parquet_kb=3.4,
    worker_sample_ms=0.178,
    worker_batch_ms=53.0,
    model_gb=6.1,
    per_node=8,
    load_seconds=60.0,
)
WORKLOADS = {"short": Setup(), "documents": DOCUMENTS, "gpu": GPU}
ZERO_IS_FINE = {"worker_batch_ms", "spread", "tail", "model_gb", "load_seconds", "load_gbps", "latency_ms"}
ZERO_IS_FINE |= {"sample_ms", "mb_ms", "file_ms", "batch_ms", "worker_us", "op_ms", "sync_ms", "parquet_kb"}
