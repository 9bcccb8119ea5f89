"""Decoder layers of Llama's kind with compiled code between their matrix products: in float32, on a CPU.

A Hugging Face layer passes over all hidden states again and again for its norms and rotary embeddings. Here
the norms' weights are part of the products that read them, and compiled code does the rest. Knows no texts.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from daemon.model.attention import BlockPlan, Call, Plan, attending, current
from daemon.model.onednn import (
    FUSED_ACTIVATIONS,
    ChunkedLinear,
    GatedMlp,
    agrees,
    linear,
)
from daemon.model.row_sizes import RowSizes
from daemon.model.trunk import Trunk
from daemon.native.rmsnorm_rope_attention import Heads, InputNorm, Routines, add_norm, routines
from daemon.native.threads import one_thread_each

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # of a layer, and of those
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PROBE_SCALES = (1e-3, 1.0, 10.0)  # of random hidden states: in small ones a norm's epsilon counts


class FusedDecoderLayer(nn.Module):
    """Norm, attention, residual sum; norm, gated MLP, residual sum."""

    def __init__(self, layer: Any, found: Routines, heads: Heads) -> None:
        """Does the work of a Hugging Face layer that attends by these `heads`."""
        super().__init__()
        self.sizes = RowSizes()
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        before, between = layer.input_layernorm, layer.post_attention_layernorm
        self._found, self._heads = found, heads
        # without bias: the compiled code divides by the norm, then adds the bias
        self._qkv = linear(torch.cat([q.weight, k.weight, v.weight]) * before.weight, None)
        self._out = linear(attention.o_proj.weight, attention.o_proj.bias)
        biases = [q.bias, k.bias, v.bias]
        self._bias = None if biases[0] is None else torch.cat(biases)
        self._epsilons = epsilon(before), epsilon(between)
        self._mlp = GatedMlp(
            linear(mlp.gate_proj.weight * between.weight, mlp.gate_proj.bias),
            linear(mlp.up_proj.weight * between.weight, mlp.up_proj.bias),
            linear(mlp.down_proj.weight, mlp.down_proj.bias),
            mlp.act_fn,
        )

    @property
    def heads(self) -> Heads:
        """How it attends."""
        return self._heads

    @property
    def epsilons(self) -> tuple[float, float]:
        """What the norms before the attention and before the MLP add to the mean square."""
        return self._epsilons

    @property
    def products(self) -> tuple[ChunkedLinear, ChunkedLinear, GatedMlp]:
        """The modules that multiply."""
        return self._qkv, self._out, self._mlp

    def use(self, sizes: RowSizes) -> None:
        """Multiply rows by chunks of these sizes."""
        self.sizes = self._qkv.sizes = sizes

    def forward(
        self, hidden_states: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **others: object
    ) -> Tensor:
        """hidden_states: (1, n, d_model) -> the same; n splits into chunks of `sizes`.

        position_embeddings: cosines and sines (1, n, d_head), both halves of which are alike.
        """
        plan = current.get()
        assert isinstance(plan, BlockPlan)
        x = hidden_states[0].contiguous()  # (n, d_model)
        cos, sin = (table[0].contiguous() for table in position_embeddings)
        nodes = plan.nodes(self._heads.window)
        norm = InputNorm(x, self._epsilons[0], self._bias)
        attended = self._heads.attended_after_norm(self._found, nodes, self._qkv(x), norm, cos, sin)

        def after_attention(rows: slice) -> Tensor:
            added = self._out.multiply(attended[rows])
            normed = add_norm(self._found, added, x[rows], self._epsilons[1])
            result: Tensor = self._mlp(normed, added)
            return result

        # in chunks, so that what passes between products stays in the caches
        results = one_thread_each(after_attention, self.sizes.chunks(len(x), torch.get_num_threads()))
        result = results[0] if len(results) == 1 else torch.cat(results)
        return result[None]


def epsilon(norm: nn.Module) -> float:
    """The number that a norm adds to the mean square. Raises AttributeError."""
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    return float(getattr(norm, name))


@dataclass(slots=True)
class RecordingPlan:
    """A plan that records the calls of layers."""

    plan: Plan
    calls: list[Call] = field(default_factory=list)

    @property
    def slides(self) -> bool:
        return self.plan.slides

    def attend(self, call: Call) -> Tensor:
        self.calls.append(call)
        return self.plan.attend(call)


def fuse_layers(trunk: Trunk, plan: Plan, run: Callable[[], object]) -> int:
    """Replace the layers of a trunk whose fused form gives the same result; returns how many.

    `run` runs the trunk on some texts by `plan`. A layer that is read inside keeps its modules.
    """
    found = routines()
    matching = [
        has_llama_parts(layer) and not trunk.is_read_inside(number)
        for number, layer in enumerate(trunk.layers)
    ]
    if found is None or not any(matching):
        return 0
    replaced = 0
    for number, given in enumerate(arguments(trunk.layers, run)):
        if not matching[number]:
            continue
        if (fused := fused_layer(trunk.layers[number], given, plan, found)) is not None:
            trunk.replace(number, fused)
            replaced += 1
    return replaced


def has_llama_parts(layer: Any) -> bool:
    """Whether a layer has the parts of one of Llama's, and no others."""
    if names(layer) != PARTS or names(layer.self_attn) != ATTENTION_PARTS or names(layer.mlp) != MLP_PARTS:
        return False
    linears = [getattr(layer.self_attn, name) for name in ATTENTION_PARTS]
    linears += [getattr(layer.mlp, name) for name in MLP_PARTS - {"act_fn"}]
    return type(layer.mlp.act_fn).__name__ in FUSED_ACTIVATIONS and all(
        type(one) is nn.Linear and one.weight.dtype == torch.float32 and one.weight.device.type == "cpu"
        for one in linears
    )


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def arguments(layers: list[nn.Module], run: Callable[[], object]) -> list[dict[str, Any]]:
    """The keyword arguments that each layer is called with."""
    given: list[dict[str, Any]] = []
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda layer, args, kwargs: given.append(kwargs), with_kwargs=True
            )
            hooks.callback(hook.remove)
        run()
    return given


