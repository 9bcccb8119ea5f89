"""Which tokens of a text count, and which stay where it is too long. Knows no tokenizer and no chat template.

Of a text that begins with a prompt the completion's tokens are those that end after the prompt: a token that
straddles the border belongs to the completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from daemon.errors import SampleError
from daemon.records import CountedTokens, LongTexts, TextToStore


@dataclass(frozen=True, slots=True)
class ReadRules:
    """What of a text's tokens is read."""

    tokens: CountedTokens = "all"  # which of them count
    long_texts: LongTexts = "reject"  # what becomes of a text that has too many
    skips_bos: bool = False  # whether a BOS at a text's beginning is none of those that are read
    keeps_texts: bool = False  # whether texts are stored, and where in them each token begins


class EncodedText(NamedTuple):
    """The token ids of a text; a byte for each, 1 where it counts, or None where all do."""

    ids: tuple[int, ...]
    counted: bytes | None = None
    bos_added: bool = False  # before it; else it begins with its own, or with none
    stored: TextToStore | None = None  # the text itself, where texts are stored

    def after(self, prefix: tuple[int, ...]) -> EncodedText:
        """The same behind tokens that do not count, unless all do."""
        if not prefix:
            return self
        counted = self.counted and bytes(len(prefix)) + self.counted
        return self._replace(ids=(*prefix, *self.ids), counted=counted, bos_added=True)

    @property
    def bare(self) -> EncodedText:
        """The same without the BOS that was added."""
        return EncodedText(self.ids[1:], self.counted and self.counted[1:])

    def has_own(self, bos: int | None) -> bool:
        """Whether a token counts; one that is `bos` at the beginning does not."""
        first = int(self.ids[:1] == (bos,))
        return len(self.ids) > first if self.counted is None else any(self.counted[first:])

    def cut(self, most: int, keep: LongTexts, head: int) -> EncodedText:
        """At most so many tokens, of the text's end or its start; its first `head` tokens stay."""
        first, rest = slice(0, head), slice(head, most)
        if keep == "keep_end":
            rest = slice(len(self.ids) - (most - head), None)
        return self._replace(
            ids=self.ids[first] + self.ids[rest],
            counted=self.counted and self.counted[first] + self.counted[rest],
            stored=self.stored and cut_text(self.stored, first, rest),
        )


def cut_text(text: TextToStore, first: slice, rest: slice) -> TextToStore:
    """The whole text still, and of its tokens those that stay."""
    starts = None if text.starts is None else np.concatenate((text.starts[first], text.starts[rest]))
    return replace(text, starts=starts, roles=text.roles and text.roles[first] + text.roles[rest])


def completion_mask(ends: Sequence[int], start: int) -> bytes:
    """The tokens that end after the character `start`; `ends` are where each ends."""
    return bytes([end > start for end in ends])


def masks(texts: Sequence[EncodedText]) -> tuple[bytes, ...] | None:
    """The tokens of each text that count; None where all of all do."""
    if all(text.counted is None for text in texts):
        return None
    return tuple(b"\1" * len(text.ids) if text.counted is None else text.counted for text in texts)


def counts_none(tokens: CountedTokens) -> SampleError:
    """For a text that has no token of the kind that counts."""
    kind = "a completion" if tokens == "completion" else f"the {tokens}"
    return SampleError(
        "no_token_counts",
        f"has no token of {kind}, and analysis.tokens = {tokens!r} counts no others: leave it out, or count"
        " other tokens",
    )
