"""Chooses the class of Transformers that loads a model. Knows configurations only."""

from __future__ import annotations

from typing import Any


def auto_class(config: Any) -> Any:
    """`AutoModelForCausalLM`, or where a language model is part of one that sees, the class of the whole.

    A text runs through the language part alone. What is neither is left to the first, which says so.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    kind = getattr(config, "model_type", None)
    if (
        kind not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and kind in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        and not config.is_encoder_decoder
        and config.get_text_config() is not config
    ):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
