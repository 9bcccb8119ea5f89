"""Finds published folders, reads their manifests, and tells which belong in one report.

Knows what a manifest says, not what the tables hold.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from daemon.errors import ConfigError
from daemon.escaping import cut_short
from daemon.model_info import default_name

MANIFEST = "manifest.json"
SHOWN_NAMES = 3  # of the folders of a group
SHOWN_DIFFERENCES = 4  # between groups
MOST_VALUE = 60  # characters of a setting
ANALYSIS_DEFAULTS: dict[str, Any] = {  # of settings that change what columns and features hold
    "tokens": "all",
    "positions": "last",
    "seed": 0,
    "noise_sigma": 0.1,
    "noise_draws": 8,
    "stability_top_k": 10,
    "entropy_top_k": 50,
}


class Entry(BaseModel):
    """A part of a manifest. Keys that it does not name are left out: later versions add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class CardEntry(Entry):
    mean_l0: float | None = None
    fvu: float | None = None


class SaeEntry(Entry):
    """One dictionary as a manifest describes it. Earlier versions name fewer things."""

    name: str = ""
    hook: str
    layer: int
    source: str = ""
    architecture: str = ""
    hook_out: str | None = None
    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    d_out: int | None = None
    weights_sha256: str | None = None
    prepend_bos: bool | None = None
    revision: str | None = None
    neuronpedia_id: str | None = None
    card: CardEntry = CardEntry()
    fvu: float | None = None
    mean_l0: float | None = None

    @property
    def prefix(self) -> str:
        """Return the name with which its columns begin."""
        return self.name or default_name(self.layer)


class ContrastEntry(Entry):
    reference: str
    positive: str
    negative: str


class RecipeEntry(Entry):
    name: str = ""
    texts: dict[str, str] = Field(min_length=1)
    contrast: ContrastEntry | None = None


class ModelEntry(Entry):
    name: str
    architecture: str = ""
    d_model: int
    n_layers: int
    dtype: str
    device: str = ""
    weights_sha256: str | None = None
    settings_sha256: str = ""
    revision: str | None = None


class InputEntry(Entry):
    name: str
    sha256: str | None = None


class Manifest(Entry):
    """A published folder's `manifest.json`."""

    unit: str
    created: str
    input: InputEntry
    records: int = Field(ge=0)
    rows: int = Field(ge=0)
    rejects: int = Field(ge=0)
    model: ModelEntry
    saes: tuple[SaeEntry, ...] = Field(min_length=1)
    analysis_version: int = 1
    recipe: RecipeEntry
    config: dict[str, Any] = {}
    versions: dict[str, str | None] = {}

    @property
    def content(self) -> str:
        """Return a key that is the same for the same input."""
        return self.input.sha256 or self.unit

    def setting(self, section: str, key: str) -> Any:
        """Return a setting of the run; None where the manifest does not say."""
        found = self.config.get(section)
        return found.get(key) if isinstance(found, dict) else None

    @property
    def analysis(self) -> tuple[tuple[str, str], ...]:
        """Return the settings that change what columns and features hold, as text."""
        return tuple(
            (key, str(default if (value := self.setting("analysis", key)) is None else value))
            for key, default in ANALYSIS_DEFAULTS.items()
        )

    @property
    def positions(self) -> str:
        return dict(self.analysis)["positions"]

    @property
    def told(self) -> dict[str, str]:
        """Return all that folders of one report share, by the name of what it is."""
        model, contrast = self.model, self.recipe.contrast
        found = {f"text {name}": repr(template) for name, template in self.recipe.texts.items()}
        found["texts"] = ", ".join(self.recipe.texts)
        found["contrast"] = f"{contrast.negative} - {contrast.positive}" if contrast else "none"
        found["reference"] = contrast.reference if contrast else "none"
        found["weights of the model"] = model.weights_sha256 or f"{model.name} {model.revision}"
        found["settings of the model"] = model.settings_sha256
        found["dtype"] = model.dtype
        found["dictionaries"] = ", ".join(sae.prefix for sae in self.saes)
        for sae in self.saes:
            found[f"weights of {sae.prefix}"] = sae.weights_sha256 or "unknown"
            found[f"d_sae of {sae.prefix}"] = str(sae.d_sae)
            found[f"prepend_bos of {sae.prefix}"] = str(sae.prepend_bos)
        found |= {f"analysis.{key}": value for key, value in self.analysis}
        found["analysis version"] = str(self.analysis_version)
        return found

    @property
    def described(self) -> str:
        """Return in a few words what was run."""
        names = ", ".join(sae.prefix for sae in self.saes)
        recipe = self.recipe.name or "-".join(self.recipe.texts)
        return (
            f"recipe {recipe}, {names} of {self.model.name} in {self.model.dtype},"
            f" positions {self.positions}, analysis version {self.analysis_version}"
        )


