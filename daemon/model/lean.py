"""Decoder layers of Llama's kind with little between their matrix products: in float32, on a CPU.

A Hugging Face layer passes over all hidden states again and again for its norms and rotary embeddings. Here
the norms' weights are part of the products that read them; queries and keys turn in place. Knows no texts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from daemon.model.attention import BlockPlan, Call, Plan, attending, current
from daemon.model.between import Heads, Routines, add_norm, routines
from daemon.model.onednn import (
    FUSED_ACTIVATIONS,
    PackedGatedMlp,
    PackedLinear,
    agrees,
    filled_rows,
    packs,
    row_chunks,
)
from daemon.model.trunk import Trunk

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # of a layer, and of those
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
PROBE_SCALES = (1e-3, 1.0, 10.0)  # of random hidden states: in small ones a norm's epsilon counts


class LeanLayer(nn.Module):
    """Norm, attention, residual sum; norm, gated MLP, residual sum.

    What is no product is done by the compiled routines of lean.c where they are there, else by torch.
    """

    def __init__(self, layer: Any, asked: Call) -> None:
        """Does what a Hugging Face layer does that asked attention for this."""
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        before, between = layer.input_layernorm, layer.post_attention_layernorm
        weight = torch.cat([q.weight, k.weight, v.weight]) * before.weight
        bias = None if q.bias is None else torch.cat([q.bias, k.bias, v.bias])
        found = routines()
        heads = Heads(
            *(asked.query.shape[1], asked.key.shape[1], asked.query.shape[3]),
            scale=asked.scale,
            window=asked.window,
            bias=bias,
            epsilon=epsilon(before),
        )
        if found is not None and asked.softcap is None and heads.suit(found):
            self._routines: Routines | None = found
            self._attention: CompiledAttention | TorchAttention = CompiledAttention(found, heads, weight)
        else:
            self._routines = None
            self._attention = TorchAttention(asked, weight, bias, epsilon(before))
        self._out = PackedLinear(attention.o_proj.weight, attention.o_proj.bias)
        self._epsilon = epsilon(between)
        self._mlp = PackedGatedMlp(
            PackedLinear(mlp.gate_proj.weight * between.weight, mlp.gate_proj.bias),
            PackedLinear(mlp.up_proj.weight * between.weight, mlp.up_proj.bias),
            PackedLinear(mlp.down_proj.weight, mlp.down_proj.bias),
            FUSED_ACTIVATIONS[type(mlp.act_fn).__name__],
        )

    @property
    def products(self) -> tuple[PackedLinear, PackedLinear, PackedGatedMlp]:
        """What multiplies, some rows at a time."""
        return self._attention.qkv, self._out, self._mlp

    def multiply(self, rows: int) -> None:
        """Run the products on so many rows of zeros, as `forward` does."""
        qkv, out, mlp = self.products
        qkv(torch.zeros(rows, qkv.shape[1]))
        added = out(torch.zeros(rows, out.shape[1]))
        mlp(added, added)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        keep: Tensor | None = None,
        **others: object,
    ) -> Tensor:
        """hidden_states: (1, n, d_model) -> the same, or with `keep` (K,) of those tokens: (1, K, d_model).

        position_embeddings: cosines and sines (1, n, d_head), both halves of which are alike.
        """
        x = hidden_states[0].contiguous()  # (n, d_model)
        cos, sin = (table[0].contiguous() for table in position_embeddings)
        attended = self._attention(x, cos, sin)
        if keep is not None:
            kept = F.pad(keep, (0, filled_rows(len(keep)) - len(keep)))
            x, attended = x.index_select(0, kept), attended.index_select(0, kept)
        results = []
        for rows in row_chunks(len(x)):
            added = self._out(attended[rows])
            if self._routines is None:
                normed = normalised(added.add_(x[rows]), self._epsilon)
            else:
                normed = add_norm(self._routines, added, x[rows], self._epsilon)
            results.append(self._mlp(normed, added))
        result = results[0] if len(results) == 1 else torch.cat(results)
        return result[None] if keep is None else result[None, : len(keep)]


class CompiledAttention(nn.Module):
    """Norm, queries, keys and values, and attention, by lean.c."""

    def __init__(self, found: Routines, heads: Heads, weight: Tensor) -> None:
        """weight: ((heads + 2 key heads) x d_head, d_model)."""
        super().__init__()
        self._found, self._heads = found, heads
        self.qkv = PackedLinear(weight, None)  # the norm comes after it, and the bias after that

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (n, d_model), cos and sin: (n, d_head) -> what each head attends to (n, heads * d_head)."""
        plan = current.get()
        assert isinstance(plan, BlockPlan)
        nodes = plan.nodes(self._heads.window)
        return self._heads.attended(self._found, nodes, x, self.qkv, cos, sin)


