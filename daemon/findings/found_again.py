"""Finds the model and the dictionaries of a published folder again, on this machine: nothing is fetched.

What lies there now is taken only where it is what the manifest names, by hash or commit. Importing it imports
torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from daemon.config import PRESETS, SaeSection
from daemon.errors import LensdError
from daemon.findings.manifests import Manifest, SaeEntry
from daemon.findings.results import IntArray
from daemon.model.dictionary import WEIGHTS_NAME, name_of
from daemon.model.hub import cached_commit, storage_of
from daemon.model.location import BUNDLED, folder_sha256, official_name
from daemon.model.sae import load_sae
from daemon.model.saelens import CENTRED
from daemon.model.smollm2 import WEIGHTS_SHA256, default_cache_dir, sha256_of

MOST_DICTIONARY_BYTES = 512 << 20  # of one that has to be loaded whole


class NotFound(LensdError):
    """Something is not here any more, or is another than it was: the message is for people."""


@dataclass(frozen=True, slots=True)
class DecoderRows:
    """Rows of a dictionary's decoder."""

    features: IntArray  # (k,)
    rows: Tensor  # (k, d_model) float32


def model_folder(manifest: Manifest) -> Path:
    """The folder of the model that a manifest names. Raises NotFound."""
    named = str(manifest.setting("model", "name") or manifest.model.name)
    if named == BUNDLED:
        if not (folder := default_cache_dir() / "models" / f"{BUNDLED}-{WEIGHTS_SHA256[:12]}").is_dir():
            raise NotFound(f"the bundled model is not in {folder.parent}: lensd demo converts it")
        return folder  # whose hash was checked when it was converted, and is at every start
    if manifest.model.weights_sha256 is not None:
        folder = Path(named).expanduser()
        if not (folder / "config.json").is_file():
            raise NotFound(f"the model's folder {named} is not here")
        if folder_sha256(folder) != manifest.model.weights_sha256:
            raise NotFound(f"the model in {named} is another than it was")
        return folder
    for repo in (named, official_name(named)):
        commit = manifest.model.revision or cached_commit(repo, "main")
        if "/" in repo or repo == named:
            snapshot = storage_of(repo) / "snapshots" / str(commit)
            if (snapshot / "config.json").is_file():
                return snapshot
    raise NotFound(f"the model {named} is not in the cache of the hub's files here")


def decoder_rows(manifest: Manifest, sae: SaeEntry, features: IntArray) -> DecoderRows:
    """Decoder rows of some features, in the residual stream. Raises NotFound where they can't be had."""
    place = sae.hook_out or sae.hook
    if CENTRED.fullmatch(place) is None:
        raise NotFound(f"{sae.prefix} writes to {place}, which is not the residual stream")
    if sae.d_out is not None and sae.d_out != manifest.model.d_model:
        raise NotFound(f"{sae.prefix} writes {sae.d_out} numbers, the model reads {manifest.model.d_model}")
    source = source_of(manifest, sae)
    if source.path is not None and sha256_of(source.path / WEIGHTS_NAME) == sae.weights_sha256:
        return DecoderRows(features, rows_of_file(source.path / WEIGHTS_NAME, features))
    size = sae.d_sae * (sae.d_in + (sae.d_out or sae.d_in)) * 4
    if size > MOST_DICTIONARY_BYTES:
        raise NotFound(
            f"{sae.prefix} would have to be loaded whole, {size / 2**30:.1f} GiB: more than a report takes"
        )
    with offline():
        loaded = load_sae(source, device="cpu", dtype=float32())
    if loaded.info.weights_sha256 != sae.weights_sha256:
        raise NotFound(f"the dictionary {name_of(source)} is another here than it was")
    return DecoderRows(features, loaded.W_dec.detach()[features.tolist()].float())


def source_of(manifest: Manifest, sae: SaeEntry) -> SaeSection:
    """Where a dictionary comes from, as the run was configured. Raises NotFound."""
    configured = manifest.config.get("sae")
    sources = [
        SaeSection.model_validate(entry | {"revision": sae.revision if entry.get("release") else None})
        for entry in (configured if isinstance(configured, list) else [])
    ]
    alike = [source for source in sources if name_of(source) == sae.source]
    named = [source for source in alike if source.name == sae.name] or alike
    for source in named:
        if source.path is None:
            return source
        bundled = PRESETS / manifest.model.name / source.path.name
        for folder in (source.path, bundled):
            if (folder / WEIGHTS_NAME).is_file() and (len(named) == 1 or is_file_of(folder, sae)):
                return source.model_copy(update={"path": folder})
    raise NotFound(f"the dictionary {sae.source} is not here")


def is_file_of(folder: Path, sae: SaeEntry) -> bool:
    return sha256_of(folder / WEIGHTS_NAME) == sae.weights_sha256


def rows_of_file(path: Path, features: Sequence[int] | IntArray) -> Tensor:
    """(k, d) rows of W_dec in a SAELens file, which stays on the disk but for them."""
    import torch

    with safe_open(path, framework="pt") as file:
        weights = file.get_slice("W_dec")
        return torch.cat([weights[int(row) : int(row) + 1] for row in features]).float()


def float32() -> Any:
    import torch

    return torch.float32


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Within it the hub's client asks nobody: what is not in its cache is not there."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
