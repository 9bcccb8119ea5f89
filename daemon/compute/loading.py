"""Resolves a model's name to weights, a tokenizer and a Hugging Face module. Knows nothing about SAEs."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from daemon.compute.pickles import refused_pickles
from daemon.compute.sae import first_line
from daemon.compute.smollm2 import WEIGHTS_SHA256, sha256_of, smollm2_folder
from daemon.errors import ConfigError
from daemon.records import ModelInfo, SaeInfo

BUNDLED = "smollm2-135m"
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # rotary embeddings that turn by the longest text


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model's files are: `target` is what `from_pretrained` takes."""

    name: str  # as shown to people
    target: str
    weights_sha256: str | None  # None for a hub's model


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A bare Hugging Face causal language model, and what is known of it."""

    model: Any  # transformers.PreTrainedModel
    tokenizer: Any
    location: ModelLocation
    architecture: str
    d_model: int
    n_layers: int
    vocabulary: int  # token ids are below it
    context: int | None  # tokens of a text, at most; None where it reads any number
    dtype: torch.dtype
    device: str


def locate_model(name: str, cache_dir: Path) -> ModelLocation:
    """A bundled preset, a local folder, or a TransformerLens or Hugging Face name, in this order.

    Raises ConfigError where a path is named that holds no model.
    """
    if name == BUNDLED:
        return ModelLocation(name, str(smollm2_folder(cache_dir)), WEIGHTS_SHA256)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ConfigError(f"model {name}: no config.json there: give a folder in Hugging Face format")
        return ModelLocation(folder.resolve().name, str(folder), folder_sha256(folder))
    if name.startswith((".", "/", "~")):
        raise ConfigError(f"model {name}: no such folder")
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        official = get_official_model_name(name)
    except ValueError:  # not one of TransformerLens's names: take it as Hugging Face's
        official = name
    return ModelLocation(name, official, None)


def folder_sha256(folder: Path) -> str:
    """One hash over the weight files of a local model."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"model {folder}: no .safetensors there, and lensd loads no pickled weights (.bin, .pt):"
            " convert them where that does no harm (from_pretrained, then save_pretrained)"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def resolve_device(device: str) -> str:
    """`auto` is the first CUDA device if there is one. Raises ConfigError for one that is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"model.device = {device!r}: {first_line(error)}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {device!r}: no CUDA device here: use auto or cpu")
    return device


def load_tokenizer(location: ModelLocation) -> Any:
    """A fast Hugging Face tokenizer. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(location.target, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(unreachable(location, error)) from error
    if not tokenizer.is_fast:
        raise ConfigError(f"model {location.name}: has no fast tokenizer")
    return tokenizer


def load_model(location: ModelLocation, *, device: str, dtype: torch.dtype) -> LoadedModel:
    """The model as Hugging Face has it, in evaluation mode. Raises ConfigError where it can't be had."""
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    try:
        with warnings.catch_warnings(), refused_pickles(f"model {location.name}"):
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(
                location.target,
                dtype=dtype,
                attn_implementation="eager",
                use_safetensors=True,
                trust_remote_code=False,
            ).to(device)
    except (OSError, ValueError) as error:
        raise ConfigError(unreachable(location, error)) from error
    model.requires_grad_(False).eval()
    config = model.config.get_text_config()
    return LoadedModel(
        model=model,
        tokenizer=load_tokenizer(location),
        location=location,
        architecture=type(model).__name__,
        d_model=int(config.hidden_size),
        n_layers=int(config.num_hidden_layers),
        vocabulary=int(config.vocab_size),
        context=context_of(config),
        dtype=dtype,
        device=device,
    )


def context_of(config: Any) -> int | None:
    """How long a text a model of this Hugging Face configuration reads, whatever texts are beside it.

    That is the positions it knows; less where rotary embeddings turn otherwise from some length on, that of
    the longest text beside.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(of_type for of_type in rope.values() if isinstance(of_type, dict))]  # of layers
    turning = [kind for kind in kinds if kind.get("rope_type") in LENGTH_DEPENDENT_ROPE]
    lengths = [kind.get("original_max_position_embeddings") for kind in turning]
    lengths.append(getattr(config, "max_position_embeddings", None))
    return min((int(length) for length in lengths if length), default=None)


def model_info(model: LoadedModel, saes: Sequence[SaeInfo], engine: str) -> ModelInfo:
    """What is said of a loaded model."""
    return ModelInfo(
        name=model.location.name,
        architecture=model.architecture,
        d_model=model.d_model,
        n_layers=model.n_layers,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.device,
        engine=engine,
        weights_sha256=model.location.weights_sha256,
        saes=tuple(saes),
    )


def bridge_of(model: LoadedModel) -> Any:
    """The model behind TransformerLens's hook names. It takes the module's parts over: use one or the other.

    Raises ConfigError for a family that TransformerLens does not know.
    """
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bridge = TransformerBridge.boot_transformers(
                model.location.target, hf_model=model.model, tokenizer=model.tokenizer, dtype=model.dtype
            )
    except (OSError, ValueError) as error:
        raise ConfigError(unreachable(model.location, error)) from error
    return bridge.requires_grad_(False).eval()


def quiet_libraries() -> None:
    """Keep to errors: what a user needs to know of a failed download is said in one line at its end."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)


def unreachable(location: ModelLocation, error: BaseException) -> str:
    return (
        f"model {location.name}: can't be loaded ({first_line(error)}): check model.name and the network,"
        " or give a local folder in Hugging Face format"
    )
