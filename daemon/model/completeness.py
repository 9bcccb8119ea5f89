"""Accepts a model's weights: nothing that the layers read need is missing, left over or not finite.

Transformers fills what a checkpoint lacks with random numbers and drops what it does not know. Knows nothing
about SAEs or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from daemon.devices import to_exact
from daemon.errors import ConfigError
from daemon.model.placement import weight_of
from daemon.model.trunk import UnknownModel, decoder_layers
from daemon.model.weightfiles import named

# Buffers that older versions of Transformers saved, and computes anew: masks, positions, rotary frequencies.
DERIVED = re.compile(
    r"(?:^|\.)(?:(?:attn|attention|self_attn|self_attention)\.(?:bias|masked_bias)|rotary\w*\.(?:inv_freq|cos_cached|sin_cached)"
    r"|inv_freq|position_ids|embed_positions\._float_tensor|version|num_batches_tracked)$"
)
# Parts that come after the layers or beside them: heads, final norms, other senses, layers that predict
# further tokens.
BESIDE = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_projection|score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head"
    r"|multi_?modal_projector|mm_projector|visual|vision\w*|audio\w*|embed_vision|embed_audio|mtp\w*|nextn\w*)(?:\.|$)"
)
FINAL_NORM = re.compile(
    r"(?:^|\.)(?:ln_f|norm_f|norm|final_norm|final_layer_?norm|ln_final|layer_norm)\.(?:weight|bias)$"
)
HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out|output_projection)\.")
NUMBERED = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")
WRAPPERS = (  # how names look, whose they are, and the remedy
    (
        re.compile(r"(?:^|\.)_orig_mod\."),
        "torch.compile",
        "save the module that was compiled (model._orig_mod)",
    ),
    (
        re.compile(r"(?:^|\.)(?:_fsdp_wrapped_module|_flat_param|_fpw_module)(?:\.|$)"),
        "FSDP",
        "save a full state dict",
    ),
    (
        re.compile(r"(?:^|\.)_checkpoint_wrapped_module\."),
        "activation checkpointing",
        "save the wrapped module",
    ),
    (
        re.compile(r"^base_model\.model\.|(?:^|\.)(?:lora_|base_layer\.|modules_to_save\.|ia3_|oft_|vera_)"),
        "PEFT",
        "merge the adapter (merge_and_unload) and save again",
    ),
    (re.compile(r"^module\."), "DataParallel or DeepSpeed", "save model.module"),
    (
        re.compile(r"(?:^|\.)parametrizations\."),
        "a parametrization",
        "remove it (remove_parametrizations) and save again",
    ),
    (
        re.compile(
            r"(?:weight_scale(?:_inv)?|qweight|qzeros|scales|weight_packed|absmax|quant_state\S*|SCB)$"
        ),
        "a quantised model without its quantization_config",
        "use the unquantised version",
    ),
)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """How a checkpoint fits its model: the names that it lacks, and those that the model lacks."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @classmethod
    def of(cls, info: dict[str, Any]) -> LoadReport:
        return cls(tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"])))


class LayersRead:
    """The part of a Hugging Face model that runs: embeddings, and layers up to the last one that is read."""

    def __init__(self, model: Any, last_layer: int, *, to_logits: bool = False) -> None:
        """`last_layer` is -1 where only the input of the first is read; `to_logits`, norm and head run."""
        self.last_layer = last_layer
        self._to_logits = to_logits
        head = model.get_output_embeddings() if to_logits else None
        self._head = next((name for name, part in model.named_modules() if part is head), "")
        try:
            layers = decoder_layers(model)
        except UnknownModel:
            layers = None
        self._layers = next((name for name, part in model.named_modules() if part is layers), "")
        self._trunk = self._layers.rpartition(".")[0]  # the module that holds the layers
        embeddings = model.get_input_embeddings()
        self._embeddings = next((name for name, part in model.named_modules() if part is embeddings), "")

    def has(self, name: str) -> bool:
        """Whether a parameter or buffer, by its name in the model, takes part."""
        if self._head and name.startswith(f"{self._head}."):
            return True
        if not self._layers:
            return BESIDE.search(name) is None
        if name.startswith(f"{self._layers}."):
            number = name.removeprefix(f"{self._layers}.").partition(".")[0]
            return not number.isdecimal() or int(number) <= self.last_layer
        if self._embeddings and name.startswith(f"{self._embeddings}."):
            return True
        if self._trunk and not name.startswith(f"{self._trunk}."):
            return False
        rest = name.removeprefix(f"{self._trunk}.")
        if FINAL_NORM.search(rest) is not None:
            return self._to_logits
        return BESIDE.search(rest) is None

    def concerns(self, name: str) -> bool:
        """Whether a tensor that the model does not know could have changed what is read."""
        if self._to_logits and HEAD.search(name):
            return True
        if DERIVED.search(name) or BESIDE.search(name):
            return False
        if (number := NUMBERED.search(name)) is not None:
            return int(number[1]) <= self.last_layer
        return self._to_logits or FINAL_NORM.search(name) is None or "embed" in name


def check_complete(what: str, model: Any, report: LoadReport, read: LayersRead) -> None:
    """Raises ConfigError, naming tensors and the remedy, where a checkpoint does not fit the layers read."""
    missing = [name for name in report.missing if read.has(name)]
    unexpected = [name for name in report.unexpected if read.concerns(name)]
    if not missing and not unexpected:
        return
    found = []
    if missing:
        found.append(f"lack {named(missing, 2)}")
    if unexpected:
        found.append(f"hold {named(unexpected, 2)}, which {type(model).__name__} does not have")
    raise ConfigError(f"{what}: its weights {' and '.join(found)}: {remedy(missing, unexpected)}")


def remedy(missing: Iterable[str], unexpected: Iterable[str]) -> str:
    """The remedy for names that do not fit."""
    left_over = list(unexpected)
    for pattern, whose, advice in WRAPPERS:
        if any(pattern.search(name) for name in left_over):
            return f"these are names of {whose}: {advice}"
    lacking = set(missing)
    for name in left_over:
        prefix = next((name.removesuffix(want) for want in lacking if name.endswith(want)), "")
        if prefix:
            return f"strip the prefix {prefix!r} from the names and save again"
    return "use a complete checkpoint whose config.json belongs to it"


def check_finite(what: str, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None) -> None:
    """Raises ConfigError for a tensor with NaN or infinity, naming it. One pass, without a copy."""
    for name, tensor in tensors:
        if tensor.numel() == 0 or not tensor.is_floating_point():
            continue
        there = to_exact(tensor)
        low, high = torch.aminmax(there if there.element_size() > 1 else there.float())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            within = f" in {str(dtype).removeprefix('torch.')}" if dtype is not None else ""
            wider = ", or set model.dtype = float32 or bfloat16" if dtype == torch.float16 else ""
            raise ConfigError(f"{what}: {name} holds NaN or infinity{within}: use an undamaged copy{wider}")


def check_model_finite(what: str, model: Any, read: LayersRead) -> None:
    """The same of the parameters of the layers read, and of the rotary frequencies."""
    check_finite(
        what,
        ((name, weight_of(model, name, part)) for name, part in model.named_parameters() if read.has(name)),
        next(model.parameters()).dtype,
    )
    for name, tensor in model.named_buffers():
        if name.endswith("inv_freq") and read.has(name) and not bool(torch.isfinite(to_exact(tensor)).all()):
            raise ConfigError(
                f"{what}: its rotary frequencies are not finite: correct rope_parameters in config.json"
            )
