"""Which of TransformerLens's hook points a dictionary's names stand for. Knows no model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from daemon.errors import ConfigError
from daemon.model.sae import LoadedSae, layer_of
from daemon.model.saeformat import TRANSCODERS

MLP_IN = re.compile(r"blocks\.\d+\.hook_mlp_in")
EACH_HEAD = "it is {block}.hook_resid_pre once for each head, so name that"
# Hook points that TransformerLens computes under a flag only, by what follows `blocks.L.`, and what to name.
FLAGGED = {
    "hook_mlp_in": (
        "name {block}.mlp.hook_in for what the MLP reads, {block}.hook_resid_mid for what its norm reads"
    ),
    **{
        f"{part}hook_{what}": EACH_HEAD
        for part in ("", "attn.")
        for what in ("attn_in", "q_input", "k_input", "v_input")
    },
    "attn.hook_result": "name {block}.attn.hook_z for the heads, {block}.hook_attn_out for their sum",
}


def hook_points_of(entry: LoadedSae) -> tuple[str, str]:
    """Where a dictionary reads, and where what it reconstructs is.

    Raises ConfigError for a name that stands for no one value.
    """
    info = entry.info
    if MLP_IN.fullmatch(info.hook_name) and is_gemma_scope_transcoder(entry):
        return f"blocks.{info.layer}.mlp.hook_in", info.hook_name_out
    for name in entry.hook_names:
        block, place = f"blocks.{layer_of(name)}", name.split(".", 2)[2]
        if place in FLAGGED:
            raise ConfigError(
                f"SAE {info.source}: {name} is computed by TransformerLens under a flag only, and does not"
                f" always mean the same: {FLAGGED[place].format(block=block)} in its cfg.json"
            )
    return info.hook_name, info.hook_name_out


def check_widths(
    saes: Sequence[LoadedSae], points: Sequence[tuple[str, str]], widths: Mapping[str, int]
) -> None:
    """`points` are where each reads and what it reconstructs, `widths` the model's values there.

    Raises ConfigError where a dictionary does not fit.
    """
    for entry, (read, written) in zip(saes, points, strict=True):
        info = entry.info
        for hook_name, expected, point in (
            (info.hook_name, info.d_in, read),
            (info.hook_name_out, info.d_out, written),
        ):
            if widths[point] != expected:
                raise ConfigError(
                    f"SAE {info.source}: expects {expected} values at {hook_name}, where the model has"
                    f" {widths[point]}: it belongs to another model"
                )


def is_gemma_scope_transcoder(entry: LoadedSae) -> bool:
    """Gemma Scope 2 calls by hook_mlp_in what the MLP reads, after its norm; its models are Gemma 3."""
    model_name = str(entry.sae.cfg.metadata.model_name or "")
    return entry.info.architecture in TRANSCODERS and "gemma-3" in model_name


def canonical(hook_name: str) -> str:
    """A residual hook's name as TransformerBridge's list of hooks has it."""
    return hook_name.replace("hook_resid_post", "hook_out").replace("hook_resid_pre", "hook_in")
