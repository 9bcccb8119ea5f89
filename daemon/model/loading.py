"""Makes a Hugging Face module and a tokenizer of a model's files. Knows nothing about SAEs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from daemon.bos import bos_of
from daemon.devices import best_device, on_mps
from daemon.errors import ConfigError, MachineError
from daemon.model.auto_class import auto_class
from daemon.model.completeness import LayersRead, LoadReport, check_complete, check_model_finite
from daemon.model.failures import explain, explained_names, loading, quiet_libraries, sense
from daemon.model.location import ModelLocation, check_types, fetch_weights
from daemon.model.pickles import refused_pickles
from daemon.model.placement import DeviceMap, Placement, free_memory, tokens_device
from daemon.model.quantized import check_packages
from daemon.model.weightfiles import model_tensors
from daemon.model_info import Fit, ModelInfo, SaeInfo

NO_SETTINGS = {"_name_or_path", "transformers_version"}  # of a configuration: they change no result
LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}  # rotary embeddings that turn by the longest text
MOST_PARTS = 100_000  # layers, heads or experts that a configuration may ask for: building more takes hours
COUNTS = re.compile(r"n_layers?|n_heads?|(?:num|n)_\w*(?:layers|heads|experts|blocks)")
PROBE = "One text, 2 words\n"  # that every tokenizer is to encode


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
    device: str  # takes the tokens
    report: LoadReport = field(default_factory=LoadReport)  # how its checkpoint fits: see `check_weights`
    settings_sha256: str = ""  # of its configuration, its tokenizer and, of a hub's, its commit
    placement: Placement | None = None  # where it is spread over several devices

    @property
    def bos(self) -> int | None:
        """The token at the beginning of texts, where there is one."""
        return bos_of(self.tokenizer)

    @property
    def devices(self) -> str:
        """As `ModelInfo.device` names them."""
        return self.device if self.placement is None else self.placement.name


def resolve_device(device: str, dtype: torch.dtype = torch.float32) -> str:
    """`auto` is the first of CUDA, MPS and CPU that is there and has the dtype.

    Raises ConfigError for a device that is not there, or that does not have the dtype.
    """
    if device == "auto":
        return best_device(dtype)
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"model.device = {device!r}: {sense(error)}") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"model.device = {device!r}: no CUDA device here: use auto or cpu")
    if kind == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(f"model.device = {device!r}: no MPS device here: use auto or cpu")
        if dtype == torch.float64:
            raise ConfigError(
                f"model.device = {device!r}: MPS has no float64: set model.dtype to float32,"
                " or model.device to cpu"
            )
        return "mps"  # there is one
    return device


def load_tokenizer(location: ModelLocation) -> Any:
    """A fast Hugging Face tokenizer. Raises ConfigError, or MachineError where the hub fails."""
    from transformers import AutoTokenizer

    what = f"model {location.name}: its tokenizer"
    with loading(what):
        tokenizer = AutoTokenizer.from_pretrained(location.target, trust_remote_code=False)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"model {location.name}: has no fast tokenizer: add a tokenizer.json (convert it by"
                " transformers.convert_slow_tokenizer, then save_pretrained)"
            )
        special = set(tokenizer.all_special_tokens)
        if not any(token not in special for token in tokenizer.get_vocab()):
            raise ConfigError(
                f"model {location.name}: its tokenizer has no vocabulary:"
                " add the tokenizer.json that belongs to it"
            )
        tokenizer.backend_tokenizer.encode_batch_fast([PROBE], add_special_tokens=False)
    return tokenizer


def load_model(
    location: ModelLocation, *, device: str, dtype: torch.dtype, device_map: DeviceMap | None = None
) -> LoadedModel:
    """The model as Hugging Face has it, in evaluation mode; `check_weights` is to accept its weights.

    It is on `device`, or where a `device_map` has its parts. Raises ConfigError where it can't be had,
    MachineError where hub or memory do not allow it for now.
    """
    quiet_libraries()
    what = f"model {location.name}"
    with loading(what), refused_pickles(what):
        model, report = build_model(location, device, dtype, what, device_map)
        placement = None
        if device_map is None:
            model = model.to(device)
        else:
            placement = Placement.of(model)
            device = str(tokens_device(model))
        model.requires_grad_(False).eval()
        tokenizer = load_tokenizer(location)
        if location.snapshot is not None:
            location.snapshot.remember()
        config = model.config.get_text_config()
        return LoadedModel(
            model=model,
            tokenizer=tokenizer,
            location=location,
            architecture=type(model).__name__,
            d_model=int(config.hidden_size),
            n_layers=int(config.num_hidden_layers),
            vocabulary=int(model.get_input_embeddings().weight.shape[0]),
            context=context_of(config),
            dtype=dtype,
            device=device,
            report=report,
            settings_sha256=settings_sha256(model.config, tokenizer, location.commit),
            placement=placement,
        )


def build_model(
    location: ModelLocation, device: str, dtype: torch.dtype, what: str, device_map: DeviceMap | None
) -> tuple[Any, LoadReport]:
    """The Hugging Face module, still on the host unless it is spread, and how its weights fit it.

    Raises what a library throws.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(location.target, trust_remote_code=False)
    check_config(config, what)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if location.snapshot is not None:
        fetch_weights(location.snapshot, what)
        if not is_quantized:
            check_types(model_tensors(Path(location.target), what), what)
    options: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": "eager",
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    if dtype == torch.float64 or on_mps(device):  # grouped products of experts know neither
        options["experts_implementation"] = "eager"
    with explained_names(config, what):
        if not is_quantized:
            check_shapes(location, auto_class(config), options, what)
        if device_map == "auto":
            options["max_memory"] = free_memory()
        model, info = auto_class(config).from_pretrained(
            location.target, output_loading_info=True, device_map=device_map, **options
        )
    return model, LoadReport.of(info)


