"""Builds what a configuration asks for: the model's side at the start, then pipelines between two folders.

The one place that knows both the configuration and the constructors. Importing it imports torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import torch

from daemon.analysis.column_inputs import StudySettings
from daemon.analysis.columns import ANALYSIS_VERSION
from daemon.batching.batcher import Batcher
from daemon.config import PRESETS, Config
from daemon.devices import exact_device
from daemon.executor.autotune import auto_batch_tokens
from daemon.executor.device_thread import DeviceThread
from daemon.executor.local import LocalExecutor
from daemon.executor.runner import BatchRunner
from daemon.model.buffers import keep_memory, lasting
from daemon.model.compiled_layers import can_compile
from daemon.model.device_check import check_device
from daemon.model.encoding import encoder_of
from daemon.model.engine import Engine
from daemon.model.failures import explained
from daemon.model.loading import LoadedModel, check_weights, load_model, locate_model, resolve_device
from daemon.model.padded_engine import PaddedEngine
from daemon.model.placement import asked_map
from daemon.model.sae import LoadedSae, last_layer_read, load_saes, move_saes
from daemon.model.smollm2 import default_cache_dir
from daemon.model.trie_engine import CannotPack, TrieEngine
from daemon.model_info import ModelInfo, compute_devices
from daemon.native.library import NAME, library
from daemon.pause import Pause
from daemon.pipeline import Limits, Pipeline
from daemon.ports import Executor, Observer
from daemon.recipes import BUILT_IN_RECIPES
from daemon.sink.folder import FolderSink
from daemon.sink.outbox import Outbox
from daemon.sink.parts import FORMAT as PARTS_FORMAT
from daemon.sink.schema import stored_columns
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


@dataclass(frozen=True, slots=True)
class Compute:
    """The model's side, ready to run."""

    engine: Engine
    runner: BatchRunner
    tokenizer: Tokenizer
    max_batch_tokens: int


def folders_of_use(config: Config) -> dict[str, Path]:
    """Folders that hold what a run reads, by what they are: none of them can be the inbox."""
    folders = {"the cache of models": default_cache_dir(), "the model's folder": Path(config.model.name)}
    for sae in config.sae:
        if sae.path is not None:
            folders[f"the folder of the dictionary {sae.path.name}"] = sae.path
    return {what: folder for what, folder in folders.items() if folder.is_dir()}


def load_compute(config: Config) -> Compute:
    """Load the model, the SAEs and the tokenizer; call it on the device thread (it takes seconds).

    Raises ConfigError where something can't be found or does not fit together.
    """
    keep_memory()
    with lasting():
        engine, model = load_engine(config)
        runner = BatchRunner(engine, study_settings(config))
    hosts = map(exact_device, compute_devices(engine.info.device))
    if set(hosts) == {"cpu"} and library() is None:
        log.warning(
            "code.not_compiled", missing=[NAME], message="installed without a C compiler: runs slower"
        )
    max_batch_tokens = config.batching.max_batch_tokens
    if max_batch_tokens == "auto":
        max_batch_tokens = auto_batch_tokens(
            engine, model.vocabulary, default_cache_dir(), small=config.executor.kind != "local"
        )
    return Compute(
        engine=engine,
        runner=runner,
        tokenizer=tokenizer_of(model, config, prepend_bos=engine.prepend_bos),
        max_batch_tokens=max_batch_tokens,
    )


def tokenizer_of(model: LoadedModel, config: Config, *, prepend_bos: bool) -> Tokenizer:
    return Tokenizer(
        model.tokenizer,
        prepend_bos=prepend_bos,
        max_text_tokens=config.batching.max_text_tokens,
        context=model.context,
        vocabulary=model.vocabulary,
    )


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
    return dataclasses.replace(now, tokenizer=now.tokenizer.limited(config.batching.max_text_tokens))


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
        return load(config)
    fixed = config.batching.model_copy(update={"max_batch_tokens": 1})
    compute = load(config.model_copy(update={"batching": fixed}))
    return dataclasses.replace(compute, max_batch_tokens=0)


def load_parts(config: Config) -> tuple[LoadedModel, tuple[LoadedSae, ...]]:
    """The model and its dictionaries, their weights accepted. Raises ConfigError or MachineError."""
    dtype = getattr(torch, config.model.dtype)
    device = resolve_device(config.model.device, dtype)
    location = locate_model(config.model.name, default_cache_dir())
    device_map = asked_map(config.model.device_map)
    model = load_model(location, device=device, dtype=dtype, device_map=device_map)
    saes = load_saes(
        config.sae,
        d_model=model.d_model,
        n_layers=model.n_layers,
        device=exact_device(model.device) if model.placement is None else "cpu",
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    if model.placement is not None:
        log.info("model.spread", devices=model.devices, layers=dict(Counter(model.placement.held)))
        move_saes(saes, model.placement)
    check_weights(model, last_layer_read(saes))
    check_device(model, list(dict.fromkeys(hook for entry in saes for hook in entry.hook_names)))
    return model, saes


def load_engine(config: Config) -> tuple[Engine, LoadedModel]:
    """The packed engine; the padded one where the model can't be packed. With the model that it runs.

    Raises ConfigError or MachineError.
    """
    with explained(f"model {config.model.name}"):
        return try_engines(config)


def try_engines(config: Config) -> tuple[Engine, LoadedModel]:
    model, saes = load_parts(config)
    device = model.device if model.placement is None else None  # else that of each dictionary
    encoders = [encoder_of(entry, model.dtype, device) for entry in saes]
    positions = config.analysis.positions
    try:
        compiles = config.model.compile == "auto" and can_compile(model.device)
        if compiles:  # and finds it again at the next start
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_cache_dir() / "inductor"))
        return TrieEngine(model, saes, encoders, positions, compiles=compiles), model
    except CannotPack as error:
        log.warning("engine.padded", model=model.location.name, reason=str(error))
        changed = error.model_changed
    if changed:
        del model  # before there is a second one
        gc.collect()  # modules that are hooked hold themselves
        model, saes = load_parts(config)
    return PaddedEngine(model, saes, encoders, positions), model


def study_settings(config: Config) -> StudySettings:
    return StudySettings(**config.analysis.model_dump())


def read_limits(config: Config) -> ReadLimits:
    return ReadLimits(
        max_record_bytes=config.inbox.max_record_bytes,
        max_nesting=config.inbox.max_nesting,
        max_decompressed_bytes=config.inbox.max_decompressed_bytes,
        max_compression_ratio=config.inbox.max_compression_ratio,
        max_zstd_window_bytes=config.inbox.max_zstd_window_bytes,
        part_records=config.inbox.part_records,
        part_bytes=PART_BYTES_OF_ALL if config.analysis.positions == "all" else PART_BYTES,
    )


def results_key(config: Config, info: ModelInfo) -> str:
    """Stands for everything besides the input's content that changes results, or how they are stored."""
    recipes = BUILT_IN_RECIPES if config.recipe is None else (config.recipe,)
    identity = {
        "analysis": ANALYSIS_VERSION,
        "stored": [PARTS_FORMAT, stored_columns(info.layers, recipes, config.outbox.values)],
        "config": config.results_fingerprint(),
        "model": [info.weights_sha256 or info.name, info.settings_sha256],
        "saes": [dataclasses.astuple(sae) for sae in info.saes],
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
            recipe=config.recipe,
            limits=read_limits(config),
            results_key=results_key(config, executor.info),
            pause=pause,
        ),
        executor,
        FolderSink(
            folders.outbox,
            info=executor.info,
            values=config.outbox.values,
            settings=config.model_dump(mode="json"),
            pause=pause,
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
