"""A decoder of Llama's kind, all of whose layers are fused, made of weight files without Transformers.

A trunk runs it as it runs a Hugging Face module. Knows no SAE, and not whether it computes the same as that:
`daemon.model.model_stamps` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from daemon.model.fused_layers import FusedDecoderLayer
from daemon.native.rmsnorm_rope_attention import Heads, Routines
from daemon.native.threads import side_by_side

ACTIVATIONS = {"SiLU": nn.SiLU, "SiLUActivation": nn.SiLU}  # by the name of the module's class
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class LayerShape:
    """How a layer attends and norms, besides its weights."""

    heads: int
    key_heads: int
    d_head: int
    scale: float
    window: int | None
    epsilon: float  # of the norm before the attention
    mlp_epsilon: float  # of the norm before the MLP
    activation: str  # of the MLP: a key of ACTIVATIONS


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """All of a decoder besides its weights."""

    layers: tuple[LayerShape, ...]  # those that run
    inv_freq: tuple[float, ...]  # (d_head / 2,) of the rotary embedding
    rotary_scale: float  # of its cosines and sines
    prefix: str  # of the names of its tensors in the weight files


class Config:
    """The part of a configuration that a trunk asks for."""

    def __init__(self, num_hidden_layers: int) -> None:
        self.num_hidden_layers = num_hidden_layers

    def get_text_config(self) -> Config:
        return self


class FusedDecoder(nn.Module):
    """Embedding, rotary embedding and layers; in float32, on the host."""

    def __init__(self, shape: DecoderShape, embedding: Tensor, layers: Sequence[nn.Module]) -> None:
        """embedding: (vocabulary, d_model)."""
        super().__init__()
        vocabulary, d_model = embedding.shape
        self.embed_tokens = nn.Embedding(vocabulary, d_model, _weight=embedding)
        self.layers = nn.ModuleList(layers)
        self.config = Config(len(layers))
        self._inv_freq = torch.tensor(shape.inv_freq, dtype=torch.float32)
        self._rotary_scale = shape.rotary_scale

    @property
    def base_model(self) -> FusedDecoder:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, input_ids: Tensor, position_ids: Tensor, **others: object) -> Tensor:
        """input_ids, position_ids: (1, n) -> (1, n, d_model)."""
        *_, last = self.hidden_states(input_ids, position_ids)
        return last

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor) -> Iterator[Tensor]:
        """What the first layer is given, then what each layer gives: (1, n, d_model) each."""
        hidden: Tensor = self.embed_tokens(input_ids)
        embeddings = self._rotary(position_ids)
        yield hidden
        for layer in self.layers:
            hidden = layer(hidden, position_embeddings=embeddings)
            yield hidden

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (1, n, d_head), both halves of which are alike."""
        angles = position_ids[..., None].float() * self._inv_freq
        both = torch.cat((angles, angles), dim=-1)
        return both.cos() * self._rotary_scale, both.sin() * self._rotary_scale


def build_decoder(shape: DecoderShape, tensors: Mapping[str, Tensor], found: Routines) -> FusedDecoder:
    """`tensors` are those of the weight files, in float32. Raises KeyError where one is missing."""

    def build(number: int) -> FusedDecoderLayer:
        layer = shape.layers[number]
        parts = layer_parts(layer, tensors, f"{shape.prefix}layers.{number}.")
        return FusedDecoderLayer(parts, found, heads_of(layer))

    layers = side_by_side(build, range(len(shape.layers)))
    return FusedDecoder(shape, tensors[shape.prefix + EMBEDDING], layers)


def tensor_names(shape: DecoderShape, known: Mapping[str, Any]) -> list[str]:
    """The tensors that a decoder is made of, of those that are `known` in its files."""
    names = [shape.prefix + EMBEDDING]
    for number in range(len(shape.layers)):
        at = f"{shape.prefix}layers.{number}."
        names += [f"{at}{part}.weight" for part in (*NORMS, *PROJECTIONS, *MLP)]
        names += [f"{at}{part}.bias" for part in (*PROJECTIONS, *MLP) if f"{at}{part}.bias" in known]
    return names


def layer_parts(shape: LayerShape, tensors: Mapping[str, Tensor], at: str) -> Any:
    """A layer's weights as `FusedDecoderLayer` takes them; `at` is how their names begin."""

    def linear(part: str) -> SimpleNamespace:
        return SimpleNamespace(weight=tensors[f"{at}{part}.weight"], bias=tensors.get(f"{at}{part}.bias"))

    norms = [
        SimpleNamespace(weight=tensors[f"{at}{part}.weight"], variance_epsilon=epsilon)
        for part, epsilon in zip(NORMS, (shape.epsilon, shape.mlp_epsilon), strict=True)
    ]
    return SimpleNamespace(
        self_attn=SimpleNamespace(**{part.rpartition(".")[2]: linear(part) for part in PROJECTIONS}),
        mlp=SimpleNamespace(
            **{part.rpartition(".")[2]: linear(part) for part in MLP}, act_fn=ACTIVATIONS[shape.activation]()
        ),
        input_layernorm=norms[0],
        post_attention_layernorm=norms[1],
    )


def heads_of(shape: LayerShape) -> Heads:
    return Heads(shape.heads, shape.key_heads, shape.d_head, shape.scale, shape.window)
