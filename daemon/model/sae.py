"""SAELens dictionaries, loaded and checked against a model. Knows nothing about batches or analysis."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import structlog
import torch
from torch import Tensor

from daemon.errors import ConfigError
from daemon.model.dictionary import HOOK_NAME, SaeSource, name_of
from daemon.model.dictionary_stamps import DictionaryStamps, Origin
from daemon.model.hub import Hub
from daemon.model.placement import Placement
from daemon.model.sae_names import names_of
from daemon.model.saelens import Found, from_saelens
from daemon.model_info import Fit, SaeInfo

RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")

log = structlog.get_logger()


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

    `bos_habit` tells whether the model's tokenizer puts BOS before a text: so do those that say nothing.
    Those that `stamps` vouch for come without SAELens. Raises ConfigError, naming the dictionary, where one
    can't be loaded or does not fit.
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


def layer_of(hook_name: str) -> int:
    """`blocks.5.hook_mlp_out` -> 5."""
    match = HOOK_NAME.fullmatch(hook_name)
    assert match is not None, hook_name
    return int(match[1])


def last_layer_read(saes: Sequence[LoadedSae]) -> int:
    """The last layer that dictionaries need computed; -1 where only the input of the first is read."""
    hooks = [hook for entry in saes for hook in entry.hook_names]
    return max(layer_of(hook) - hook.endswith("hook_resid_pre") for hook in hooks)
