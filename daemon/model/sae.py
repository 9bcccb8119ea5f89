"""SAELens dictionaries, loaded and checked against a model. Knows nothing about batches or analysis."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import structlog
import torch
from torch import Tensor

from daemon.errors import ConfigError
from daemon.model.cards import card_of, neuronpedia_id_of
from daemon.model.completeness import check_finite
from daemon.model.dictionary import Dictionary, Facts
from daemon.model.dictionary_stamps import WEIGHTS_NAME, DictionaryStamps, Origin, found_of
from daemon.model.failures import loading, quiet_libraries
from daemon.model.folding import fold_normalisation
from daemon.model.hub import Hub, repository_of, serving
from daemon.model.pickles import weights_only_pickles
from daemon.model.placement import Placement
from daemon.model.sae_names import names_of
from daemon.model.saeformat import ARCHITECTURES, TRANSCODERS, check_dictionary, check_folded, judged
from daemon.model.smollm2 import sha256_of
from daemon.model.weightfiles import check_floating, read_object, tensor_headers
from daemon.model_info import Fit, SaeInfo

HOOK_NAME = re.compile(r"blocks\.(\d+)\.\S+")
RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# Places whose raw values, less their mean, are what TransformerLens gives with centred writing weights.
CENTRED = re.compile(r"blocks\.\d+\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")
CROSS_LAYER_LOADERS = {"mntss_clt_layer_transcoder"}  # of SAELens

log = structlog.get_logger()


class SaeSource(Protocol):
    """Where a dictionary comes from; `daemon.config.SaeSection` is one."""

    @property
    def release(self) -> str | None: ...
    @property
    def id(self) -> str | None: ...
    @property
    def path(self) -> Path | None: ...
    @property
    def name(self) -> str | None: ...  # that it is given
    @property
    def prepend_bos(self) -> bool | None: ...  # in place of what its metadata says
    @property
    def revision(self) -> str | None: ...


@dataclass(frozen=True, slots=True)
class LoadedSae:
    """A dictionary on the device with what its model must give it."""

    info: SaeInfo
    sae: Any  # sae_lens.SAE, or the `Dictionary` that a stamp vouches for
    center_residual: bool  # it was trained on weights processed by TransformerLens
    card: Fit = field(default_factory=Fit)  # what its makers measured
    reconstructs: bool = True  # else its decoder's sum is no reconstruction, and has no error
    vouched: bool = False  # whether a stamp says that its fast encoder agreed with SAELens's
    origin: Origin | None = None  # what a stamp is made of, once it did

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The places of the model that are needed: what is read, and of a transcoder what it predicts."""
        return tuple(dict.fromkeys((self.info.hook_name, self.info.hook_name_out)))

    @property
    def W_dec(self) -> Tensor:
        """(d_sae, d_out) decoder rows."""
        weights: Tensor = self.sae.W_dec
        return weights

    def residual(self, x: Tensor) -> Tensor:
        """The values that the dictionary reads or predicts, from the model's x: (..., d), in the SAE's dtype.

        `center_writing_weights` makes every write to the residual stream sum to zero over d_model, which
        equals subtracting that mean from the raw residual.
        """
        x = x.to(self.sae.dtype)
        return x - x.mean(-1, keepdim=True) if self.center_residual else x

    def encode(self, x: Tensor) -> Tensor:
        """(N, d_in) -> (N, d_sae) dense feature activations."""
        feature_acts: Tensor = self.sae.encode(x)
        return feature_acts

    def decode(self, feature_acts: Tensor, x: Tensor) -> Tensor:
        """(N, d_sae) and what was read (N, d_in) -> (N, d_out). Call right after the `encode` it belongs to:
        SAEs with run-time normalisation keep its statistics from one to the other.
        """
        reconstruction: Tensor = self.sae.decode(feature_acts)
        return reconstruction if self.W_skip is None else reconstruction + x @ self.W_skip.T

    @property
    def W_skip(self) -> Tensor | None:
        """(d_out, d_in) what a skip transcoder adds to its reconstruction, per x."""
        weights: Tensor | None = getattr(self.sae, "W_skip", None)
        return weights


