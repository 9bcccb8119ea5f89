"""Where in a text each of its tokens begins. Knows nothing about which tokens count.

The bytes of a text's tokens, one after the other, are the text with most tokenizers (byte-level BPE, and
SentencePiece but for a space in front). Then lengths give the places, at a small part of what it costs to
have the tokenizer track offsets. A text of which they are not, since it was normalized, is tokenized once
more with offsets. These are taken where they are in order; else nothing is known of that text.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from daemon import mmap_arrays
from daemon.records import Int32Array

PROBE = "Hello, world: 12 caf\u00e9s \u4f60\u597d"
FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
SPACES = "\u0120\u2581 "  # as pieces of byte-level vocabularies, of SentencePiece and of others begin
NOTHING = -1  # in the place of a token that stands for no character
RUN_CHARS = 1 << 20  # of texts that are looked at together
Ids = tuple[int, ...]


class TokenStarts:
    """Finds the places of tokens of one tokenizer's backend, which neither pads nor truncates."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._pieces: dict[int, bytes] | None = None  # by token id, from the first text on

    def of(self, texts: Sequence[str], ids: Sequence[Ids], heads: Sequence[int]) -> list[Int32Array | None]:
        """The offset of each token in its text, in code points; None for a text where that is not known.

        `heads` says how many of each text's first tokens were put before it: their offset is 0. Tokens that
        share a character have its offset.
        """
        if self._pieces is None:
            self._pieces = pieces_of(self._backend)
        found: list[Int32Array | None] = []
        own = [one[head:] for one, head in zip(ids, heads, strict=True)]
        for first, last in runs(texts):
            behind = [
                (NOTHING,) * head + one for one, head in zip(own[first:last], heads[first:last], strict=True)
            ]
            found += by_pieces(texts[first:last], behind, self._pieces)
        odd = [number for number, starts in enumerate(found) if starts is None]
        if odd:
            again = self._backend.encode_batch([texts[number] for number in odd], add_special_tokens=False)
            for number, encoding in zip(odd, again, strict=True):
                starts = by_offsets(texts[number], encoding) if tuple(encoding.ids) == own[number] else None
                if starts is not None:
                    found[number] = np.concatenate((np.zeros(heads[number], np.int32), starts))
        return found


def runs(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Bounds of runs of texts that together are not too long; one that alone is makes a run."""
    first = chars = 0
    for number, text in enumerate(texts):
        chars += len(text)
        if chars > RUN_CHARS and number > first:
            yield first, number
            first, chars = number, len(text)
    if first < len(texts):
        yield first, len(texts)


def by_pieces(texts: Sequence[str], ids: Sequence[Ids], pieces: dict[int, bytes]) -> list[Int32Array | None]:
    """Places by the lengths of pieces; None for a text that its pieces do not add up to."""
    of_tokens = [pieces.get(token, b"") for token in itertools.chain.from_iterable(ids)]
    joined = b"".join(of_tokens)
    begins = np.concatenate(([0], np.cumsum(np.fromiter(map(len, of_tokens), np.int64, len(of_tokens)))))
    is_start = (np.frombuffer(joined, np.uint8) & 0xC0) != 0x80  # of a character
    chars = np.cumsum(np.append(is_start, True), dtype=np.int32)  # begun up to and with each byte
    lengths = [len(one) for one in ids]
    bounds = np.concatenate(([0], np.cumsum(lengths)))
    first_chars = chars[begins[bounds[:-1]]]
    (places,) = mmap_arrays.zeros(((len(of_tokens),), np.int32))  # they outlive a batch
    np.subtract(chars[begins[:-1]], np.repeat(first_chars, lengths), out=places)
    byte_bounds = begins[bounds].tolist()
    found: list[Int32Array | None] = []
    for number, (text, (first, last)) in enumerate(
        zip(texts, itertools.pairwise(bounds.tolist()), strict=True)
    ):
        mine, whole = joined[byte_bounds[number] : byte_bounds[number + 1]], text.encode()
        if mine == whole:
            found.append(places[first:last])
        elif mine == b" " + whole:  # a space that is not the text's
            found.append(np.maximum(places[first:last] - 1, 0))
        else:
            found.append(None)
    return found


def by_offsets(text: str, encoding: Any) -> Int32Array | None:
    """Places by the offsets that the tokenizer tracked, a token's leading spaces its own where it has some.

    Byte-level tokenizers may leave these out of the offsets. None where the offsets are out of order.
    """
    starts, ended = [], 0
    for piece, (start, end) in zip(encoding.tokens, encoding.offsets, strict=True):
        left_out = len(piece) - len(piece.lstrip(SPACES))
        if start == end or not text[start].isspace():
            while left_out and start > ended and text[start - 1] == " ":
                start, left_out = start - 1, left_out - 1
        if start == end > ended and text[ended:end].strip(" "):  # a space that is not the text's
            start = ended
        starts.append(start)
        ended = max(ended, end)
    in_order = starts == sorted(starts) and all(0 <= start <= len(text) for start in starts)
    return np.array(starts, np.int32) if in_order else None


def pieces_of(backend: Any) -> dict[int, bytes]:
    """The bytes that each token stands for, as the vocabulary has them that fit a probe; empty if none do."""
    try:
        encoding = backend.encode(PROBE, add_special_tokens=False)
    except Exception:  # tokenizers raises no other kind: it lacks some of its characters
        return {}
    for spell in (byte_level, sentence_piece):
        joined = b"".join(map(spell, encoding.tokens))
        if joined.removeprefix(b" ") == PROBE.encode():
            pieces = {token: spell(piece) for piece, token in backend.get_vocab().items()}
            added = backend.get_added_tokens_decoder()
            return pieces | {token: entry.content.encode() for token, entry in added.items()}
    return {}


def byte_level(piece: str) -> bytes:
    """A piece in which each byte is a character of its own."""
    return b"".join(BYTES.get(char) or char.encode() for char in piece)


def sentence_piece(piece: str) -> bytes:
    """A piece with marks for spaces, or one byte of a character that the vocabulary lacks."""
    if found := FALLBACK_BYTE.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("\u2581", " ").encode()


def byte_characters() -> dict[str, bytes]:
    """The characters of GPT-2's byte-level vocabulary: printable bytes as such, then the others in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    signs = {chr(byte): bytes([byte]) for byte in printable}
    return signs | {chr(0x100 + number): bytes([byte]) for number, byte in enumerate(others)}


BYTES = byte_characters()
