"""Builds the engine, the study and the tokenizer that a configuration asks for.

The one place that knows both the configuration and the constructors of the compute stage. Importing it
imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch

from daemon.analysis.study import StudySettings
from daemon.columns import ANALYSIS_VERSION
from daemon.compute.autotune import auto_batch_tokens
from daemon.compute.buffers import keep_memory, lasting
from daemon.compute.device import Study
from daemon.compute.encoding import encoder_of
from daemon.compute.engine import Engine
from daemon.compute.failures import explained
from daemon.compute.fused import can_fuse
from daemon.compute.loading import LoadedModel, check_weights, load_model, locate_model, resolve_device
from daemon.compute.packed import CannotPack, PackedEngine
from daemon.compute.padded import PaddedEngine
from daemon.compute.sae import LoadedSae, last_layer_read, load_saes
from daemon.compute.smollm2 import default_cache_dir
from daemon.config import Config
from daemon.intake.reader import ReadLimits
from daemon.intake.tokenizer import Tokenizer
from daemon.libraries import LIBRARIES, library

log = structlog.get_logger()

QUEUED_TEXT_BYTES = 16 << 20
QUEUED_RESULT_BYTES = 64 << 20
PART_BYTES = 4 << 20  # of raw records; a part's results are held in memory until it is whole
PART_BYTES_OF_ALL = 64 << 10  # where every token is stored: its features weigh hundreds of times as much


@dataclass(frozen=True, slots=True)
class Compute:
    """What the device and its feeder need, ready to run."""

    engine: Engine
    study: Study
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
        study = Study(engine, study_settings(config))
    if engine.info.device == "cpu" and (missing := [name for name in LIBRARIES if library(name) is None]):
        log.warning(
            "code.not_compiled", missing=missing, message="installed without a C compiler: runs slower"
        )
    max_batch_tokens = config.batching.max_batch_tokens
    if max_batch_tokens == "auto":
        max_batch_tokens = auto_batch_tokens(engine, model.vocabulary, default_cache_dir())
    return Compute(
        engine=engine,
        study=study,
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


def with_settings(compute: Compute, config: Config) -> Compute:
    """The same model and SAEs under changed settings; call it on the device thread."""
    with lasting():
        study = Study(compute.engine, study_settings(config))
    return dataclasses.replace(
        compute,
        study=study,
        tokenizer=compute.tokenizer.limited(config.batching.max_text_tokens),
    )


def load_parts(config: Config) -> tuple[LoadedModel, tuple[LoadedSae, ...]]:
    """The model and its dictionaries, their weights accepted. Raises ConfigError or MachineError."""
    device = resolve_device(config.model.device)
    dtype = getattr(torch, config.model.dtype)
    model = load_model(locate_model(config.model.name, default_cache_dir()), device=device, dtype=dtype)
    saes = load_saes(
        config.sae,
        d_model=model.d_model,
        n_layers=model.n_layers,
        device=device,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    check_weights(model, last_layer_read(saes))
    return model, saes


def load_engine(config: Config) -> tuple[Engine, LoadedModel]:
    """The packed engine; the padded one where the model can't be packed. With the model that it runs.

    Raises ConfigError or MachineError.
    """
    with explained(f"model {config.model.name}"):
        return try_engines(config)


def try_engines(config: Config) -> tuple[Engine, LoadedModel]:
    model, saes = load_parts(config)
    encoders = [encoder_of(entry, model.dtype) for entry in saes]
    positions = config.analysis.positions
    try:
        compiles = config.model.compile == "auto" and can_fuse(model.device)
        if compiles:  # and finds it again at the next start
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_cache_dir() / "inductor"))
        return PackedEngine(model, saes, encoders, positions, compiles=compiles), model
    except CannotPack as error:
        log.warning("engine.padded", model=model.location.name, reason=str(error))
        changed = error.model_changed
    if changed:
        del model  # before there is a second one
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


def results_key(config: Config, engine: Engine) -> str:
    """Stands for everything besides the input's content that changes results."""
    info = engine.info
    identity = {
        "analysis": ANALYSIS_VERSION,
        "config": config.results_fingerprint(),
        "model": [info.weights_sha256 or info.name, info.settings_sha256],
        "saes": [dataclasses.astuple(sae) for sae in info.saes],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
