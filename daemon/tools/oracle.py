"""The model and the dictionaries as Transformers and SAELens load them: one text at a time, nothing shared.

What `lensd verify` compares with. Plain Hugging Face modules are read by forward hooks, SAELens encodes and
decodes; no engine, no loader and no encoder of the daemon has a part in it. Knows nothing about batches.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daemon.config import Config, SaeSection
from daemon.devices import exact_device
from daemon.errors import ConfigError
from daemon.model.auto_class import auto_class
from daemon.model.float64 import full_precision
from daemon.model.hub import Hub, repository_of, serving
from daemon.model.loading import resolve_device
from daemon.model.location import fetch_weights, locate_model
from daemon.model.pickles import refused_pickles, weights_only_pickles
from daemon.model.placement import asked_map
from daemon.model.plain_hooks import PlainHooks
from daemon.model.plain_trace import Unreachable
from daemon.model.smollm2 import default_cache_dir
from daemon.records import FloatArray
from daemon.tools.reference import ReferenceLayer

LAYER = re.compile(r"blocks\.(\d+)\.")
WRITES = re.compile(r".*\.hook_(resid_pre|resid_mid|resid_post|attn_out|mlp_out)")


@dataclass(frozen=True, slots=True)
class PlainDictionary:
    """A dictionary of SAELens, and the plain places that it reads and reconstructs."""

    sae: Any
    read: str
    written: str
    reconstructs: bool = True

    @property
    def layer(self) -> int:
        match = LAYER.match(self.read)
        assert match is not None, self.read
        return int(match[1])

    @property
    def centred(self) -> bool:
        """Whether it was trained on a model whose writes to the residual stream have no mean."""
        return bool((self.sae.cfg.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"))

    def of_model(self, value: Tensor, place: str) -> Tensor:
        """The model's value at a place (1, d), as the dictionary was trained on it."""
        value = value.to(self.sae.W_dec)
        return value - value.mean() if self.centred and WRITES.fullmatch(place) else value

    def encode(self, x: FloatArray) -> FloatArray:
        """(M, d_in) -> (M, d_sae), dense."""
        with torch.inference_mode():
            return to_array(self.sae.encode(torch.from_numpy(x).to(self.sae.W_dec)))


class Oracle:
    """Each text by itself."""

    def __init__(self, config: Config) -> None:
        """Load all anew. Raises ConfigError where plain modules do not give what a dictionary reads."""
        dtype = getattr(torch, config.model.dtype)
        device = exact_device(resolve_device(config.model.device, dtype))  # the host checks MPS
        sae_dtype = "float64" if dtype == torch.float64 else "float32"
        hub = Hub()
        dictionaries = [plain_dictionary(source, device, sae_dtype, hub) for source in config.sae]
        self.dictionaries = sorted(dictionaries, key=lambda each: each.layer)
        name = config.model.name
        location = locate_model(name, default_cache_dir(), config.model.revision, hub)
        if location.snapshot is not None:
            fetch_weights(location.snapshot, f"model {name}")
        model = plain_model(
            location.target, device, dtype, spread=asked_map(config.model.device_map) is not None
        )
        self._model, self._dtype = model, dtype
        places = [place for each in self.dictionaries for place in (each.read, each.written)]
        try:
            self._plain = PlainHooks(model, dict.fromkeys(places), model.config.get_text_config().vocab_size)
        except Unreachable as error:
            raise ConfigError(f"model {name}: plain modules can't tell what is there: {error}") from None

    def layers(self, texts: Sequence[Sequence[int]]) -> list[ReferenceLayer]:
        """Texts as token ids, each alone -> per dictionary what it makes of their last tokens."""
        return self.layers_of([texts] * len(self.dictionaries))

    def layers_of(self, texts: Sequence[Sequence[Sequence[int]]]) -> list[ReferenceLayer]:
        """The same of texts that are given for each dictionary as it reads them."""
        distinct = {tuple(text) for of_one in texts for text in of_one}
        values = {text: self._plain.read(text) for text in distinct}
        return [
            self._layer(each, [values[tuple(text)] for text in of_one])
            for each, of_one in zip(self.dictionaries, texts, strict=True)
        ]

    def log_probs(self, text: Sequence[int]) -> FloatArray:
        """(length,) natural-log probability of each token from those before it; NaN for the first."""
        tokens = torch.tensor([list(text)], device=self._plain.device)
        with torch.inference_mode(), full_precision(self._dtype):
            logits = self._model(input_ids=tokens, use_cache=False).logits[0]
        found = np.full(len(text), np.nan)
        for i in range(1, len(text)):
            before = to_array(logits[i - 1])
            found[i] = before[text[i]] - before.max() - np.log(np.exp(before - before.max()).sum())
        return found

    def _layer(self, dictionary: PlainDictionary, values: Sequence[dict[str, Tensor]]) -> ReferenceLayer:
        xs, targets, feature_acts, reconstructions = [], [], [], []
        for at in values:
            x = dictionary.of_model(at[dictionary.read][-1:], dictionary.read)
            target = dictionary.of_model(at[dictionary.written][-1:], dictionary.written)
            with torch.inference_mode():
                feature_acts.append(to_array(dictionary.sae.encode(x)[0]))
                reconstruction = to_array(dictionary.sae(x)[0])
                reconstructions.append(reconstruction if dictionary.reconstructs else reconstruction * np.nan)
            xs.append(to_array(x[0]))
            targets.append(to_array(target[0]))
        W_dec = to_array(dictionary.sae.W_dec)
        return ReferenceLayer(dictionary.layer, xs, targets, feature_acts, reconstructions, W_dec)


