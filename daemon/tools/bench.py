"""`lensd bench`: lensd at several batch sizes, beside what people run instead, interleaved in one run.

Machines drift, so a ratio compares runs of the same repetition, and what is reported is the median over
repetitions. Speed counts whole runs, from the file to published results, but for the variants that say less.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from daemon.config import Config
from daemon.errors import ConfigError, MachineError
from daemon.platform_calls import processor_name, usable_cores
from daemon.tools.bench_worker import (
    AUTO,
    BARE,
    RATE,
    BaselineWorker,
    LensdWorker,
    Measured,
    Workload,
    answer,
)
from daemon.tools.limit import ProductRate
from daemon.tools.samples import DEMO_SAMPLES

BATCH_SIZES = (1, 4, 8, 16, 32)
NOISE = 0.97  # of the fastest rate: one that reaches it is as fast
SLOW_SAMPLES = {"sequential": 16, "original": 16}  # a rate needs no more of the slowest


@dataclass(frozen=True, slots=True)
class VariantReport:
    """Medians over the repetitions."""

    name: str
    samples: int
    seconds: float
    samples_per_second: float
    tokens_per_second: float  # of text, whether computed once or often
    speedup: float  # over `sequential`, of the same repetition
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class BenchReport(Workload):
    machine: str
    cores: int
    model: str
    dtype: str
    positions: str
    files: tuple[str, ...]
    repetitions: int
    torch_product_flops: float  # multiply-adds per second, twice: torch's own matrix product
    fastest_product_flops: float
    fraction_of_fastest: float  # of the time at the fastest product's rate
    fraction_of_torch: float  # the same at the rate of torch's own product
    pipeline_over_bare: float  # throughput of whole runs over that of the engine alone
    over: dict[str, float]  # samples/s of `lensd auto` over those of each other variant
    variants: tuple[VariantReport, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def variant(self, name: str) -> VariantReport:
        return next(variant for variant in self.variants if variant.name == name)

    def recommended(self, memory_bytes: float = math.inf) -> VariantReport | None:
        """The fastest setting within this much memory, the smaller where two are within the noise."""
        fit = [v for v in self.variants if v.name.startswith("lensd") and v.peak_bytes <= memory_bytes]
        fastest = max((v.samples_per_second for v in fit), default=0.0)
        good = [v for v in fit if v.samples_per_second >= NOISE * fastest]
        return min(good, key=lambda v: v.peak_bytes, default=None)

    def setting(self, variant: VariantReport) -> str:
        """How a variant of lensd is configured."""
        if variant.name == AUTO:
            return f"max_batch_tokens = {self.max_batch_tokens}"
        return f"max_batch_samples = {variant.name.split()[1]}"


def bench(
    config: Config,
    files: Sequence[Path],
    *,
    repetitions: int = 5,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    baselines: Sequence[str] | None = None,
    baseline_samples: int | None = None,
) -> BenchReport:
    """Measure; takes minutes. `baselines` leaves out all others but `sequential`; `baseline_samples` limits
    on how many samples, evenly chosen, each of them runs. Interrupted, it reports the whole repetitions.

    Raises MachineError where a worker ends, ConfigError and FileError as a run would.
    """
    limits = SLOW_SAMPLES if baseline_samples is None else baseline_samples
    paths = [Path(file) for file in files] or [DEMO_SAMPLES]
    rounds: list[Round] = []
    try:
        with ExitStack() as workers:
            lensd = workers.enter_context(worker(LensdWorker, config, paths, batch_sizes))
            variants, workload = lensd.receive()  # first: it may measure what auto is to be
            others = workers.enter_context(worker(BaselineWorker, config, paths, limits))
            names = chosen(others.receive(), baselines)
            order = [(others, name) for name in names] + [(lensd, name) for name in variants]
            with progress_bar() as progress:
                task = progress.add_task("loading", total=(repetitions + 1) * len(order))
                for number in range(repetitions + 1):  # the first warms up
                    rounds.append(one_round(order, lensd, partial(progress.update, task)))
                    progress.print(
                        f"repetition {number} of {repetitions}: {rounds[-1]}" if number else "warm"
                    )
    except KeyboardInterrupt:
        if len(rounds) < 2:
            raise
        sys.stderr.write(f"interrupted: what follows is of {len(rounds) - 1} whole repetitions\n")
    return report(config, paths, workload, rounds[1:])


@dataclass(frozen=True, slots=True)
class Round:
    """Every variant once."""

    runs: dict[str, Measured]
    rate: ProductRate

    def __str__(self) -> str:
        return ", ".join(f"{name} {run.samples / run.seconds:.1f}" for name, run in self.runs.items()) + (
            f" samples/s; products {2 * self.rate.fastest / 1e9:.0f} GFLOP/s"
        )


def one_round(order: Sequence[tuple[Worker, str]], lensd: Worker, show: Callable[..., None]) -> Round:
    """Each variant in turn, and the rate of products just before `lensd auto`."""
    runs: dict[str, Measured] = {}
    for process, name in order:
        show(description=name)
        if name == AUTO:
            rate: ProductRate = lensd.ask(RATE)
        runs[name] = process.ask(name)
        show(advance=1)
    return Round(runs, rate)


def chosen(known: Sequence[str], wanted: Sequence[str] | None) -> list[str]:
    """The baselines to run: all, or the wanted and the one that speedups refer to. Raises ConfigError."""
    if wanted is None:
        return list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"--baselines: no {unknown[0]!r} here: {', '.join(known)}")
    return [name for name in known if name in (*wanted, "sequential")]


def report(config: Config, files: Sequence[Path], workload: Workload, rounds: Sequence[Round]) -> BenchReport:
    runs = {name: [one.runs[name] for one in rounds] for name in rounds[0].runs}
    rates = [one.rate for one in rounds]
    speed = {name: [run.samples / run.seconds for run in measured] for name, measured in runs.items()}
    auto = runs[AUTO]

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(speed[over], speed[under], strict=True))

    def fraction(limits: list[float]) -> float:
        return statistics.median(
            workload.multiply_adds / limit / run.seconds for limit, run in zip(limits, auto, strict=True)
        )

    return BenchReport(
        **asdict(workload),
        machine=processor_name().partition(":")[2].strip() or "unknown",
        cores=usable_cores(),
        model=config.model.name,
        dtype=config.model.dtype,
        positions=config.analysis.positions,
        files=tuple(file.name for file in files),
        repetitions=len(auto),
        torch_product_flops=2 * statistics.median(rate.torch for rate in rates),
        fastest_product_flops=2 * statistics.median(rate.fastest for rate in rates),
        fraction_of_fastest=fraction([rate.fastest for rate in rates]),
        fraction_of_torch=fraction([rate.torch for rate in rates]),
        pipeline_over_bare=ratio(AUTO, BARE),
        over={name: ratio(AUTO, name) for name in runs if name != AUTO},
        variants=tuple(
            VariantReport(
                name=name,
                samples=measured[0].samples,
                seconds=statistics.median(run.seconds for run in measured),
                samples_per_second=statistics.median(speed[name]),
                tokens_per_second=statistics.median(run.text_tokens / run.seconds for run in measured),
                speedup=ratio(name, "sequential"),
                peak_bytes=max(run.peak_bytes for run in measured),
            )
            for name, measured in runs.items()
        ),
    )


class Worker:
    """A process at the other end of a pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def receive(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            raise MachineError("a process of the benchmark ended: its message is above") from None

    def ask(self, question: str) -> Any:
        self._connection.send(question)
        return self.receive()


@contextmanager
def worker(kind: Any, *args: Any) -> Iterator[Worker]:
    """A process that makes a worker of this kind and answers for it, ended on leaving."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(theirs, kind, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Worker(ours)
        ours.send(None)
        process.join(30)
    finally:
        process.terminate()
        process.join()


def progress_bar() -> Progress:
    """A bar on standard error, and lines above it that stay."""
    return Progress(
        TextColumn("{task.description:>14}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False, markup=False, soft_wrap=True),
        transient=True,
    )
