"""Builds the engine, the study and the tokenizer that a configuration asks for.

The one place that knows both the configuration and the constructors of the compute stage. Importing it
imports torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import torch

from daemon.analysis.study import StudySettings
from daemon.compute.device import Study
from daemon.compute.loading import load_model, load_tokenizer, locate_model, resolve_device
from daemon.compute.padded import PaddedEngine
from daemon.compute.sae import load_saes
from daemon.compute.smollm2 import default_cache_dir
from daemon.config import Config
from daemon.intake.reader import ReadLimits
from daemon.intake.tokenizer import Tokenizer

QUEUED_TEXT_BYTES = 16 << 20
QUEUED_RESULT_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Compute:
    """What the device and its feeder need, ready to run."""

    engine: PaddedEngine
    study: Study
    tokenizer: Tokenizer


def load_compute(config: Config) -> Compute:
    """Load the model, the SAEs and the tokenizer; call it on the device thread (it takes seconds).

    Raises ConfigError where something can't be found or does not fit together.
    """
    device = resolve_device(config.model.device)
    dtype = getattr(torch, config.model.dtype)
    location = locate_model(config.model.name, default_cache_dir())
    model = load_model(location, device=device, dtype=dtype)
    saes = load_saes(
        config.sae,
        d_model=model.d_model,
        n_layers=model.n_layers,
        device=device,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    engine = PaddedEngine(model, saes)
    tokenizer = Tokenizer(
        load_tokenizer(location),
        prepend_bos=saes[0].prepend_bos,
        max_text_tokens=config.batching.max_text_tokens,
    )
    return Compute(engine=engine, study=Study(engine, study_settings(config)), tokenizer=tokenizer)


def study_settings(config: Config) -> StudySettings:
    return StudySettings(**config.analysis.model_dump())


def read_limits(config: Config) -> ReadLimits:
    return ReadLimits(
        max_record_bytes=config.inbox.max_record_bytes,
        max_nesting=config.inbox.max_nesting,
        max_decompressed_bytes=config.inbox.max_decompressed_bytes,
        max_compression_ratio=config.inbox.max_compression_ratio,
        part_records=config.inbox.part_records,
    )


def results_key(config: Config, engine: PaddedEngine) -> str:
    """Stands for everything besides the input's content that changes results."""
    info = engine.info
    identity = {
        "config": config.results_fingerprint(),
        "model": info.weights_sha256 or info.name,
        "saes": [dataclasses.astuple(sae) for sae in info.saes],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