def plain_model(target: str, device: str, dtype: torch.dtype, *, spread: bool = False) -> Any:
    """A causal language model as Transformers has it, in evaluation mode; `spread` over all devices."""
    from transformers import AutoConfig

    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "use_safetensors": True}
    if dtype == torch.float64:  # of experts, which know no other way in it
        options["experts_implementation"] = "eager"
    with warnings.catch_warnings(), refused_pickles("the model"):
        warnings.simplefilter("ignore")
        options["device_map"] = "auto" if spread else None
        kind = auto_class(AutoConfig.from_pretrained(target, trust_remote_code=False))
        model = kind.from_pretrained(target, trust_remote_code=False, **options)
    model = model if spread else model.to(device)
    return model.requires_grad_(False).eval()


def plain_dictionary(source: SaeSection, device: str, dtype: str, hub: Hub | None = None) -> PlainDictionary:
    """A dictionary as SAELens has it."""
    from sae_lens import SAE

    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    with warnings.catch_warnings(record=True) as said, weights_only_pickles("the dictionary"):
        warnings.simplefilter("always")
        if source.path is not None:
            sae = SAE.load_from_disk(Path(source.path), device=device, dtype=dtype)
            fold_scaler(sae, Path(source.path))
        else:
            assert source.release is not None and source.id is not None
            with serving((hub or Hub()).snapshot(repository_of(source.release), source.revision)):
                sae = SAE.from_pretrained(source.release, source.id, device=device, dtype=dtype)
    sae.requires_grad_(False)
    sae.turn_off_forward_pass_hook_z_reshaping()  # plain values have heads side by side
    read = sae.cfg.metadata.hook_name
    written = getattr(sae.cfg.metadata, "hook_name_out", None) or read
    if read.endswith(".hook_mlp_in"):  # of Gemma Scope 2: after the MLP's norm
        read = read.replace("hook_mlp_in", "mlp.hook_in")
    reconstructs = not any("not for reconstruction" in str(warning.message) for warning in said)
    return PlainDictionary(sae, read, written, reconstructs)


def fold_scaler(sae: Any, folder: Path) -> None:
    """Fold what SAELens's training normalised by, where a checkpoint has it beside its weights."""
    from sae_lens.training.activation_scaler import ActivationScaler

    path, mode = folder / "activation_scaler.json", sae.cfg.normalize_activations
    if mode not in ("expected_average_only_in", "covariance_whitening") or not path.is_file():
        return
    scaler = ActivationScaler()
    scaler.load(path)
    if mode == "expected_average_only_in" and scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    elif mode == "covariance_whitening" and scaler.whitening is not None:
        whitening = scaler.whitening
        sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)


def to_array(tensor: Tensor) -> FloatArray:
    array: FloatArray = tensor.double().cpu().numpy()
    return array
