"""Turns the texts of parts into token ids with a fast tokenizer. Knows nothing about files or batches."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from daemon.errors import ConfigError
from daemon.records import Part, Reject, Sample, TokenizedPart, TokenizedSample


class Encoded(NamedTuple):
    """A text as token ids."""

    ids: tuple[int, ...]
    bos_added: bool  # before it; else it begins with its own, or with none


class Tokenizer:
    """A fast Hugging Face tokenizer of its own; `tokenize` blocks and releases the GIL while it works.

    With `prepend_bos`, every text starts with one BOS token, or with EOS where the model has no BOS, as in
    TransformerLens. It is added where the text does not begin with it: a rendered chat often does. A text's
    special tokens are tokens, however they came into it. No other special token is added. With `both_ways`
    samples say which BOS was added, since some SAEs read their texts without it.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        prepend_bos: bool,
        both_ways: bool = False,
        max_text_tokens: int,
        context: int | None = None,
        vocabulary: int | None = None,
    ) -> None:
        """`context`: how many tokens of a text the model reads at most, where it has a limit; `vocabulary`:
        how many embeddings it has, where token ids from that number on may occur.

        Raises ConfigError where the BOS token is needed and missing, or beyond the embeddings.
        """
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._max_text_tokens = max_text_tokens
        self._context = context
        bos = bos_of(tokenizer)
        self._both_ways = both_ways
        if prepend_bos and bos is None:
            raise ConfigError(
                "the SAEs expect a BOS token, but the model's tokenizer has neither BOS nor EOS"
            )
        self._bos: list[int] = [bos] if prepend_bos and bos is not None else []
        self._prefix = tuple(self._bos)
        self._vocabulary = (
            vocabulary if vocabulary is not None and vocabulary < size_of(self._backend) else None
        )
        if self._bos and vocabulary is not None and not 0 <= self._bos[0] < vocabulary:
            raise ConfigError(
                f"the tokenizer's BOS token has the id {bos}, but the model has {vocabulary} embeddings: use"
                " the tokenizer that belongs to the model"
            )

    def limited(self, max_text_tokens: int) -> Tokenizer:
        """The same with another limit."""
        other = copy.copy(self)
        other._max_text_tokens = max_text_tokens
        return other

    def encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Token ids of each text, BOS included, once."""
        return [encoded.ids for encoded in self._with_bos(texts)]

    def _with_bos(self, texts: list[str]) -> list[Encoded]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        n = len(self._prefix)
        return [
            Encoded((*ids,), False)
            if (ids := encoding.ids)[:n] == self._bos
            else Encoded((*self._prefix, *ids), True)
            for encoding in encodings
        ]

    def tokenize(self, parts: Sequence[Part]) -> list[TokenizedPart]:
        """Parts with their samples tokenized, all at one go, since each call costs more than a small file.

        Samples with an empty or over-long text, or with one that the tokenizer or the model has no token for,
        become rejects.
        """
        began = time.perf_counter()
        texts = [text for part in parts for sample in part.samples for text in sample.texts]
        encoded = iter(self._encoded(texts))
        seconds = (time.perf_counter() - began) / max(1, len(texts))
        return [self._tokenized(part, encoded, seconds) for part in parts]

    def _encoded(self, texts: list[str]) -> Sequence[Encoded | None]:
        """Each text; None for one that the tokenizer can't encode, having no token for it."""
        try:
            return self._with_bos(texts)
        except Exception:  # tokenizers raises no other kind
            if len(texts) <= 1:
                return [None] * len(texts)
            half = len(texts) // 2
            return [*self._encoded(texts[:half]), *self._encoded(texts[half:])]

    def _tokenized(
        self, part: Part, encoded: Iterator[Encoded | None], seconds_per_text: float
    ) -> TokenizedPart:
        kept: list[TokenizedSample] = []
        rejects = list(part.rejects)
        for sample in part.samples:
            results = [next(encoded) for _ in sample.texts]
            found = [one for one in results if one is not None]
            token_ids = tuple(ids for ids, _ in found)
            if len(found) < len(results):
                name = part.recipe.text_names[results.index(None)]
                reject: Reject | None = sample.reject(
                    "unknown_token",
                    f"text {name!r} has characters that the model's tokenizer has no token for:"
                    " leave them out",
                )
            else:
                reject = self._check(sample, token_ids, part.recipe.text_names)
            if reject is None:
                added = tuple(bos_added for _, bos_added in found) if self._both_ways else ()
                kept.append(TokenizedSample(sample, token_ids, added))
            else:
                rejects.append(reject)
        part = dataclasses.replace(
            part,
            samples=tuple(entry.sample for entry in kept),
            rejects=tuple(sorted(rejects, key=lambda reject: reject.record_index)),
            tokenize_seconds=seconds_per_text * len(part.recipe.text_names) * len(part.samples),
        )
        return TokenizedPart(part, tuple(kept))

    def _check(
        self, sample: Sample, token_ids: tuple[tuple[int, ...], ...], names: tuple[str, ...]
    ) -> Reject | None:
        for name, ids in zip(names, token_ids, strict=True):
            if self._vocabulary is not None and max(ids, default=0) >= self._vocabulary:
                return sample.reject(
                    "unknown_token",
                    f"text {name!r} has a token of id {max(ids)}, but the model has {self._vocabulary}"
                    " embeddings: leave it out, or use the tokenizer that belongs to the model",
                )
            if len(ids) == len(self._prefix):
                return sample.reject("empty_text", f"text {name!r} has no tokens: give it some content")
            if self._context is not None and len(ids) > self._context:
                return sample.reject(
                    "text_too_long",
                    f"text {name!r} has {len(ids)} tokens,"
                    f" more than the {self._context} that the model reads: shorten it",
                )
            if len(ids) > self._max_text_tokens:
                return sample.reject(
                    "text_too_long",
                    f"text {name!r} has {len(ids)} tokens, more than batching.max_text_tokens ="
                    f" {self._max_text_tokens}: shorten it or raise the limit",
                )
        return None


def bos_of(tokenizer: Any) -> int | None:
    """The id of BOS, or of EOS where there is none, as in TransformerLens; None without either."""
    bos: int | None = tokenizer.bos_token_id
    return bos if bos is not None else tokenizer.eos_token_id


def puts_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer by its own habit puts BOS before a text."""
    bos = bos_of(tokenizer)
    return bos is not None and list(tokenizer("a").input_ids[:1]) == [bos]


def size_of(backend: Any) -> int:
    """One more than the highest token id, added tokens included: ids may leave gaps."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
