"""Tells whether a model's attention can be replaced, by asking for another and running two tokens.

Leaves the model as it was, so that an engine that can't use it costs no second one.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from daemon.model.attention import UnsupportedAttention, check_supported
from daemon.model.loading import LoadedModel

ASKING = "lensd_asking"  # the name by which Hugging Face modules find `asked`


class Asked(Exception):
    """A layer has called the attention that the configuration names."""


def asked(*_: Any, **others: Any) -> NoReturn:
    check_supported(others)
    raise Asked


def attention_is_replaceable(model: LoadedModel) -> bool:
    """Whether layers call the attention that the configuration names, with no more than it knows."""
    from transformers import AttentionInterface

    AttentionInterface.register(ASKING, asked)
    configs = [model.model.config, model.model.config.get_text_config()]
    before = [config._attn_implementation for config in configs]
    tokens = torch.tensor([[0, 1]], device=model.device) % model.vocabulary
    no_mask = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=model.device)
    try:
        for config in configs:
            config._attn_implementation = ASKING
        with torch.inference_mode():
            model.model.base_model(
                input_ids=tokens, position_ids=tokens % 2, attention_mask=no_mask, use_cache=False
            )
    except Asked:
        return True
    except (UnsupportedAttention, TypeError, ValueError, RuntimeError, LookupError, AttributeError):
        return False
    finally:
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name
    return False
