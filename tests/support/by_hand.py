"""Values inside plain Hugging Face models, by hooks on modules that are named here, family by family.

Shares no code with what finds a hook point's module, nor with TransformerLens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from daemon.model.float64 import full_precision


@dataclass(frozen=True, slots=True)
class By:
    """A module of the layer, whether its input or its output is the value, and what is made of it."""

    path: str  # empty: the layer itself
    side: str
    change: Callable[[Tensor, nn.Module], Tensor] = lambda x, module: x


def before_weight(x: Tensor, norm: nn.Module) -> Tensor:
    epsilon = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def centred(x: Tensor, norm: nn.Module) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], eps=norm.eps)


def third(number: int) -> Callable[[Tensor, nn.Module], Tensor]:
    return lambda x, module: x.chunk(3, dim=-1)[number]


LAYER_ENDS = {
    "hook_resid_pre": By("", "in"),
    "hook_resid_post": By("", "out"),
    "hook_in": By("", "in"),
    "hook_out": By("", "out"),
}
LLAMA = LAYER_ENDS | {
    "hook_resid_mid": By("post_attention_layernorm", "in"),
    "hook_attn_out": By("self_attn", "out"),
    "hook_mlp_out": By("mlp", "out"),
    "mlp.hook_in": By("mlp", "in"),
    "mlp.hook_out": By("mlp", "out"),
    "mlp.hook_post": By("mlp.down_proj", "in"),
    "attn.hook_in": By("self_attn", "in"),
    "attn.hook_z": By("self_attn.o_proj", "in"),
    "attn.hook_q": By("self_attn.q_proj", "out"),
    "ln1.hook_normalized": By("input_layernorm", "in", before_weight),
    "ln2.hook_normalized": By("post_attention_layernorm", "in", before_weight),
}
GEMMA = LAYER_ENDS | {
    "hook_resid_mid": By("pre_feedforward_layernorm", "in"),
    "hook_attn_out": By("post_attention_layernorm", "out"),
    "hook_mlp_out": By("post_feedforward_layernorm", "out"),
    "mlp.hook_in": By("pre_feedforward_layernorm", "out"),
    "attn.hook_in": By("self_attn", "in"),
    "attn.hook_z": By("self_attn.o_proj", "in"),
    "ln2.hook_normalized": By("pre_feedforward_layernorm", "in", before_weight),
}
GPT2 = LAYER_ENDS | {
    "hook_resid_mid": By("ln_2", "in"),
    "hook_attn_out": By("attn.c_proj", "out"),
    "hook_mlp_out": By("mlp.c_proj", "out"),
    "attn.hook_z": By("attn.c_proj", "in"),
    "attn.hook_v": By("attn.c_attn", "out", third(2)),
    "ln2.hook_normalized": By("ln_2", "in", centred),
}
NEOX = LAYER_ENDS | {
    "hook_attn_out": By("attention.dense", "out"),
    "hook_mlp_out": By("mlp", "out"),
    "mlp.hook_in": By("post_attention_layernorm", "out"),
    "attn.hook_z": By("attention.dense", "in"),
}
PLACES: dict[str, dict[str, By]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen3": LLAMA,
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gpt2": GPT2,
    "gpt_neox": NEOX,
}


def layers_of(model) -> nn.ModuleList:
    for name in ("layers", "h"):
        if hasattr(model.base_model, name):
            return getattr(model.base_model, name)
    raise LookupError(type(model).__name__)


def by_hand(
    folder: Path, family: str, hook_names: Sequence[str], texts: Sequence[Sequence[int]], dtype: torch.dtype
) -> Mapping[str, list[Tensor]]:
    """Per hook point (`blocks.L.NAME`) and text the values (tokens, d), each text run by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    got: dict[str, list[Tensor]] = {name: [] for name in hook_names}

    def note(
        name: str, tensor: Tensor, change: Callable[[Tensor, nn.Module], Tensor], module: nn.Module
    ) -> None:
        rows = tensor[0] if tensor.ndim == 3 else tensor
        got[name].append(change(rows.clone(), module))

    for name in got:
        _, layer, place = name.split(".", 2)
        by = PLACES[family][place]
        module = layers_of(model)[int(layer)].get_submodule(by.path)
        if by.side == "in":
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name, by=by: note(
                    name, args[0] if args else kwargs["hidden_states"], by.change, module
                ),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(
                lambda module, args, output, name=name, by=by: note(
                    name, output if torch.is_tensor(output) else output[0], by.change, module
                )
            )
    with torch.inference_mode(), full_precision(dtype):
        for text in texts:
            model.base_model(torch.tensor([text]), use_cache=False)
    return got


def last(of_texts: Sequence[Tensor]) -> Tensor:
    """(texts, d) of each text's last token."""
    return torch.stack([rows[-1] for rows in of_texts])