class TorchAttention(nn.Module):
    """The same by torch: queries and keys turn in place, as complex numbers."""

    def __init__(self, asked: Call, weight: Tensor, bias: Tensor | None, epsilon: float) -> None:
        super().__init__()
        self._d_head = asked.query.shape[3]
        self._heads = [asked.query.shape[1], asked.key.shape[1], asked.value.shape[1]]
        self._call = functools.partial(Call, window=asked.window, scale=asked.scale, softcap=asked.softcap)
        self._epsilon = epsilon
        turning = paired(sum(self._heads[:2]) * self._d_head, self._d_head)
        order = torch.cat([turning, torch.arange(len(turning), len(weight))])
        self.qkv = PackedLinear(weight[order], None if bias is None else bias[order])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = self._d_head // 2
        turns = torch.complex(cos[:, :half], sin[:, :half]).unsqueeze(1)  # (n, 1, half)
        projected = [self.qkv(normalised(x[rows], self._epsilon)) for rows in row_chunks(len(x))]
        qkv: Any = torch.cat(projected).view(len(x), -1, self._d_head)  # (n, all heads, d_head)
        turned = qkv[:, : -self._heads[2]].unflatten(2, (half, 2))
        torch.view_as_complex(turned).mul_(turns)
        call: Call = self._call(*qkv.transpose(0, 1).unsqueeze(0).split(self._heads, dim=1))
        attended: Tensor = current.get().attend(call).flatten(2)
        return attended[0]


def normalised(x: Tensor, epsilon: float) -> Tensor:
    """x: (n, d) with rows of mean square one, but for epsilon."""
    scale: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * scale.square_().div_(x.shape[1]).add_(epsilon).rsqrt_()


def paired(width: int, d_head: int) -> Tensor:
    """The order (width,) in which features i and i + d_head / 2 of a head, which turn together, meet.

    With queries and keys both in that order, their products stay the same.
    """
    order: Tensor = torch.arange(width).view(-1, 2, d_head // 2).mT.flatten()
    return order


def epsilon(norm: nn.Module) -> float:
    """What a norm adds to the mean square. Raises AttributeError."""
    name = "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"
    return float(getattr(norm, name))


@dataclass(slots=True)
class Heard:
    """A plan that notes what it is asked for."""

    plan: Plan
    calls: list[Call] = field(default_factory=list)

    @property
    def slides(self) -> bool:
        return self.plan.slides

    def attend(self, call: Call) -> Tensor:
        self.calls.append(call)
        return self.plan.attend(call)


def make_lean(trunk: Trunk, plan: Plan, run: Callable[[], object]) -> int:
    """Replace the layers of a trunk where a lean one gives the same result; how many were.

    `run` runs the trunk on some texts, packed, by `plan`.
    """
    kind = list(map(is_of_the_kind, trunk.layers))
    if not any(kind):
        return 0
    replaced = 0
    for number, given in enumerate(arguments(trunk.layers, run)):
        if kind[number] and (lean := lean_layer(trunk.layers[number], given, plan)) is not None:
            trunk.replace(number, lean)
            replaced += 1
    return replaced


def is_of_the_kind(layer: Any) -> bool:
    """Whether a layer has the parts of one of Llama's, and no others."""
    if names(layer) != PARTS or names(layer.self_attn) != ATTENTION_PARTS or names(layer.mlp) != MLP_PARTS:
        return False
    linears = [getattr(layer.self_attn, name) for name in ATTENTION_PARTS]
    linears += [getattr(layer.mlp, name) for name in MLP_PARTS - {"act_fn"}]
    return type(layer.mlp.act_fn).__name__ in FUSED_ACTIVATIONS and all(
        type(linear) is nn.Linear and linear.weight.dtype == torch.float32 and packs(linear.weight)
        for linear in linears
    )


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


def arguments(layers: list[nn.Module], run: Callable[[], object]) -> list[dict[str, Any]]:
    """What each layer is given besides hidden states."""
    given: list[dict[str, Any]] = []
    with ExitStack() as hooks:
        for layer in layers:
            hook = layer.register_forward_pre_hook(
                lambda layer, args, kwargs: given.append(kwargs), with_kwargs=True
            )
            hooks.callback(hook.remove)
        run()
    return given


def turns_whole_heads(attention: Any, asked: Call, cos: Tensor) -> bool:
    """Whether heads are of one width, all of which turns, and are what the products give and take."""
    (_, heads, _, d_head), key_heads = asked.query.shape, asked.key.shape[1]
    widths = [attention.q_proj.out_features, attention.o_proj.in_features]
    key_widths = [attention.k_proj.out_features, attention.v_proj.out_features]
    return (
        {cos.shape[-1], asked.key.shape[3], asked.value.shape[3]} == {d_head}
        and asked.value.shape[1] == key_heads
        and widths == 2 * [heads * d_head]
        and key_widths == 2 * [key_heads * d_head]
    )


def lean_layer(layer: Any, given: dict[str, Any], plan: Plan) -> LeanLayer | None:
    """The lean form of a layer of the kind, if it adds the same to random hidden states."""
    heard = Heard(plan)
    try:
        cos = given["position_embeddings"][0]
        n, width = cos.shape[1], layer.self_attn.q_proj.in_features
        x = torch.randn(1, n, width, generator=torch.Generator().manual_seed(0))
        x *= torch.tensor(PROBE_SCALES).repeat(n)[:n, None]
        with torch.inference_mode(), attending(heard):
            expected = layer(x, **given) - x
        if not turns_whole_heads(layer.self_attn, heard.calls[0], cos):
            return None
        with torch.inference_mode(), attending(plan):
            lean = LeanLayer(layer, heard.calls[0])
            same = agrees(expected, lean(x, **given) - x)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it is of another kind
        return None
    return lean if same else None