@dataclass(frozen=True, slots=True)
class PublishedFolder:
    """A folder of an outbox."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """Return the name as it is shown; of one that is not published yet the name of its input."""
        unpublished = self.path.name == self.manifest.unit
        return self.manifest.input.name if unpublished else self.path.name

    @property
    def place(self) -> str:
        """Return where it is shown to be."""
        return self.name if self.path.name == self.manifest.unit else str(self.path)

    def file(self, name: str) -> Path:
        return self.path / name


def open_folders(paths: Sequence[Path]) -> tuple[PublishedFolder, ...]:
    """Return the published folders that are named, or lie in an outbox that is named; each input once.

    They come in the order named, of an outbox by name. Of one input read twice the newest counts. Raises
    ConfigError where there are none, or where they don't belong in one report.
    """
    found = [PublishedFolder(path, read_manifest(path)) for path in folders_of(paths)]
    check_together(found)
    newest: dict[str, PublishedFolder] = {}
    for folder in found:
        before = newest.setdefault(folder.manifest.content, folder)
        if folder.manifest.created > before.manifest.created:
            newest[folder.manifest.content] = folder
    return tuple(folder for folder in found if newest[folder.manifest.content] is folder)


def folders_of(paths: Iterable[Path]) -> list[Path]:
    """Return paths of published folders, none twice; hidden ones, such as `.staging`, are not finished."""
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise ConfigError(f"{path}: no such folder: give an outbox, or a folder in one")
        if not path.is_dir():
            raise ConfigError(f"{path}: a file: give an outbox, or a folder in one")
        inside = [path] if (path / MANIFEST).is_file() else published_in(path)
        if not inside:
            raise ConfigError(
                f"{path}: nothing is published there: give an outbox, or a folder that holds {MANIFEST}"
            )
        for folder in inside:
            found.setdefault(Path(os.path.realpath(folder)), folder)
    return list(found.values())


def published_in(outbox: Path) -> list[Path]:
    with os.scandir(outbox) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    return [outbox / name for name in names if (outbox / name / MANIFEST).is_file()]


def read_manifest(folder: Path) -> Manifest:
    """Raises ConfigError where it is no manifest of lensd's."""
    path = folder / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        said = f"{place}: {first['msg']}" if place else first["msg"]
        raise ConfigError(
            f"{path}: no manifest of lensd's, or damaged ({cut_short(said, 120)}): restore the folder,"
            " or name the folders to be read"
        ) from None


def check_together(folders: Sequence[PublishedFolder]) -> None:
    """Raises ConfigError where folders are of different runs: numbers of these can't be pooled."""
    groups: dict[str, list[PublishedFolder]] = {}
    for folder in folders:
        groups.setdefault(repr(folder.manifest.told), []).append(folder)
    if len(groups) == 1:
        return
    told = [group[0].manifest.told for group in groups.values()]
    names = dict.fromkeys(name for one in told for name in one)
    differing = [name for name in names if len({one.get(name) for one in told}) > 1]
    shown = differing[:SHOWN_DIFFERENCES]
    more = len(differing) - len(shown)
    listed = "; ".join(
        f"({number}) {names_of(group)}: {group[0].manifest.described};"
        f" {', '.join(f'{name} {value_apart(name, one, told)}' for name in shown)}"
        for number, (group, one) in enumerate(zip(groups.values(), told, strict=True), 1)
    )
    raise ConfigError(
        f"these {len(folders)} folders don't belong in one report, they differ in"
        f" {' and '.join(shown)}{f' and {more} more' if more else ''}:"
        f" name the folders of one of these: {listed}"
    )


def value_apart(name: str, one: Mapping[str, str], all_of: Sequence[Mapping[str, str]]) -> str:
    """Return a setting's value, of a long one the part in which it differs from the others'."""
    value = one.get(name, "none")
    letters = zip(*(other.get(name, "none") for other in all_of), strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda some: len(set(some)) == 1, letters))
    return cut_short(value if same < MOST_VALUE // 2 else f"...{value[same - 10 :]}", MOST_VALUE)


def names_of(folders: Sequence[PublishedFolder]) -> str:
    shown = ", ".join(cut_short(str(folder.path), 100) for folder in folders[:SHOWN_NAMES])
    more = len(folders) - SHOWN_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
