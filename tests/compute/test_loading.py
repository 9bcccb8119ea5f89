from __future__ import annotations

import pytest
from transformers import BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from daemon.compute.loading import context_of

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


def rotary(rope_type: str, **more: float) -> LlamaConfig:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **more}
    return LlamaConfig(max_position_embeddings=4096, rope_parameters=rope)


def longrope() -> Phi3Config:
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(LONGROPE),
    )


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (lambda: GPT2Config(n_positions=77), 77),
        (lambda: Gemma3TextConfig(max_position_embeddings=99), 99),  # rotary embeddings of two kinds
        (lambda: rotary("yarn", original_max_position_embeddings=1024), 4096),  # the same for every text
        (lambda: rotary("dynamic"), 4096),
        (longrope, 4096),
        (BloomConfig, None),
    ],
    ids=["learned", "two kinds", "yarn", "dynamic", "longrope", "none"],
)
def test_the_context_is_what_a_model_reads_whatever_is_beside(config, context):
    assert context_of(config()) == context