def heads_of(layer: Any, asked: Call, cos: Tensor) -> Heads | None:
    """How a layer attends that made this call, if the compiled code can do it.

    All heads must be of one width, the whole of a head must turn, and the products' widths must fit.
    """
    attention = layer.self_attn
    (_, n_heads, _, d_head), key_heads = asked.query.shape, asked.key.shape[1]
    widths = [attention.q_proj.out_features, attention.o_proj.in_features]
    key_widths = [attention.k_proj.out_features, attention.v_proj.out_features]
    if (
        {cos.shape[-1], asked.key.shape[3], asked.value.shape[3]} != {d_head}
        or asked.value.shape[1] != key_heads
        or widths != 2 * [n_heads * d_head]
        or key_widths != 2 * [key_heads * d_head]
        or asked.softcap is not None
    ):
        return None
    heads = asked.heads
    return heads if heads.fit else None


def fused_layer(layer: Any, given: dict[str, Any], plan: Plan, found: Routines) -> FusedDecoderLayer | None:
    """The fused form of a layer, if it adds the same to random hidden states."""
    recording = RecordingPlan(plan)
    try:
        cos = given["position_embeddings"][0]
        n, width = cos.shape[1], layer.self_attn.q_proj.in_features
        x = torch.randn(1, n, width, generator=torch.Generator().manual_seed(0))
        x *= torch.tensor(PROBE_SCALES).repeat(n)[:n, None]
        with torch.inference_mode(), attending(recording):
            expected = layer(x, **given) - x
        heads = heads_of(layer, recording.calls[0], cos)
        if heads is None:
            return None
        with torch.inference_mode(), attending(plan):
            fused = FusedDecoderLayer(layer, found, heads)
            same = agrees(expected, fused(x, **given) - x)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it is of another kind
        return None
    return fused if same else None
