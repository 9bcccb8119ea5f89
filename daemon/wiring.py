"""Builds what a configuration asks for: executors, and pipelines between two folders.

With `model_wiring` the one place that knows both the configuration and the constructors. Importing it
imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from daemon.analysis.columns import ANALYSIS_VERSION
from daemon.batching.batcher import Batcher
from daemon.config import PRESETS, Config
from daemon.executor.device_thread import DeviceThread
from daemon.executor.local import LocalExecutor
from daemon.executor.preparing import prepare_all, preparing
from daemon.model.smollm2 import default_cache_dir
from daemon.model_info import ModelInfo
from daemon.model_wiring import Compute, load_compute, read_rules, study_settings
from daemon.pause import Pause
from daemon.pipeline import Limits, Pipeline
from daemon.ports import Executor, Observer
from daemon.sink.folder import FolderSink
from daemon.sink.outbox import Outbox
from daemon.sink.parts import FORMAT as PARTS_FORMAT
from daemon.sink.report import ReportMaker
from daemon.sink.schema import Layout, stored_columns
from daemon.source.folder import FolderSource
from daemon.source.inbox import Inbox
from daemon.source.inputs import InputNames
from daemon.source.limits import ReadLimits
from daemon.source.tokenizer import Tokenizer

if TYPE_CHECKING:
    from daemon.executor.crew import WorkerEvents
    from daemon.executor.ray import RayExecutor
    from daemon.executor.ray_cluster import Cluster

log = structlog.get_logger()

QUEUED_TEXT_BYTES = 16 << 20
QUEUED_RESULT_BYTES = 64 << 20
PART_BYTES = 4 << 20  # of raw records; a part's results are held in memory until it is whole
PART_BYTES_OF_ALL = 64 << 10  # where every token is stored: its features weigh hundreds of times as much
PART_BYTES_OF_RESIDUALS = 16 << 10  # and what SAEs read several times as much again


def folders_of_use(config: Config) -> dict[str, Path]:
    """Folders that hold what a run reads, by what they are: none of them can be the inbox."""
    folders = {"the cache of models": default_cache_dir(), "the model's folder": Path(config.model.name)}
    for sae in config.sae:
        if sae.path is not None:
            folders[f"the folder of the dictionary {sae.path.name}"] = sae.path
    return {what: folder for what, folder in folders.items() if folder.is_dir()}


@dataclass(frozen=True, slots=True)
class Computing:
    """Whoever runs batches, and what the loop has to know of the model that is run."""

    executor: LocalExecutor | RayExecutor
    tokenizer: Tokenizer
    max_batch_tokens: int


@contextlib.asynccontextmanager
async def computing(
    config: Config,
    *,
    device: DeviceThread,
    pause: Pause,
    patient: bool,
    stall_seconds: Callable[[], float],
    events: WorkerEvents,
    on_executor: Callable[[Executor], None],
    load: Callable[[Config], Compute] = load_compute,
) -> AsyncIterator[Computing]:
    """Choose who runs batches, and have the model loaded there. An executor is wired here.

    `on_executor` is given it as soon as it is there; one of workers waits then for the first that is ready.
    `load` is called on the device thread of this process, or of each worker. Raises ConfigError and
    MachineError.
    """
    if config.executor.kind == "local":
        compute = await device.call(lambda: load(config))
        local = LocalExecutor(device, compute.runner)
        on_executor(local)
        async with preparing(device, compute.preparations if patient else ()):
            yield Computing(local, compute.tokenizer, compute.max_batch_tokens)
        return
    cluster = cluster_of(config)
    from daemon.executor.crew import Crew
    from daemon.executor.ray import RayExecutor

    crew = Crew(
        cluster,
        loading_in_worker(config, load),
        pause=pause,
        patient=patient,
        stall_seconds=stall_seconds,
        events=events,
    )
    executor = RayExecutor(crew, events)
    on_executor(executor)
    async with crew.running() as ready:
        assert isinstance(ready.tokenizer, Tokenizer)
        yield Computing(executor, ready.tokenizer, ready.max_batch_tokens)


def cluster_of(config: Config) -> Cluster:
    """The Ray cluster that is configured, without a connection. Raises ConfigError where Ray is missing."""
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # read once: Ray writes no lines among ours
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # and starts no cluster that nobody asked for
    from daemon.executor.ray_cluster import Cluster

    settings = config.executor
    return Cluster(
        settings.address,
        workers=settings.workers,
        cpus=settings.worker_cpus,
        gpus=settings.worker_gpus,
        may_use_gpus=config.model.device != "cpu",
    )


def loading_in_worker(
    config: Config, load: Callable[[Config], Compute] = load_compute
) -> Callable[[bool], Compute]:
    """A function that loads the model in a worker, and measures the batch size where it is told to."""
    return partial(load_in_worker, load, anywhere(config), PRESETS)


async def with_settings(now: Computing, config: Config) -> Computing:
    """The same model and SAEs under changed settings."""
    await now.executor.restudy(study_settings(config))
    return dataclasses.replace(
        now, tokenizer=now.tokenizer.limited(config.batching.max_text_tokens, read_rules(config))
    )


def anywhere(config: Config) -> Config:
    """The configuration with paths that mean the same in whatever folder a process runs."""
    saes = tuple(
        sae if sae.path is None else sae.model_copy(update={"path": sae.path.absolute()})
        for sae in config.sae
    )
    name = config.model.name
    model = config.model.model_copy(
        update={"name": str(Path(name).absolute()) if Path(name).is_dir() else name}
    )
    return config.model_copy(update={"sae": saes, "model": model})


def load_in_worker(
    load: Callable[[Config], Compute], config: Config, presets: Path, measures: bool
) -> Compute:
    """Load the model in another process, where the bundled dictionaries may lie elsewhere than in `presets`.

    Unless it `measures`, an automatic number of tokens a batch is left at 0.
    """
    saes = tuple(
        sae.model_copy(update={"path": PRESETS / sae.path.relative_to(presets)})
        if sae.path is not None and sae.path.is_relative_to(presets)
        else sae
        for sae in config.sae
    )
    config = config.model_copy(update={"sae": saes})
    if measures or config.batching.max_batch_tokens != "auto":
        compute = load(config)
    else:
        fixed = config.batching.model_copy(update={"max_batch_tokens": 1})
        compute = load(config.model_copy(update={"batching": fixed}))
        compute = dataclasses.replace(compute, max_batch_tokens=0)
    prepare_all(compute.preparations)
    return compute


def part_bytes(config: Config) -> int:
    """How many bytes of raw records are a part, at most."""
    if config.analysis.positions != "all":
        return PART_BYTES
    return PART_BYTES_OF_RESIDUALS if config.outbox.residuals else PART_BYTES_OF_ALL


def read_limits(config: Config) -> ReadLimits:
    return ReadLimits(
        max_record_bytes=config.inbox.max_record_bytes,
        max_nesting=config.inbox.max_nesting,
        max_decompressed_bytes=config.inbox.max_decompressed_bytes,
        max_compression_ratio=config.inbox.max_compression_ratio,
        max_zstd_window_bytes=config.inbox.max_zstd_window_bytes,
        part_records=config.inbox.part_records,
        part_bytes=part_bytes(config),
    )


def layout_of(config: Config) -> Layout:
    return Layout(values=config.outbox.values, residuals=config.outbox.residuals, texts=config.outbox.texts)


def results_key(config: Config, info: ModelInfo) -> str:
    """Stands for everything besides the input's content that changes results, or how they are stored."""
    columns = stored_columns(info.names, config.recipes, layout_of(config), log_probs=info.log_probs)
    identity = {
        "analysis": ANALYSIS_VERSION,
        "stored": [PARTS_FORMAT, columns],
        "config": config.results_fingerprint(),
        "model": [info.weights_sha256 or info.name, info.settings_sha256],
        "saes": [sae.identity for sae in info.saes],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def input_names(config: Config) -> InputNames:
    """Which names in the inbox are inputs, and which sub-folders lensd made there."""
    inbox, outbox = config.inbox.path.absolute(), config.outbox.path.absolute()
    nested = outbox.relative_to(inbox).parts[:1] if outbox.is_relative_to(inbox) else ()
    return InputNames(config.inbox.ignore, folders=nested)


@dataclass(frozen=True, slots=True)
class Folders:
    """An open inbox and an open outbox."""

    inbox: Inbox
    outbox: Outbox
    removed: int  # folders of half-made results that dead processes had left


@contextlib.asynccontextmanager
async def open_folders(config: Config, pause: Pause) -> AsyncIterator[Folders]:
    """Open the inbox and the outbox, waiting out what the machine refuses for a while; close both."""
    inbox = Inbox(
        config.inbox.path,
        names=input_names(config),
        settle_seconds=config.inbox.settle_seconds,
        rescan_seconds=config.inbox.rescan_seconds,
        on_success=config.inbox.on_success,
        pause=pause,
    )
    outbox = Outbox(config.outbox.path)
    await pause.outlast(inbox.open, "start")
    try:
        removed = await pause.outlast(lambda: asyncio.to_thread(outbox.open), "start")
        yield Folders(inbox, outbox, removed)
    finally:
        await asyncio.to_thread(outbox.close)
        await inbox.close()


def report_maker() -> ReportMaker:
    return ReportMaker(plot_cache=default_cache_dir() / "matplotlib")


def pipeline_of(
    config: Config,
    now: Computing,
    folders: Folders,
    *,
    pause: Pause,
    observer: Observer,
) -> Pipeline:
    """A pipeline from the inbox through an executor to the outbox. A sink is wired here."""
    executor = now.executor
    return Pipeline(
        FolderSource(
            folders.inbox,
            recipes=config.recipes,
            limits=read_limits(config),
            results_key=results_key(config, executor.info),
            pause=pause,
        ),
        executor,
        FolderSink(
            folders.outbox,
            info=executor.info,
            layout=layout_of(config),
            settings=config.model_dump(mode="json"),
            pause=pause,
            reports=report_maker() if config.report.each_file else None,
        ),
        tokenizer=now.tokenizer,
        batcher=Batcher(
            now.max_batch_tokens,
            config.batching.max_batch_samples,
            shares_prefixes=executor.shares_prefixes,
        ),
        observer=observer,
        limits=Limits(
            queued_text_bytes=QUEUED_TEXT_BYTES,
            queued_tokens=config.batching.window_tokens,
            queued_result_bytes=QUEUED_RESULT_BYTES,
            max_attempts=config.inbox.max_attempts,
        ),
    )
