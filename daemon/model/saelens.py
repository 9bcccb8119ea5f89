"""Has SAELens load dictionaries, and accepts or refuses what it gives. Knows no model."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from daemon.errors import ConfigError
from daemon.model.cards import card_of, neuronpedia_id_of
from daemon.model.completeness import check_finite
from daemon.model.dictionary import HOOK_NAME, WEIGHTS_NAME, Dictionary, Facts, SaeSource, name_of
from daemon.model.dictionary_stamps import Origin, found_of
from daemon.model.failures import loading, quiet_libraries
from daemon.model.folding import fold_normalisation
from daemon.model.hub import Hub, repository_of, serving
from daemon.model.pickles import weights_only_pickles
from daemon.model.saeformat import ARCHITECTURES, TRANSCODERS, check_dictionary, check_folded, judged
from daemon.model.smollm2 import sha256_of
from daemon.model.weightfiles import check_floating, read_object, tensor_headers

# Places whose raw values, less their mean, are what TransformerLens gives with centred writing weights.
CENTRED = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
CROSS_LAYER_LOADERS = {"mntss_clt_layer_transcoder"}  # of SAELens


@dataclass(frozen=True, slots=True)
class Found:
    """A dictionary, and what is known of it."""

    sae: Any
    facts: Facts
    revision: str | None
    origin: Origin | None = None  # where SAELens loaded it, and no warning was logged

    @property
    def vouched(self) -> bool:
        return isinstance(self.sae, Dictionary)


def from_saelens(source: SaeSource, device: str, dtype: torch.dtype, hub: Hub) -> Found:
    """Have SAELens load a dictionary, and check it. Raises ConfigError or MachineError."""
    name = name_of(source)
    read = read_folder(source.path, device, dtype) if source.path else read_hub(source, device, dtype, hub)
    sae = read.sae
    sae.requires_grad_(False)
    sae.turn_off_forward_pass_hook_z_reshaping()  # engines give the heads side by side already
    check_supported(sae, name)
    hook_name, hook_name_out = hooks_of(sae, name)
    facts = Facts(
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        d_out=getattr(sae.cfg, "d_out", sae.cfg.d_in),
        architecture=sae.cfg.architecture(),
        weights_sha256=tensors_sha256(sae) if read.weights_sha256 is None else read.weights_sha256,
        settings_sha256=settings_sha256(sae.cfg.to_dict()),
        prepend_bos=None if (said := sae.cfg.metadata.prepend_bos) is None else bool(said),
        neuronpedia_id=neuronpedia_id_of(sae, source.release, source.id),
        center_residual=reads_centred(sae, (hook_name, hook_name_out), name),
        reconstructs=source.path is not None or not is_cross_layer(source),
        card=card_of(sae, source.release, source.id),
    )
    origin = None if read.warned else Origin(source, facts, read.files, read.found)
    return Found(sae, facts, read.revision, origin)


@dataclass(frozen=True, slots=True)
class Read:
    """A dictionary as SAELens read it."""

    sae: Any
    warned: bool  # whether its settings were worth a warning
    files: tuple[Path, ...]  # safetensors that it was read from
    weights_sha256: str | None = None  # of a single file; None for a hash of the tensors
    revision: str | None = None
    found: Mapping[str, Any] = field(default_factory=dict)  # of a hub's: see `Origin`


def is_cross_layer(source: SaeSource) -> bool:
    """Whether SAELens adds up what the dictionary writes to many layers, which is what no layer has."""
    from sae_lens.loading.pretrained_sae_loaders import get_conversion_loader_name

    return get_conversion_loader_name(source.release) in CROSS_LAYER_LOADERS


def check_supported(sae: Any, name: str) -> None:
    """Raises ConfigError where a loaded dictionary would not compute as it did in training."""
    architecture = sae.cfg.architecture()
    if architecture not in ARCHITECTURES:
        raise ConfigError(
            f"SAE {name}: architecture {architecture} is not supported: use one of {', '.join(ARCHITECTURES)}"
        )
    check_folded(sae.cfg.normalize_activations or "none", f"SAE {name}")
    check_finite(f"SAE {name}", sae.state_dict().items())


def reads_centred(sae: Any, hooks: Sequence[str], name: str) -> bool:
    """Whether the values that a dictionary was trained on had no mean. Raises ConfigError."""
    kwargs = sae.cfg.metadata.model_from_pretrained_kwargs or {}
    centred = bool(kwargs.get("center_writing_weights", False))
    for hook in hooks:
        if centred and not CENTRED.fullmatch(hook):
            raise ConfigError(
                f"SAE {name}: was trained on weights that TransformerLens had processed, and what these give"
                f" at {hook} can't be told from the model's own: use one with from_pretrained_no_processing"
            )
    return centred


def hooks_of(sae: Any, name: str) -> tuple[str, str]:
    """The hook points that a dictionary reads and reconstructs. Raises ConfigError."""
    read = sae.cfg.metadata.hook_name
    written = read
    if sae.cfg.architecture() in TRANSCODERS:
        written = getattr(sae.cfg.metadata, "hook_name_out", None)
        if written is None:
            raise ConfigError(f"SAE {name}: a transcoder whose metadata has no hook_name_out: add it")
    for hook in (read, written):
        if not HOOK_NAME.fullmatch(hook or ""):
            raise ConfigError(
                f"SAE {name}: hook {hook!r} is not supported: use a dictionary at a hook point of"
                " TransformerLens inside a layer, such as blocks.L.hook_resid_post"
            )
    return read, written


def read_folder(path: Path, device: str, dtype: torch.dtype) -> Read:
    from sae_lens import SAE

    what = f"SAE {path}"
    quiet_libraries()
    with loading(what):
        if path.is_file():
            raise ConfigError(f"{what}: a file: give the folder that it lies in, in SAELens format")
        for needed in ("cfg.json", WEIGHTS_NAME):
            if not (path / needed).is_file():
                pickled = [
                    file.name for file in sorted(path.glob("*")) if file.suffix in (".pt", ".pth", ".bin")
                ]
                instead = f" (pickled weights, {pickled[0]}, are not loaded)" if pickled else ""
                raise ConfigError(f"{what}: no {needed} there{instead}: give a folder in SAELens format")
        tensors = tensor_headers(path / WEIGHTS_NAME, what)
        check_floating(tensors, what)
        shapes = {name: entry.shape for name, entry in tensors.items()}
        cfg = read_object(path / "cfg.json", what)
        if cfg.get("finetuning_scaling_factor") is True and "scaling_factor" not in shapes:
            raise ConfigError(
                f"{what}: its cfg.json says finetuning_scaling_factor, but its weights have no"
                " scaling_factor: use complete weights, or set it to false"
            )
        if "scaling_factor" in shapes and is_neutral(path / WEIGHTS_NAME, "scaling_factor"):
            del shapes["scaling_factor"]
        warned = check_dictionary(cfg, shapes, what)
        sae = SAE.load_from_disk(path, device=device, dtype=str(dtype).removeprefix("torch."))
        folded = fold_normalisation(sae, path, what)
        weights = None if folded else sha256_of(path / WEIGHTS_NAME)
        return Read(sae, warned, (path / WEIGHTS_NAME,), weights)


def is_neutral(path: Path, name: str) -> bool:
    """Whether a tensor of a file is all ones, as SAELens judges it."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor(name).float()
    return torch.allclose(tensor, torch.ones_like(tensor))


