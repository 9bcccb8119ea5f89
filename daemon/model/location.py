"""Finds a model's files by the name that it is given: a bundled preset, a folder, or a hub's repository.

Looks at files before a library does, headers only. Builds nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from daemon.errors import ConfigError
from daemon.model.completeness import DERIVED
from daemon.model.failures import loading, quiet_libraries
from daemon.model.hub import Hub, Snapshot
from daemon.model.smollm2 import WEIGHTS_SHA256, sha256_of, smollm2_folder
from daemon.model.weightfiles import (
    INDEX_NAME,
    SINGLE_NAME,
    TensorHeader,
    check_floating,
    model_tensors,
    read_object,
)

BUNDLED = "smollm2-135m"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "special_tokens_map.json")
SETTINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken")  # of files beside the weights
TEMPLATES = "additional_chat_templates/"  # the one folder of a repository that belongs to its tokenizer
ADAPTER = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model's files are."""

    name: str  # as shown to people
    target: str  # the folder, which `from_pretrained` takes
    weights_sha256: str | None  # None for a hub's model
    snapshot: Snapshot | None = None  # of a hub's model, whose weights are not fetched yet

    @property
    def commit(self) -> str | None:
        """Of a hub's model."""
        return self.snapshot.commit if self.snapshot is not None else None


def locate_model(
    name: str, cache_dir: Path, revision: str | None = None, hub: Hub | None = None
) -> ModelLocation:
    """A bundled preset, a local folder, or a TransformerLens or Hugging Face name, in this order.

    Raises ConfigError where a path is named that holds no model, MachineError where the hub fails.
    """
    if not name.strip():
        raise ConfigError("model.name is empty: name a preset, a folder or a model of the hub")
    with loading(f"model {name}"):
        folder = Path(name).expanduser()
        if revision is not None and (name == BUNDLED or folder.exists()):
            raise ConfigError(
                f"model {name}: model.revision = {revision!r} goes with a model of the hub, and this one is"
                " here: leave it out"
            )
        if name == BUNDLED:
            return ModelLocation(name, str(smollm2_folder(cache_dir)), WEIGHTS_SHA256)
        if folder.is_dir():
            check_folder(folder, f"model {name}")
            return ModelLocation(folder.resolve().name, str(folder), folder_sha256(folder))
        if folder.exists():
            raise ConfigError(
                f"model {name}: a file: give the folder that it lies in, in Hugging Face format"
            )
        if name.startswith((".", "/", "~")):
            raise ConfigError(f"model {name}: no such folder")
        quiet_libraries()
        snapshot = (hub or Hub()).snapshot(official_name(name), revision)
        fetch_settings(snapshot, f"model {name}")
        return ModelLocation(name, str(snapshot.folder), None, snapshot)


def official_name(name: str) -> str:
    """The hub's name of a model that TransformerLens has a name for; other names as they are."""
    from transformer_lens.loading_from_pretrained import get_official_model_name

    try:
        return str(get_official_model_name(name))
    except ValueError:
        return name


def check_folder(folder: Path, what: str) -> None:
    """Look at a local model's files, their headers only. Raises ConfigError."""
    if not (folder / "config.json").is_file():
        raise no_config(what, is_adapter=(folder / ADAPTER).is_file())
    config = read_object(folder / "config.json", what)
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            read_object(folder / name, what)
    tensors = model_tensors(folder, what)
    if config.get("quantization_config") is None:
        check_types(tensors, what)
    check_no_adapter([ADAPTER] if (folder / ADAPTER).is_file() else [], what)


def no_config(what: str, *, is_adapter: bool) -> ConfigError:
    if is_adapter:
        return ConfigError(
            f"{what}: a PEFT adapter without its model: merge it into one (merge_and_unload),"
            " save that, and give its folder"
        )
    return ConfigError(f"{what}: no config.json there: give a folder in Hugging Face format")


def check_no_adapter(names: Iterable[str], what: str) -> None:
    """Raises ConfigError for an adapter beside a model's weights."""
    if ADAPTER in names:
        raise ConfigError(
            f"{what}: has an adapter_config.json beside the weights, and lensd applies no adapters: merge it"
            " (merge_and_unload), or remove it if the weights are to be read without"
        )


def check_types(tensors: Mapping[str, TensorHeader], what: str) -> None:
    """Raises ConfigError for weights that are no floating-point numbers. Masks of older versions may be."""
    check_floating({name: entry for name, entry in tensors.items() if not DERIVED.search(name)}, what)


def folder_sha256(folder: Path) -> str:
    """One hash over the weight files of a local model."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"model {folder}: no .safetensors there, and lensd loads no pickled weights (.bin, .pt): convert"
            " them where that does no harm (from_pretrained, then save_pretrained)"
        )
    digest = hashlib.sha256()
    for path in files:
        digest.update(sha256_of(path).encode())
    return digest.hexdigest()


def fetch_settings(snapshot: Snapshot, what: str) -> None:
    """Have what a model and its tokenizer are built from, but for weights, in the local cache.

    Raises ConfigError for a repository of another kind, and what the hub's client raises.
    """
    from huggingface_hub.errors import EntryNotFoundError

    names = snapshot.files
    if names is not None and "config.json" not in names:
        raise no_config(f"{what} on the hub", is_adapter=ADAPTER in names)
    read_object(snapshot.file("config.json"), what)
    if names is not None:
        check_no_adapter(names, what)
        for name in sorted(names):
            if is_setting(name):
                snapshot.file(name)
    elif not any((snapshot.folder / name).is_file() for name in TOKENIZER_FILES):
        with_tokenizer = snapshot.refusal or EntryNotFoundError(f"{snapshot.repo} has no tokenizer")
        raise with_tokenizer


def is_setting(name: str) -> bool:
    """Whether a repository's file belongs to the model's configuration or its tokenizer."""
    inner = name.removeprefix(TEMPLATES)
    return "/" not in inner and inner.endswith(SETTINGS) and not inner.endswith(".index.json")


def fetch_weights(snapshot: Snapshot, what: str) -> None:
    """Have the weights of a hub's model in the local cache, in safetensors. Raises ConfigError.

    Transformers by itself takes pickled ones, and asks a bot of the hub to convert them.
    """
    from huggingface_hub.errors import EntryNotFoundError

    names = [SINGLE_NAME, INDEX_NAME]
    if snapshot.files is not None:
        names = [name for name in names if name in snapshot.files]
    elif (snapshot.folder / INDEX_NAME).is_file():
        names = [INDEX_NAME]
    for name in names:
        try:
            path = snapshot.file(name)
        except EntryNotFoundError:
            continue
        if name == INDEX_NAME:
            shards = read_object(path, what).get("weight_map")
            for shard in sorted(set(shards.values())) if isinstance(shards, dict) else ():
                snapshot.file(str(shard))
        return
    raise ConfigError(
        f"{what}: the hub has no {SINGLE_NAME} of it, and lensd loads no pickled weights: use a version in"
        " safetensors, or convert it where that does no harm"
    )
