"""The token that stands at the beginning of a text. Knows no text and no model."""

from __future__ import annotations

from typing import Any


def bos_of(tokenizer: Any) -> int | None:
    """The id of BOS, or of EOS where there is none, as in TransformerLens; None without either."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None else tokenizer.eos_token_id


def puts_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer by its own habit puts BOS before a text."""
    if (known := getattr(tokenizer, "puts_bos", None)) is not None:
        return bool(known)
    bos = bos_of(tokenizer)
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]