def load_saes(
    sources: Sequence[SaeSource],
    *,
    d_model: int,
    n_layers: int,
    device: str,
    dtype: torch.dtype,
    bos_habit: Callable[[], bool],
    hub: Hub | None = None,
    stamps: DictionaryStamps | None = None,
) -> tuple[LoadedSae, ...]:
    """Every dictionary, in order of layer, checked against the model's shape.

    `bos_habit` tells whether the model's tokenizer puts BOS before a text: so do those that say nothing. Those
    that `stamps` vouch for come without SAELens. Raises ConfigError, naming the dictionary, where one can't be loaded or does not fit.
    """
    hub = hub or Hub()
    loaded = [
        load_sae(source, device=device, dtype=dtype, bos_habit=bos_habit, hub=hub, stamps=stamps)
        for source in sources
    ]
    for entry in loaded:
        info = entry.info
        if info.d_in != d_model and RESIDUAL.fullmatch(info.hook_name):
            raise ConfigError(
                f"SAE {info.source}: reads d_in = {info.d_in}, but the model has d_model = {d_model}: it"
                " belongs to another model"
            )
        if info.layer >= n_layers:
            raise ConfigError(
                f"SAE {info.source}: hook {info.hook_name}, but the model has {n_layers} layers"
            )
    names = names_of([entry.info for entry in loaded], [source.name for source in sources])
    named = [
        replace(entry, info=replace(entry.info, name=name)) for entry, name in zip(loaded, names, strict=True)
    ]
    return tuple(sorted(named, key=lambda entry: entry.info.layer))


def move_saes(saes: Sequence[LoadedSae], placement: Placement) -> None:
    """Have each dictionary on the device that holds the values it reads."""
    for entry in saes:
        place = entry.info.hook_name
        entry.sae.to(placement.after(entry.info.layer - place.endswith("hook_resid_pre")))


def load_sae(
    source: SaeSource,
    *,
    device: str,
    dtype: torch.dtype,
    bos_habit: Callable[[], bool] = lambda: False,
    hub: Hub | None = None,
    stamps: DictionaryStamps | None = None,
) -> LoadedSae:
    """One dictionary from a SAELens folder or release; without `bos_habit`, for a tokenizer that puts no BOS.

    Raises ConfigError, or MachineError where the hub fails.
    """
    hub = hub or Hub()
    if stamps is not None and (known := stamps.find(source, hub)) is not None:
        found = Found(known.dictionary, known.facts, known.revision)
    else:
        found = from_saelens(source, device, dtype, hub)
    name, facts = name_of(source), found.facts
    info = SaeInfo(
        hook_name=facts.hook_name,
        hook_name_out=facts.hook_name_out,
        layer=layer_of(facts.hook_name),
        d_in=facts.d_in,
        d_sae=facts.d_sae,
        d_out=facts.d_out,
        architecture=facts.architecture,
        source=name,
        weights_sha256=facts.weights_sha256,
        settings_sha256=facts.settings_sha256,
        prepend_bos=prepends_bos(source, facts.prepend_bos, name, bos_habit),
        revision=found.revision,
        neuronpedia_id=facts.neuronpedia_id,
    )
    if not facts.reconstructs:
        log.warning(
            "sae.not_for_reconstruction",
            sae=name,
            message="one layer of a cross-layer transcoder: no reconstruction error and no FVU are published",
        )
    return LoadedSae(
        info=info,
        sae=found.sae,
        center_residual=facts.center_residual,
        card=facts.card,
        reconstructs=facts.reconstructs,
        vouched=found.vouched,
        origin=found.origin,
    )


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


def name_of(source: SaeSource) -> str:
    """As messages name it."""
    return source.path.name if source.path is not None else f"{source.release}/{source.id}"


def prepends_bos(source: SaeSource, said: bool | None, name: str, bos_habit: Callable[[], bool]) -> bool:
    """Whether a dictionary reads texts with BOS before them: as configured, else as `said` by its metadata,
    else as the model's tokenizer does.
    """
    if source.prepend_bos is not None:
        return source.prepend_bos
    if said is not None:
        return bool(said)
    habit = bos_habit()
    log.info("sae.prepend_bos", sae=name, prepend_bos=habit, reason="not said: as the model's tokenizer does")
    return habit


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


def layer_of(hook_name: str) -> int:
    """`blocks.5.hook_mlp_out` -> 5."""
    match = HOOK_NAME.fullmatch(hook_name)
    assert match is not None, hook_name
    return int(match[1])


def last_layer_read(saes: Sequence[LoadedSae]) -> int:
    """The last layer that dictionaries need computed; -1 where only the input of the first is read."""
    hooks = [hook for entry in saes for hook in entry.hook_names]
    return max(layer_of(hook) - hook.endswith("hook_resid_pre") for hook in hooks)


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
