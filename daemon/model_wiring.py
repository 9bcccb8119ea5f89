"""Loads what a configuration names: the model, its dictionaries and its tokenizer, ready to run.

Knows no folders, files or pipelines. Importing it imports torch.
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
import torch

from daemon.analysis.column_inputs import StudySettings
from daemon.bos import puts_bos
from daemon.config import Config
from daemon.devices import exact_device
from daemon.errors import ConfigError
from daemon.executor.autotune import auto_batch_tokens
from daemon.executor.preparing import Pieces
from daemon.executor.runner import BatchRunner
from daemon.model.attention_check import attention_is_replaceable
from daemon.model.buffers import keep_memory, lasting
from daemon.model.compiled_layers import can_compile
from daemon.model.device_check import check_device
from daemon.model.dictionary_stamps import DictionaryStamps
from daemon.model.encoding import Encoder, FusedEncoder, NormalisingEncoder, encoder_of
from daemon.model.engine import Engine
from daemon.model.failures import explained
from daemon.model.hub import Hub
from daemon.model.loading import LoadedModel, check_weights, load_model, resolve_device
from daemon.model.location import ModelLocation, locate_model
from daemon.model.model_stamps import ModelStamps
from daemon.model.padded_engine import PaddedEngine
from daemon.model.placement import asked_map
from daemon.model.sae import LoadedSae, last_layer_read, load_saes, move_saes
from daemon.model.sae_names import check_columns
from daemon.model.smollm2 import default_cache_dir
from daemon.model.stamps import Stamps
from daemon.model.trie_engine import CannotPack, TrieEngine
from daemon.model.unembedding import Unembedding, UnknownEnd, unembedding_of
from daemon.model_info import SaeInfo, compute_devices
from daemon.native.library import NAME, library
from daemon.source.counting import ReadRules
from daemon.source.tokenizer import Tokenizer

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Compute:
    """The model's side, ready to run."""

    engine: Engine
    runner: BatchRunner
    tokenizer: Tokenizer
    max_batch_tokens: int
    preparations: Pieces = ()  # that make later batches faster


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
        tokenizer=tokenizer_of(model, config, engine.info.saes),
        max_batch_tokens=max_batch_tokens,
        preparations=engine.preparations,
    )


def tokenizer_of(model: LoadedModel, config: Config, saes: Sequence[SaeInfo]) -> Tokenizer:
    ways = {sae.prepend_bos for sae in saes}
    return Tokenizer(
        model.tokenizer,
        prepend_bos=True in ways,
        both_ways=len(ways) > 1,
        max_text_tokens=config.batching.max_text_tokens,
        context=model.context,
        vocabulary=model.vocabulary,
        rules=read_rules(config),
    )


def read_rules(config: Config) -> ReadRules:
    return ReadRules(
        config.analysis.tokens,
        config.batching.long_texts,
        skips_bos=config.analysis.positions != "last",
        keeps_texts=config.outbox.texts,
    )


def load_parts(
    config: Config, hub: Hub | None = None, location: ModelLocation | None = None, *, stamped: bool = True
) -> tuple[LoadedModel, tuple[LoadedSae, ...]]:
    """The model and its dictionaries, their weights accepted. Raises ConfigError or MachineError.

    Dictionaries that a stamp vouches for have no methods of SAELens; without `stamped` all have them.
    """
    hub = hub or Hub()
    model = load_bare_model(config, hub, location)
    saes = load_dictionaries(config, model, hub, dictionary_stamps(model) if stamped else None)
    accept_together(model, saes, log_probs=config.analysis.log_probs)
    return model, saes


def load_dictionaries(
    config: Config, model: LoadedModel, hub: Hub, stamps: DictionaryStamps | None
) -> tuple[LoadedSae, ...]:
    saes = load_saes(
        config.sae,
        hub=hub,
        d_model=model.d_model,
        n_layers=model.n_layers,
        device=exact_device(model.device) if model.placement is None else "cpu",
        dtype=sae_dtype(model),
        bos_habit=lambda: puts_bos(model.tokenizer),
        stamps=stamps,
    )
    names = [entry.info.name for entry in saes]
    check_columns(names, config.recipes, log_probs=config.analysis.log_probs)
    return saes


def sae_dtype(model: LoadedModel) -> torch.dtype:
    return torch.float64 if model.dtype == torch.float64 else torch.float32


def dictionary_stamps(model: LoadedModel) -> DictionaryStamps | None:
    """The stamps of a model's dictionaries; None where these are not encoded on the host alone."""
    if model.devices != "cpu":
        return None
    return DictionaryStamps(Stamps(default_cache_dir() / "dictionaries"), sae_dtype(model), model.dtype)


def encoders_of(model: LoadedModel, saes: Sequence[LoadedSae]) -> list[Encoder]:
    """The encoder of each dictionary; remembers those that agreed with SAELens's."""
    device = model.device if model.placement is None else None  # else that of each dictionary
    encoders = [encoder_of(entry, model.dtype, device) for entry in saes]
    if (stamps := dictionary_stamps(model)) is not None:
        for entry, encoder in zip(saes, encoders, strict=True):
            if entry.origin is not None and isinstance(encoder, FusedEncoder | NormalisingEncoder):
                stamps.remember(entry.sae, entry.origin)
    return encoders