def read_hub(source: SaeSource, device: str, dtype: torch.dtype, hub: Hub) -> Read:
    """A dictionary of a release."""
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import (
        NAMED_PRETRAINED_SAE_LOADERS,
        get_conversion_loader_name,
    )

    what = f"SAE {source.release}/{source.id}"
    quiet_libraries()
    with loading(what), weights_only_pickles(what):
        check_known(source, what)
        load = NAMED_PRETRAINED_SAE_LOADERS[get_conversion_loader_name(source.release)]
        snapshot = hub.snapshot(repository_of(source.release or ""), source.revision)
        warned: list[bool] = []
        with serving(snapshot) as served:
            sae = SAE.from_pretrained(
                release=source.release,
                sae_id=source.id,
                device=device,
                dtype=str(dtype).removeprefix("torch."),
                converter=judged(load, what, warned),
            )
        snapshot.remember()
        files = tuple(snapshot.file(name) for name in served if name.endswith(".safetensors"))
        try:
            found = found_of(snapshot, sorted(set(served)))
        except ValueError:  # the cache names its files otherwise
            files, found = (), {}
        return Read(sae, any(warned), files, revision=snapshot.commit, found=found)


def check_known(source: SaeSource, what: str) -> None:
    """Raises ConfigError for a release or an id that SAELens's list does not have.

    A repository of the hub may go by its own name.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    release, sae_id = source.release or "", source.id or ""
    if release not in releases:
        if release.count("/") != 1:
            hint = difflib.get_close_matches(release, releases, n=3)
            raise ConfigError(
                f"{what}: Release {release} not found in SAELens's list, and no OWNER/NAME of the hub:"
                f" {'did you mean ' + ' or '.join(hint) + '?' if hint else 'check the name'}"
            )
        return
    ids = releases[release].saes_map
    if sae_id not in ids:
        hint = difflib.get_close_matches(sae_id, ids, n=3, cutoff=0.3) or list(ids)[:3]
        raise ConfigError(f"{what}: that release has no such id: it has {', '.join(hint)} and more")


def settings_sha256(settings: dict[str, Any]) -> str:
    """Hash of a configuration as it was loaded, but for the device and where the dictionary is shown."""
    told = {key: value for key, value in settings.items() if key != "device"}
    if isinstance(told.get("metadata"), dict):
        told["metadata"] = {k: v for k, v in told["metadata"].items() if k != "neuronpedia_id"}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def tensors_sha256(sae: Any) -> str:
    """Hash of the parameters as loaded, for dictionaries that are no single file here."""
    digest = hashlib.sha256()
    for name, tensor in sorted(sae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().to(torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
