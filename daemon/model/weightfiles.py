"""Looks at weight files before a library does: pointers, files cut off, what an index of shards promises.

Reads headers only. Knows the safetensors format, no model and no dictionary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daemon.errors import ConfigError
from daemon.escaping import cut_short
from daemon.model.failures import sense

POINTER = b"version https://git-lfs"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SHARD = re.compile(r".+-\d+-of-\d+\.safetensors")
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4"}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """A file's description of one of its tensors."""

    dtype: str  # as the format names it, such as F32
    shape: tuple[int, ...]

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS


def check_no_pointer(path: Path, what: str) -> None:
    """Raises ConfigError where a file is empty or a pointer of Git LFS."""
    with path.open("rb") as file:
        begins = file.read(len(POINTER))
    if begins == POINTER:
        raise ConfigError(
            f"{what}: {path.name} is a Git LFS pointer, not the file itself: run git lfs pull there (git lfs"
            " install before, where it is new)"
        )
    if not begins:
        raise ConfigError(f"{what}: {path.name} is empty: fetch it again, or save it again")


def tensor_headers(path: Path, what: str) -> dict[str, TensorHeader]:
    """Every tensor of a safetensors file by name, once its size is found to be what its header says.

    Raises ConfigError for a file that is none, is damaged or is cut off.
    """
    from safetensors import SafetensorError, safe_open

    check_no_pointer(path, what)
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            return {
                name: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()
            }
    except SafetensorError as error:
        with path.open("rb") as raw:
            if raw.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04"):
                raise ConfigError(
                    f"{what}: {path.name} holds pickled weights under a safetensors name, and loading them"
                    " could run code: convert them where that does no harm"
                ) from None
        raise ConfigError(
            f"{what}: {path.name} ({path.stat().st_size} bytes) is no safetensors file, or is cut off"
            f" ({sense(error)}): fetch it again, or save it again"
        ) from None


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file. Raises ConfigError."""
    check_no_pointer(path, what)
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        place = (
            f" ({error.msg} at its character {error.pos + 1})"
            if isinstance(error, json.JSONDecodeError)
            else ""
        )
        raise ConfigError(f"{what}: {path.name} is no JSON{place}: fetch it again, or correct it") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{what}: {path.name} is JSON, but no object: fetch it again, or correct it")
    return value


def model_tensors(folder: Path, what: str) -> dict[str, TensorHeader]:
    """The tensors of a model's folder as Transformers will read them: one file, or the shards of an index.

    Raises ConfigError, naming the file, where one is missing or damaged, goes by another name, or lacks a
    tensor that the index promises. Returns none where there are no weights in safetensors at all.
    """
    if (folder / SINGLE_NAME).is_file():
        return tensor_headers(folder / SINGLE_NAME, what)
    if not (folder / INDEX_NAME).is_file():
        check_names(folder, what)
        return {}
    weight_map = read_object(folder / INDEX_NAME, what).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ConfigError(f"{what}: {INDEX_NAME} has no weight_map: fetch it again")
    found: dict[str, TensorHeader] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (folder / shard).is_file():
            raise ConfigError(f"{what}: the shard {shard} is missing: complete the folder")
        headers = tensor_headers(folder / shard, what)
        lost = [name for name, where in weight_map.items() if where == shard and name not in headers]
        if lost:
            raise ConfigError(
                f"{what}: {shard} lacks {named(lost)}, which {INDEX_NAME} promises: fetch it again"
            )
        found |= headers
    return found


def check_names(folder: Path, what: str) -> None:
    """Raises ConfigError where weights lie in a folder by names that Transformers does not look for."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards := [name for name in names if SHARD.fullmatch(name)]:
        raise ConfigError(
            f"{what}: no {INDEX_NAME} there, which its {len(shards)} shards need: add it,"
            " from where the shards come from"
        )
    if len(names) == 1:
        raise ConfigError(
            f"{what}: no {SINGLE_NAME} there: rename {names[0]} to that if it holds the model's weights"
        )
    if names:
        raise ConfigError(
            f"{what}: no {SINGLE_NAME} there, but {named(names)}: give a folder as save_pretrained writes it"
        )


def check_floating(tensors: Mapping[str, TensorHeader], what: str) -> None:
    """Raises ConfigError for numbers that are not floating-point: libraries cast them without a word."""
    wrong = {name: header.dtype for name, header in tensors.items() if not header.floating}
    if wrong:
        name, dtype = next(iter(wrong.items()))
        raise ConfigError(
            f"{what}: {named(wrong)} of type {dtype}, not floating-point: quantised by a tool that left no"
            " quantization_config, or damaged: use the weights in float32,"
            f" float16 or bfloat16 (first: {name})"
        )


def named(names: Iterable[str], most: int = 3) -> str:
    """A few of many names, and how many there are."""
    listed = sorted(names)
    shown = ", ".join(cut_short(name, 80) for name in listed[:most])
    return shown if len(listed) <= most else f"{shown} and {len(listed) - most} more"
