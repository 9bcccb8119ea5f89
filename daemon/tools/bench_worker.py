"""The processes of `lensd bench`: each holds a loaded model and runs what it is told, one thing at a time.

A process of its own for lensd and one for what it is compared with, so that neither's memory is in the
other's figures. Knows nothing about repetitions and reports.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import logging
import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

from daemon.batching.batcher import Batcher
from daemon.config import Config
from daemon.executor.preparing import prepare_all
from daemon.model.trie import build_trie
from daemon.model_info import compute_devices
from daemon.model_wiring import Compute, load_compute, load_parts, tokenizer_of
from daemon.observe.logs import configure as configure_logs
from daemon.platform_calls import high_water_bytes, restart_high_water, trim_heap
from daemon.records import TokenizedPart, TokenizedSample
from daemon.service import serve
from daemon.source.tokenizer import Tokenizer
from daemon.tools.baselines import Baselines
from daemon.tools.limit import ProductRate, Products, Work
from daemon.tools.samples import UNLIMITED, all_batches, private_inbox, tokenized_parts

R = TypeVar("R")

BARE, AUTO = "bare engine", "lensd auto"
RATE = "rate"  # asks for the rate of products


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of one variant."""

    seconds: float
    samples: int
    text_tokens: int
    peak_bytes: int  # resident, of the whole process


@dataclass(frozen=True, slots=True)
class Workload:
    """The texts and the model that run them."""

    samples: int
    text_tokens: int
    unique_tokens: int
    multiply_adds: int
    max_batch_tokens: int  # that auto chose
    engine: str
    device: str


class LensdWorker:
    """lensd: whole runs from a file to published results, and its engine alone."""

    def __init__(self, config: Config, files: Sequence[Path], batch_sizes: Sequence[int]) -> None:
        self._work = in_a_thread(lambda: Work.of(*load_parts(config)))
        self._config, self._files = config, files
        self._compute = in_a_thread(lambda: prepared(config))
        parts = read_files(config, self._compute.tokenizer, files)
        self._samples = [sample for part in parts for sample in part.samples]
        device = compute_devices(self._compute.engine.info.device)[0]
        self._products = Products(self._work, getattr(torch, config.model.dtype), device)
        self._variants: dict[str, Callable[[], float]] = {BARE: lambda: in_a_thread(self._bare)}
        for size in batch_sizes:
            self._variants[f"lensd {size}"] = functools.partial(self._daemon, size)
        self._variants[AUTO] = functools.partial(self._daemon, None)
        engine = self._compute.engine
        batcher = Batcher(self._compute.max_batch_tokens, shares_prefixes=engine.shares_prefixes)
        self._planned = all_batches(batcher, parts)
        gc.collect()
        gc.freeze()  # as a daemon does once its model is loaded, which is not what is measured

    def hello(self) -> tuple[tuple[str, ...], Workload]:
        """The variants, and what they run."""
        info = self._compute.engine.info
        texts = [ids for sample in self._samples for ids in sample.token_ids]
        packed = build_trie(texts)
        skip = int(any(sae.prepend_bos for sae in info.saes))
        every = self._config.analysis.positions != "last"
        readings = int((packed.depth >= skip).sum()) if every else len(texts)
        if info.reads_both_ways:
            texts += [ids for sample in self._samples for ids in sample.bare_ids]
            packed = build_trie(texts)
        workload = Workload(
            samples=len(self._samples),
            text_tokens=sum(map(len, texts)),
            unique_tokens=len(packed),
            multiply_adds=self._work.multiply_adds(packed, readings),
            max_batch_tokens=self._compute.max_batch_tokens,
            engine=info.engine,
            device=info.device,
        )
        return tuple(self._variants), workload

    def run(self, variant: str) -> Measured | ProductRate:
        """A variant, or RATE."""
        if variant == RATE:
            return in_a_thread(self._products.rate)
        return measured(self._variants[variant], self._samples)

    def _bare(self) -> float:
        """The batches of the auto setting through the engine and the analysis, and nothing else."""
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in self._compute.runner.runs(batch.inputs for batch in self._planned):
                pass
        return time.perf_counter() - began

    def _daemon(self, batch_samples: int | None) -> float:
        """Drop the files, drain the inbox; a batch holds so many samples, or what auto chose."""
        compute = self._compute if batch_samples is None else unlimited(self._compute)
        with (
            tempfile.TemporaryDirectory(prefix="lensd-bench-") as folder,
            private_inbox(self._config, self._files, Path(folder)) as settings,
        ):
            batching = settings.batching.model_copy(update={"max_batch_samples": batch_samples})
            settings = settings.model_copy(update={"batching": batching})
            began = time.perf_counter()
            tally = serve(settings, once=True, load=lambda _: compute)
            seconds = time.perf_counter() - began
        assert tally.committed == len(self._files), tally
        return seconds


