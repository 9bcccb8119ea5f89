"""The dictionaries that SAELens's registry names: where each reads, and how it runs here.

The registry gives a release, an id and a path; layer, place and width follow from how each publisher
writes these. Reads the list of the installed sae-lens as a file, without importing it. Knows no model and no
network.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from daemon.errors import MachineError

Runs = Literal["packed", "padded", "no", "unknown"]

REGISTRY = "pretrained_saes.yaml"
IN_ID = re.compile(r"blocks\.(\d+)\.(hook_(?:resid_(?:pre|mid|post)|mlp_out|attn_out|z))(?:_(\d+))?(?:__.*)?")
LAYER = re.compile(r"(?:^|[/_])(?:layer_?|l)(\d+)(?=$|[/_.arm])", re.IGNORECASE)  # a, r, m: of Llama Scope
WIDTH = re.compile(r"width_(\d+[km])(?![a-z0-9])|(?:^|[-_])w?(\d+k)(?=$|[-_])")
POWER = re.compile(r"width-2pow(\d+)")
IN_NEURONPEDIA = re.compile(r"[-_](\d+[km])(?=$|[-_])")  # behind the name of the model
SUBLAYERS = {"r": "hook_resid_post", "m": "hook_mlp_out", "a": "hook_attn_out"}  # of Llama Scope's ids
SCOPE_2 = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}
SCOPE_1 = {"-res": "hook_resid_post", "-mlp": "hook_mlp_out", "-att": "attn.hook_z"}
OF_RESID_POST = ("deepseek_r1", "dictionary_learning_1", "goodfire", "qwen_scope", "temporal")  # loaders
PADDED = {  # models by name, and why they can't be packed
    "openai/gpt-oss": "attention with sinks",
    "Qwen/Qwen3.5": "layers of linear attention",
}


@dataclass(frozen=True, slots=True)
class Hooks:
    """A hook point that a dictionary reads, and of a transcoder the one that it predicts."""

    layer: int
    hook_name: str
    hook_name_out: str = ""


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One dictionary of the registry."""

    release: str
    id: str
    model: str
    hooks: Hooks | None  # None where it reads outside the layers, or names do not tell
    width: str | None  # of d_sae as its publisher writes it, such as 16k for 16,384; None where no name tells
    l0: float | None  # on its card
    neuronpedia_id: str | None
    runs: Runs
    why: str = ""  # it is not packed

    @property
    def layer(self) -> int | None:
        return None if self.hooks is None else self.hooks.layer

    @property
    def kind(self) -> str:
        """Its place without the layer, such as `resid_post`; both where it is a transcoder."""
        if self.hooks is None:
            return "?" if self.runs == "unknown" else "embed"
        names = [self.hooks.hook_name, self.hooks.hook_name_out]
        return " > ".join(name.rpartition("hook_")[2] for name in names if name)

    def as_json(self) -> dict[str, Any]:
        return {
            "release": self.release,
            "id": self.id,
            "model": self.model,
            "layer": self.layer,
            "hook_name": None if self.hooks is None else self.hooks.hook_name,
            "hook_name_out": None if self.hooks is None else self.hooks.hook_name_out or None,
            "width": self.width,
            "l0": self.l0,
            "neuronpedia_id": self.neuronpedia_id,
            "runs": self.runs,
            "why": self.why or None,
        }


def read_catalog() -> tuple[CatalogEntry, ...]:
    """Every dictionary, in the registry's order. Raises MachineError where sae-lens lacks its list."""
    import yaml

    spec = importlib.util.find_spec("sae_lens")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    file = next((path for path in (Path(folder, REGISTRY) for folder in folders) if path.is_file()), None)
    if file is None:
        raise MachineError(f"the installed sae-lens has no {REGISTRY}: install it again")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    releases = yaml.load(file.read_bytes(), Loader=loader)
    return tuple(
        entry_of(release, about, sae) for release, about in releases.items() for sae in about["saes"]
    )


