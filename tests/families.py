"""Tiny random models of the decoder families, as Hugging Face builds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests import tiny

COMMON = {
    "vocab_size": tiny.BOS + 1,
    "hidden_size": tiny.D_MODEL,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": tiny.BOS,
    "eos_token_id": tiny.BOS,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = 8  # tokens, shorter than the texts of the tests

# name -> (configuration class, settings)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        {
            "vocab_size": tiny.BOS + 1,
            "n_embd": tiny.D_MODEL,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "bos_token_id": tiny.BOS,
            "eos_token_id": tiny.BOS,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", COMMON),
    "llama": ("LlamaConfig", COMMON | GROUPED),
    "mistral": ("MistralConfig", COMMON | GROUPED | {"sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        COMMON
        | GROUPED
        | {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
            "pad_token_id": 0,
        },
    ),
    "gemma3": ("Gemma3TextConfig", COMMON | GROUPED | {"sliding_window": WINDOW, "pad_token_id": 0}),
    "qwen2": ("Qwen2Config", COMMON | {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", COMMON | GROUPED),
    "phi": ("PhiConfig", COMMON),
    "gptj": (
        "GPTJConfig",
        {
            "vocab_size": tiny.BOS + 1,
            "n_embd": tiny.D_MODEL,
            "n_layer": 4,
            "n_head": 4,
            "n_positions": 512,
            "rotary_dim": 4,
            "bos_token_id": tiny.BOS,
            "eos_token_id": tiny.BOS,
        },
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": tiny.BOS + 1, "hidden_size": tiny.D_MODEL, "n_layer": 4, "n_head": 4},
    ),
}
PACKED = ("gpt2", "gpt_neox", "llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi")


def save_family(folder: Path, family: str, **changes: object) -> Path:
    """A random model of the family: attention is not uniform, and no norm or bias is the same everywhere."""
    torch.manual_seed(0)
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
            else:
                parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny.byte_tokenizer().save_pretrained(folder)
    return folder