def prepared(config: Config) -> Compute:
    """All that a run needs, with the kernels that a daemon makes between its first batches."""
    compute = load_compute(config)
    prepare_all(compute.preparations)
    return compute


def unlimited(compute: Compute) -> Compute:
    """The same with batches limited by samples alone."""
    return dataclasses.replace(compute, max_batch_tokens=UNLIMITED)


def in_a_thread(function: Callable[[], R]) -> R:
    """Call it on a thread that ends with it.

    A thread that used torch keeps a team of OpenMP threads as long as it lives, and where there are more of
    those than cores each waits by sleeping: the daemon under measurement is to have the only team.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function).result()


class BaselineWorker:
    """The baselines that lensd is compared with, on the samples given."""

    def __init__(self, config: Config, files: Sequence[Path], limits: dict[str, int] | int) -> None:
        """`limits` gives how many samples, evenly chosen, a variant is run on; all where it says nothing."""
        of_each = limits if isinstance(limits, dict) else {}
        of_all = limits if isinstance(limits, int) else None
        model, saes = load_parts(config, stamped=False)  # dictionaries as SAELens has them
        tokenizer = tokenizer_of(model, config, [entry.info for entry in saes])
        parts = read_files(config, tokenizer, files)
        samples = [sample for part in parts for sample in part.samples]
        loops = Baselines(model, saes, config.analysis.positions).variants()
        self._chosen = {name: evenly(samples, of_each.get(name, of_all or len(samples))) for name in loops}
        self._loops = loops

    def hello(self) -> tuple[str, ...]:
        """The variants."""
        return tuple(self._loops)

    def run(self, variant: str) -> Measured:
        def loop() -> float:
            began = time.perf_counter()
            self._loops[variant](self._chosen[variant])
            return time.perf_counter() - began

        return measured(loop, self._chosen[variant])


def measured(run: Callable[[], float], samples: Sequence[TokenizedSample]) -> Measured:
    """`run` returns the seconds that count."""
    forget_peak()
    seconds = run()
    return Measured(
        seconds=seconds,
        samples=len(samples),
        text_tokens=sum(sample.n_tokens for sample in samples),
        peak_bytes=peak_bytes(),
    )


def read_files(config: Config, tokenizer: Tokenizer, files: Sequence[Path]) -> list[TokenizedPart]:
    return [part for file in files for part in tokenized_parts(config, tokenizer, file)]


def evenly(samples: Sequence[TokenizedSample], n: int) -> list[TokenizedSample]:
    """n of the samples, spread over all of them."""
    n = min(n, len(samples))
    return [samples[i * len(samples) // n] for i in range(n)]


def forget_peak() -> None:
    """Give free memory back and start the kernel's high-water mark anew."""
    trim_heap()
    restart_high_water()


def peak_bytes() -> int:
    """The most memory resident since `forget_peak`; on CUDA the device's is the one that counts."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    return high_water_bytes()


def answer(connection: Connection, kind: Callable[..., LensdWorker | BaselineWorker], *args: object) -> None:
    """Make a worker, tell its `hello`; then run what is asked for by name, and answer with its figures."""
    quiet()
    worker = kind(*args)
    connection.send(worker.hello())
    while (asked := connection.recv()) is not None:
        connection.send(worker.run(asked))


def quiet() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the one that asks decides
    configure_logs("json", "error")
    logging.disable(logging.WARNING)