def entry_of(release: str, about: Mapping[str, Any], sae: Mapping[str, Any]) -> CatalogEntry:
    """One dictionary of a release as the registry has it."""
    runs: Runs
    try:
        hooks = hooks_named(release, about.get("conversion_func") or "", sae["id"], str(sae["path"]))
        runs, why = how_it_runs(about, hooks)
    except LookupError:
        hooks, runs, why = None, "unknown", "its names do not tell where it reads"
    return CatalogEntry(
        release=release,
        id=sae["id"],
        model=about["model"],
        hooks=hooks,
        width=width_of(release, sae),
        l0=sae.get("l0") or None,
        neuronpedia_id=sae.get("neuronpedia"),
        runs=runs,
        why=why,
    )


def how_it_runs(about: Mapping[str, Any], hooks: Hooks | None) -> tuple[Runs, str]:
    if about.get("conversion_func") == "temporal":
        return "no", "attends across positions"
    if hooks is None:
        return "no", "reads the embedding, which is no layer"
    for model, why in PADDED.items():
        if about["model"].startswith(model):
            return "padded", why
    return "packed", ""


def hooks_named(release: str, loader: str, sae_id: str, path: str) -> Hooks | None:
    """Where a dictionary reads; None outside the layers. Raises LookupError for a form of name not known."""
    if found := IN_ID.fullmatch(sae_id):
        hook = found[2].replace("hook_z", "attn.hook_z")
        return Hooks(int(found[1]), f"blocks.{found[1]}.{hook}")
    if "embedding" in path:
        return None
    layer = LAYER.search(sae_id)
    if layer is None:
        raise LookupError(f"{release}/{sae_id}: its layer is not known")
    block = f"blocks.{layer[1]}"
    read, predicted = hooks_inside(release, loader, sae_id, path)
    return Hooks(int(layer[1]), f"{block}.{read}", predicted and f"{block}.{predicted}")


def hooks_inside(release: str, loader: str, sae_id: str, path: str) -> tuple[str, str]:
    """The hooks inside a layer that are read and predicted; the second is empty but for a transcoder.

    Raises LookupError for a loader or a form of name not known.
    """
    match loader:
        case "gemma_2_transcoder":
            return "ln2.hook_normalized", "hook_mlp_out"
        case "mwhanna_transcoder":
            return "mlp.hook_in", "hook_mlp_out"
        case "mntss_clt_layer_transcoder":
            return "hook_resid_mid", "hook_mlp_out"
        case "gemma_2":
            return first_of(SCOPE_1, lambda part: part in release), ""
        case "gemma_3" if path.startswith("transcoder"):
            return "hook_mlp_in", "hook_mlp_out"
        case "gemma_3":
            return first_of(SCOPE_2, path.startswith), ""
        case "llama_scope" | "llama_scope_r1_distill":
            return first_of(SUBLAYERS, lambda letter: re.match(rf"l\d+{letter}", sae_id) is not None), ""
    if loader in OF_RESID_POST:
        return "hook_resid_post", ""
    raise LookupError(f"{release}: its loader {loader} is not known")


def first_of(hooks: Mapping[str, str], fits: Callable[[str], bool]) -> str:
    for part, hook in hooks.items():
        if fits(part):
            return hook
    raise LookupError("a form of name that is not known")


def width_of(release: str, sae: Mapping[str, Any]) -> str | None:
    """d_sae as names tell it."""
    if (found := IN_ID.fullmatch(sae["id"])) and found[3]:
        return found[3]
    if power := POWER.search(release):
        return f"{2 ** int(power[1]) // 1024}k" if int(power[1]) < 16 else f"{2 ** int(power[1]) // 1000}k"
    label = (sae.get("neuronpedia") or "").partition("/")[2]
    for found in (WIDTH.search(sae["id"]), WIDTH.search(release), IN_NEURONPEDIA.search(label)):
        if found:
            return found[1] or found[2] if found.re is WIDTH else found[1]
    return None


def chosen(
    entries: Iterable[CatalogEntry], words: Iterable[str] = (), model: str | None = None
) -> tuple[CatalogEntry, ...]:
    """Those whose names hold every word, and whose model's name holds `model`."""
    wanted = [word.casefold() for word in words]
    return tuple(
        entry
        for entry in entries
        if (model is None or model.casefold() in entry.model.casefold())
        and all(word in text_of(entry) for word in wanted)
    )


@functools.lru_cache(maxsize=1 << 15)
def text_of(entry: CatalogEntry) -> str:
    return f"{entry.release}/{entry.id} {entry.model} {entry.neuronpedia_id or ''}".casefold()