def settings_sha256(config: Any, tokenizer: Any, commit: str | None) -> str:
    """Hash of what besides weights makes a model's results: configuration, tokenizer and a hub's commit."""
    settings = {key: value for key, value in config.to_dict().items() if key not in NO_SETTINGS}
    special = tokenizer.bos_token_id, tokenizer.eos_token_id
    told = [settings, tokenizer.backend_tokenizer.to_str(), special, commit, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def check_config(config: Any, what: str) -> None:
    """Raises ConfigError for a configuration that can't be built here, before much is spent on it."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        check_packages(quantization, what)
    if name := unsound(config.to_dict()):
        raise ConfigError(f"{what}: {name} in its config.json is NaN: correct it")
    text = config.get_text_config()
    for name, value in vars(text).items():
        if COUNTS.fullmatch(name) and isinstance(value, int) and not 0 <= value <= MOST_PARTS:
            raise ConfigError(
                f"{what}: {name} = {value} in its config.json: no model has as many: correct it"
            )
    if int(getattr(text, "num_hidden_layers", 1)) < 1:
        raise ConfigError(
            f"{what}: num_hidden_layers = {text.num_hidden_layers} in its config.json: nothing to read"
        )
    if (context := context_of(text)) is not None and context < 1:
        raise ConfigError(f"{what}: max_position_embeddings = {context} in its config.json: correct it")


def unsound(settings: Mapping[str, Any]) -> str | None:
    """The first setting, at any depth, that is NaN, which JSON does not have and Python reads."""
    for name, value in settings.items():
        if isinstance(value, float) and math.isnan(value):
            return str(name)
        if isinstance(value, Mapping) and (inner := unsound(value)):
            return f"{name}.{inner}"
    return None


def check_shapes(location: ModelLocation, kind: Any, options: dict[str, Any], what: str) -> None:
    """Raises ConfigError where a tensor's shape is not the model's; without memory for either."""
    model, info = kind.from_pretrained(
        location.target, device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True, **options
    )
    if wrong := {name: (tuple(has), tuple(wants)) for name, has, wants in info["mismatched_keys"]}:
        name, (has, wants) = sorted(wrong.items())[0]
        raise ConfigError(
            f"{what}: config.json and weights do not belong together: {name} is {has}, where the"
            f" configuration asks for {wants}{f' (and {len(wrong) - 1} more)' if len(wrong) > 1 else ''}: use"
            " the config.json that was saved with the weights"
        )

    report = LoadReport.of(info)
    embeddings = LayersRead(model, -1)
    if any(map(embeddings.has, report.missing)):  # another model's, which would fill the memory with chance
        check_complete(what, model, report, LayersRead(model, MOST_PARTS))


def check_weights(model: LoadedModel, last_layer: int, *, to_logits: bool = False) -> None:
    """Accept the weights of the embeddings and of the layers up to `last_layer` (-1: embeddings alone).

    Those beyond are not read, but `to_logits` for the final norm and the head. Raises ConfigError where some
    are missing, left over or not finite.
    """
    what = f"model {model.location.name}"
    read = LayersRead(model.model, last_layer, to_logits=to_logits)
    check_complete(what, model.model, model.report, read)
    check_model_finite(what, model.model, read)


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


def model_info(
    model: LoadedModel,
    saes: Sequence[SaeInfo],
    engine: str,
    cards: Sequence[Fit],
    *,
    log_probs: bool = False,
    bits: str = "",
) -> ModelInfo:
    """The description of a loaded model."""
    return ModelInfo(
        name=model.location.name,
        architecture=model.architecture,
        d_model=model.d_model,
        n_layers=model.n_layers,
        dtype=str(model.dtype).removeprefix("torch."),
        device=model.devices,
        engine=engine,
        weights_sha256=model.location.weights_sha256,
        revision=model.location.commit,
        settings_sha256=model.settings_sha256,
        saes=tuple(saes),
        cards=tuple(cards),
        log_probs=log_probs,
        bits=bits,
    )


def bridge_of(model: LoadedModel) -> Any:
    """The model behind TransformerLens's hook names. It takes the module's parts over: use one or the other.

    Raises ConfigError for a family that TransformerLens does not know or can't build.
    """
    from transformer_lens.model_bridge import TransformerBridge

    what = f"model {model.location.name}"
    if model.placement is not None and model.placement.offloads:
        raise ConfigError(
            f"{what}: part of it is offloaded ({model.devices}), which TransformerLens can't run, and its"
            " layers can't be read packed: use more or larger GPUs, or a smaller model.dtype"
        )
    with loading(what), no_installs():
        try:
            bridge = TransformerBridge.boot_transformers(
                model.location.target, hf_model=model.model, tokenizer=model.tokenizer, dtype=model.dtype
            )
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError) as error:
            if isinstance(found := explain(what, error), MachineError):
                raise found from error
            raise ConfigError(
                f"{what}: TransformerLens can't take {model.architecture} apart ({reason_of(error)}), and its"
                " layers can't be read packed either: use a model of another family"
            ) from error
        return bridge.requires_grad_(False).eval()


@contextlib.contextmanager
def no_installs() -> Iterator[None]:
    """Within it no package is installed: TransformerLens calls pip for torchvision, which replaces torch."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("lensd installs no packages")

    call = subprocess.check_call
    subprocess.check_call = refuse  # by whose failure TransformerLens goes on without pictures
    try:
        yield
    finally:
        subprocess.check_call = call


def reason_of(error: BaseException) -> str:
    """Why TransformerLens refused: of a family that it lacks it names all those that it has."""
    if "Could not determine supported architecture" in str(error):
        return "a family that it does not know"
    return sense(error)
