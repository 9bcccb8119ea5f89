"""Loads dictionaries straight from their files where a stamp says that SAELens gave just these tensors.

A stamp is written once SAELens loaded the dictionary, every check accepted it and a fast encoder agreed with
SAELens's own. It holds all else that SAELens said. Knows no model and does not import SAELens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import Tensor

from daemon.model.dictionary import WEIGHTS_NAME, Dictionary, Facts, Metadata, SaeSource, Settings
from daemon.model.folding import FACTOR_NAME, WHITENING_NAME
from daemon.model.hub import Hub, Snapshot
from daemon.model.smollm2 import sha256_of
from daemon.model.stamps import Stamps
from daemon.model_info import Fit

BESIDE = ("cfg.json", FACTOR_NAME, WHITENING_NAME)  # other files of a folder that say what a dictionary is
SHA256_CHARACTERS = 64

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a loaded dictionary came from, and what is known of it: what a stamp is made of."""

    source: SaeSource
    facts: Facts
    weights: tuple[Path, ...]  # safetensors files that may hold its tensors as they are
    found: Mapping[str, Any]  # of a hub's: its repository, its commit and the hashes of its files


@dataclass(frozen=True, slots=True)
class Vouched:
    """A dictionary as a stamp and its file have it."""

    facts: Facts
    dictionary: Dictionary
    revision: str | None  # the commit of a hub's


@dataclass(frozen=True, slots=True)
class DictionaryStamps:
    """The stamps of dictionaries whose encoders run on this host, for models of one dtype."""

    stamps: Stamps
    dtype: torch.dtype
    model_dtype: torch.dtype

    def find(self, source: SaeSource, hub: Hub) -> Vouched | None:
        """The dictionary without SAELens; None where no stamp vouches for it as it is now."""
        try:
            subject = self._subject(source)
            content = self.stamps.read(subject)
            if content is None:
                return None
            if source.path is not None:
                path, revision = source.path / WEIGHTS_NAME, None
            else:
                snapshot = hub.snapshot(content["found"]["repo"], source.revision)
                if found_of(snapshot, content["found"]["files"]) != content["found"]:
                    return None
                snapshot.remember()
                path, revision = snapshot.file(content["weights"]), snapshot.commit
            tensors = read_tensors(path, content["tensors"], self.dtype)
            settings = dict(content["settings"])
            cfg = Settings(**settings | {"metadata": Metadata(**settings["metadata"])})
            facts = Facts(**content["facts"] | {"card": Fit(**content["facts"]["card"])})
            return Vouched(facts, Dictionary(cfg, tensors), revision)
        except Exception as error:  # then SAELens loads it, and says what is wrong if something is
            log.debug("stamp.not_used", reason=f"{type(error).__name__}: {error}")
            return None

    def remember(self, sae: Any, origin: Origin) -> None:
        """Write the stamp of a dictionary that SAELens loaded and whose fast encoder agreed.

        Writes none where no file holds its tensors as they are.
        """
        state = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
        for path in origin.weights:
            if not holds(path, state, self.dtype):
                continue
            names = origin.found.get("files", ())  # of a hub's, below the folder of the commit
            weights = next((name for name in names if str(path).endswith(f"/{name}")), path.name)
            content = {
                "facts": dataclasses.asdict(origin.facts),
                "settings": dataclasses.asdict(Settings.of(sae.cfg)),
                "tensors": sorted(state),
                "weights": weights,
                "found": dict(origin.found),
            }
            self.stamps.write(self._subject(origin.source), content)
            return

    def _subject(self, source: SaeSource) -> dict[str, Any]:
        """What a stamp of a dictionary is for. Raises OSError where the folder's files can't be read."""
        subject = {"dtype": str(self.dtype), "model_dtype": str(self.model_dtype)}
        if source.path is None:
            return subject | {
                "release": str(source.release),
                "id": str(source.id),
                "revision": str(source.revision),
            }
        hashes = {WEIGHTS_NAME: sha256_of(source.path / WEIGHTS_NAME)}
        for name in BESIDE:
            hashes[name] = sha256_of(source.path / name) if (source.path / name).is_file() else ""
        return subject | hashes


def found_of(snapshot: Snapshot, names: Any) -> dict[str, Any]:
    """What a stamp keeps of a hub's snapshot: its commit, and the hashes by which the cache names the files.

    Raises ValueError for a file that the cache does not name by its hash.
    """
    files = {}
    for name in names:
        blob = snapshot.file(name).resolve().name
        if name.endswith(".safetensors") and len(blob) != SHA256_CHARACTERS:
            raise ValueError(f"{name} is not named by its hash")
        files[name] = blob
    return {"repo": snapshot.repo, "commit": snapshot.commit, "files": files}


def read_tensors(path: Path, names: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises what its reader raises."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name).to(dtype) for name in names}


def holds(path: Path, state: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Whether a file holds these tensors exactly, in what SAELens made of them."""
    try:
        stored = read_tensors(path, state, dtype)
    except Exception:  # it lacks one, or is of another format
        return False
    return all(
        stored[name].shape == tensor.shape and torch.equal(stored[name], tensor)
        for name, tensor in state.items()
    )