def row_stamps() -> Stamps:
    """The stamps of numbers of rows with which products give the same bits."""
    return Stamps(default_cache_dir() / "row-sizes")


def load_bare_model(config: Config, hub: Hub, location: ModelLocation | None = None) -> LoadedModel:
    dtype = getattr(torch, config.model.dtype)
    device = resolve_device(config.model.device, dtype)
    location = location or located(config, hub)
    return load_model(location, device=device, dtype=dtype, device_map=asked_map(config.model.device_map))


def located(config: Config, hub: Hub) -> ModelLocation:
    return locate_model(config.model.name, default_cache_dir(), config.model.revision, hub)


def model_stamps(config: Config) -> ModelStamps | None:
    """The stamps of models; None where the configuration needs Transformers' own modules."""
    model = config.model
    if (
        model.dtype != "float32"
        or resolve_device(model.device, torch.float32) != "cpu"
        or asked_map(model.device_map) is not None
        or config.analysis.log_probs
    ):
        return None
    saes = [[str(sae.path), sae.release, sae.id, sae.revision] for sae in config.sae]
    return ModelStamps(Stamps(default_cache_dir() / "vouched-models"), {"name": model.name, "saes": saes})


def vouched_engine(
    config: Config, hub: Hub, location: ModelLocation, stamps: ModelStamps
) -> tuple[Engine, LoadedModel] | None:
    """The engine of a model that a stamp vouches for; None without a stamp that holds.

    Raises ConfigError or MachineError where the dictionaries can't be loaded.
    """
    known = stamps.find(location)
    if known is None:
        return None
    model = known.model
    saes = load_dictionaries(config, model, hub, dictionary_stamps(model))
    encoders = encoders_of(model, saes)
    try:
        engine = TrieEngine(model, saes, encoders, config.analysis.positions, probed=known.probed)
        engine.settle(model, row_stamps())
        return engine, model
    except CannotPack as error:
        log.info("model.loaded_again", model=location.name, reason=str(error))
        return None


def accept_together(model: LoadedModel, saes: Sequence[LoadedSae], *, log_probs: bool = False) -> None:
    """Put dictionaries where their layers are, and check as much of the model as is run."""
    if model.placement is not None:
        log.info("model.spread", devices=model.devices, layers=dict(Counter(model.placement.held)))
        move_saes(saes, model.placement)
    hooks = [hook for entry in saes for hook in entry.hook_names]
    if log_probs:
        hooks.append(f"blocks.{model.n_layers - 1}.hook_resid_post")
    check_weights(model, model.n_layers - 1 if log_probs else last_layer_read(saes), to_logits=log_probs)
    check_device(model, list(dict.fromkeys(hooks)))


def end_of(model: LoadedModel, *, log_probs: bool) -> Unembedding | None:
    """The end of a model that is to predict tokens. Raises ConfigError where it can't be had rightly."""
    if not log_probs:
        return None
    try:
        return unembedding_of(model.model)
    except UnknownEnd as error:
        raise ConfigError(
            f"model {model.location.name}: log-probabilities can't be computed rightly ({error}): set"
            " analysis.log_probs to false"
        ) from error


def load_engine(config: Config) -> tuple[Engine, LoadedModel]:
    """The packed engine; the padded one where the model can't be packed. With the model that it runs.

    Raises ConfigError or MachineError.
    """
    with explained(f"model {config.model.name}"):
        return try_engines(config)


def try_engines(config: Config) -> tuple[Engine, LoadedModel]:
    hub = Hub()
    location, stamps = located(config, hub), model_stamps(config)
    if stamps is not None and (vouched := vouched_engine(config, hub, location, stamps)) is not None:
        return vouched
    model, saes = load_parts(config, hub, location)
    encoders = encoders_of(model, saes)
    positions, log_probs = config.analysis.positions, config.analysis.log_probs
    end = end_of(model, log_probs=log_probs)
    if (last_layer_read(saes) >= 0 or log_probs) and not attention_is_replaceable(model):
        log.warning("engine.padded", model=model.location.name, reason="its attention can't be replaced")
        return PaddedEngine(model, saes, encoders, positions, unembedding=end), model
    try:
        compiles = config.model.compile == "auto" and can_compile(model.device)
        if compiles:  # and finds it again at the next start
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(default_cache_dir() / "inductor"))
        engine = TrieEngine(model, saes, encoders, positions, compiles=compiles, unembedding=end)
        engine.settle(model, row_stamps())
        if stamps is not None:
            engine.remember(model, stamps)
        return engine, model
    except CannotPack as error:
        log.warning("engine.padded", model=model.location.name, reason=str(error))
        changed = error.model_changed
    if changed:
        del model, end  # before there is a second one
        gc.collect()  # modules that are hooked hold themselves
        model = load_bare_model(config, hub)
        accept_together(model, saes, log_probs=log_probs)
        end = end_of(model, log_probs=log_probs)
    return PaddedEngine(model, saes, encoders, positions, unembedding=end), model


def study_settings(config: Config) -> StudySettings:
    analysis = config.analysis.model_dump(exclude={"tokens", "log_probs"})
    return StudySettings(**analysis, residuals=config.outbox.residuals)
