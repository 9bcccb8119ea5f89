"""Turns the texts of parts into token ids with a fast tokenizer. Knows nothing about files or batches.

Conversations are rendered by `daemon.source.chat`; which tokens count is told by `daemon.source.counting`.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from daemon.bos import bos_of
from daemon.errors import ConfigError, SampleError
from daemon.recipes import Conversation, Text
from daemon.records import Part, Reject, Sample, TokenizedPart, TokenizedSample
from daemon.source.chat import ChatTemplate, no_template
from daemon.source.counting import EncodedText, ReadRules, completion_mask, counts_none, masks
from daemon.source.storing import Storing

T = TypeVar("T")
Start = int | None  # where in a text its completion begins
Encoded = EncodedText | SampleError
EVERYTHING = ReadRules()


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
        rules: ReadRules = EVERYTHING,
    ) -> None:
        """`context`: how many tokens of a text the model reads at most, where it has a limit; `vocabulary`:
        how many embeddings it has, where token ids from that number on may occur; `rules`: which tokens of a
        text count, and what becomes of one that is too long.

        Raises ConfigError where the BOS token is needed and missing, or beyond the embeddings.
        """
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._chat = ChatTemplate.of(tokenizer)
        self._storing = Storing(self._backend, self._chat)
        self._max_text_tokens = max_text_tokens
        self._context = context
        self._rules = rules
        bos = bos_of(tokenizer)
        self._both_ways = both_ways
        if prepend_bos and bos is None:
            raise ConfigError(
                "the SAEs expect a BOS token, but the model's tokenizer has neither BOS nor EOS"
            )
        self._first = bos  # that a text may begin with, and keeps where it is cut
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

    def limited(self, max_text_tokens: int, rules: ReadRules | None = None) -> Tokenizer:
        """The same with another limit, and with other rules where they are given."""
        other = copy.copy(self)
        other._max_text_tokens = max_text_tokens
        other._rules = rules or self._rules
        return other

    def encode(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Token ids of each text, BOS included, once."""
        return [text.ids for text in self._encode(texts)]

    def _encode(self, texts: Sequence[str]) -> list[EncodedText]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        n = len(self._prefix)
        return [
            EncodedText((*ids,))
            if (ids := encoding.ids)[:n] == self._bos
            else EncodedText((*self._prefix, *ids), bos_added=True)
            for encoding in encodings
        ]

    def tokenize(self, parts: Sequence[Part]) -> list[TokenizedPart]:
        """Parts with their samples tokenized, all at one go, since each call costs more than a small file.

        Samples with an empty or over-long text, or with one that the tokenizer or the model has no token for,
        become rejects.
        """
        began = time.perf_counter()
        texts = [text for part in parts for sample in part.samples for text in sample.texts]
        encoded = self._read(parts, texts)
        if self._rules.keeps_texts:
            most = self._most if self._rules.long_texts == "reject" else None
            encoded = self._storing.described(texts, encoded, len(self._prefix), most)
        read = iter(encoded)
        seconds = (time.perf_counter() - began) / max(1, len(texts))
        return [self._tokenized(part, read, seconds) for part in parts]

    def _read(self, parts: Sequence[Part], texts: Sequence[Text]) -> Sequence[Encoded]:
        """Each of the texts, which are those of the parts, as tokens, or why not."""
        strings = [text for text in texts if isinstance(text, str)]
        if self._rules.tokens == "all":
            encoded = each(self._encode, strings)
            if len(strings) == len(texts):
                return encoded
        starts = [start for part in parts for sample in part.samples for start in starts_of(sample)]
        items = list(zip(texts, starts, strict=True))
        if self._rules.tokens != "all":
            encoded = self._counted([(text, start) for text, start in items if isinstance(text, str)])
        read = iter(encoded)
        return [
            next(read) if isinstance(text, str) else self._conversation(text, start) for text, start in items
        ]

    def _counted(self, items: Sequence[tuple[str, Start]]) -> Sequence[Encoded]:
        """Texts that are no conversations, and which of their tokens count: not all do."""
        if self._rules.tokens != "completion":
            return [counts_none(self._rules.tokens)] * len(items)
        return each(self._of_completions, items)

    def _of_completions(self, items: Sequence[tuple[str, Start]]) -> list[Encoded]:
        encodings = self._backend.encode_batch([text for text, _ in items], add_special_tokens=False)
        return [
            self._of_completion(encoding, start)
            for encoding, (_, start) in zip(encodings, items, strict=True)
        ]

    def _of_completion(self, encoding: Any, start: Start) -> Encoded:
        if start is None:
            return counts_none(self._rules.tokens)
        counted = completion_mask([end for _, end in encoding.offsets], start) if start else None
        return self._with_bos(EncodedText(tuple(encoding.ids), counted))

    def _conversation(self, chat: Conversation, start: Start) -> Encoded:
        if self._chat is None:
            return no_template()
        try:
            most = self._most if self._rules.long_texts == "reject" else None
            return self._with_bos(self._chat.encode(chat, self._rules.tokens, start, most))
        except SampleError as error:
            return error

    def _with_bos(self, text: EncodedText) -> EncodedText:
        return text if text.ids[: len(self._prefix)] == self._prefix else text.after(self._prefix)

    def _tokenized(self, part: Part, encoded: Iterator[Encoded], seconds_per_text: float) -> TokenizedPart:
        kept: list[TokenizedSample] = []
        rejects = list(part.rejects)
        cut = 0
        names = part.recipe.text_names
        for sample in part.samples:
            texts, reject = self._sound(sample, [next(encoded) for _ in sample.texts], names)
            if reject is not None:
                rejects.append(reject)
                continue
            shorter = texts if self._rules.long_texts == "reject" else [self._cut(text) for text in texts]
            token_ids = tuple([text.ids for text in shorter])
            reject = self._check(sample, token_ids, names) or self._check_counted(sample, shorter, names)
            if reject is None:
                added = tuple([text.bos_added for text in shorter]) if self._both_ways else ()
                stored = tuple([text.stored for text in shorter if text.stored is not None])
                kept.append(TokenizedSample(sample, token_ids, masks(shorter), added, stored))
                cut += sum(len(long.ids) > len(short.ids) for long, short in zip(texts, shorter, strict=True))
            else:
                rejects.append(reject)
        part = dataclasses.replace(
            part,
            samples=tuple(entry.sample for entry in kept),
            rejects=tuple(sorted(rejects, key=lambda reject: reject.record_index)),
            tokenize_seconds=seconds_per_text * len(names) * len(part.samples),
        )
        return TokenizedPart(part, tuple(kept), cut)

    def _sound(
        self, sample: Sample, found: Sequence[Encoded], names: tuple[str, ...]
    ) -> tuple[list[EncodedText], Reject | None]:
        """The texts as tokens, and the reject of the first that is none."""
        texts: list[EncodedText] = []
        for name, text in zip(names, found, strict=True):
            if isinstance(text, SampleError):
                return [], sample.reject(text.reason, f"text {name!r} {text}")
            texts.append(text)
        return texts, None

    @property
    def _most(self) -> int:
        """Tokens of a text."""
        return self._max_text_tokens if self._context is None else min(self._context, self._max_text_tokens)

    def _cut(self, text: EncodedText) -> EncodedText:
        """The text within its limits: what is cut is as `long_texts` says."""
        most = self._most
        head = int(text.ids[:1] == (self._first,))
        if len(text.ids) <= most or most <= head:
            return text
        return text.cut(most, self._rules.long_texts, head)

    def _check_counted(
        self, sample: Sample, texts: Sequence[EncodedText], names: tuple[str, ...]
    ) -> Reject | None:
        """The reject of the first text of which one of the ways to read it leaves no token."""
        unread = self._first if self._rules.skips_bos else None
        for name, text in zip(names, texts, strict=True):
            ways = (text, text.bare) if self._both_ways and text.bos_added else (text,)
            if not all(way.has_own(unread) for way in ways):
                error = NOTHING_BUT_BOS if text.counted is None else counts_none(self._rules.tokens)
                return sample.reject(error.reason, f"text {name!r} {error}")
        return None

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


NO_TOKEN = SampleError(
    "unknown_token", "has characters that the model's tokenizer has no token for: leave them out"
)
NOTHING_BUT_BOS = SampleError("no_token_counts", "has no token but BOS: give it some content")


def each(encode: Callable[[Sequence[T]], Sequence[Encoded]], items: Sequence[T]) -> Sequence[Encoded]:
    """`encode` of items at one go; NO_TOKEN in the place of those that the tokenizer can't encode."""
    try:
        return encode(items)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises no other kind
            raise
        if len(items) <= 1:
            return [NO_TOKEN] * len(items)
        half = len(items) // 2
        return [*each(encode, items[:half]), *each(encode, items[half:])]


def starts_of(sample: Sample) -> Sequence[Start]:
    """Where in each of the sample's texts its completion begins."""
    return sample.starts or (None,) * len(sample.texts)


def size_of(backend: Any) -> int:
    """One more than the highest token id, added tokens included: ids may leave gaps."""
    return 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
