"""Where tokens begin in their text, for the kinds of tokenizers that models come with."""

from __future__ import annotations

import itertools
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

from daemon.source import token_starts
from daemon.source.token_starts import TokenStarts
from tests.support import tokenizers as kinds

# By what they decode to a text is told from its tokens: bytes of one character alone decode to U+FFFD.
DECODABLE = {
    "byte-level": kinds.byte_level(),
    "byte-level, spaces in offsets": kinds.byte_level(trims=False),
    "byte-level, NFC": kinds.byte_level(nfc=True),
    "llama": kinds.llama(),
    "gemma": kinds.gemma(),
}
ALL = DECODABLE | {
    "byte-level, space in front": kinds.byte_level(add_prefix_space=True),
    "unigram": kinds.unigram(),
    "word pieces": kinds.word_piece(),
}
ORDINARY = "abeHw,.:1 \n\tïé你好🧪ß\u200d\u0301"
TEXTS = st.text(st.sampled_from(ORDINARY), max_size=24)


def encoded(backend: Tokenizer, text: str) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=False).ids)


def starts_of(backend: Tokenizer, *texts: str) -> list[list[int] | None]:
    found = TokenStarts(backend).of(texts, [encoded(backend, text) for text in texts], [0] * len(texts))
    return [None if starts is None else starts.tolist() for starts in found]


def by_decoding(backend: Tokenizer, text: str) -> list[int]:
    """How much of the text the tokens before each one decode to, whole characters alone."""
    ids = encoded(backend, text)
    before = [backend.decode(ids[:n], skip_special_tokens=False).rstrip("\ufffd") for n in range(len(ids))]
    assert all(text.startswith(one) for one in before)
    return list(itertools.accumulate(map(len, before), max))  # a whole run with part of a character is U+FFFD


@pytest.mark.parametrize("kind", DECODABLE)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
@settings(max_examples=25, deadline=None)
def test_tokens_begin_where_those_before_them_end(kind, texts):
    backend = DECODABLE[kind]
    if "NFC" in kind:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    assert starts_of(backend, *texts) == [by_decoding(backend, text) for text in texts]


@pytest.mark.parametrize("kind", ALL)
@given(text=st.lists(st.sampled_from([*ORDINARY, *kinds.SPECIAL]), max_size=24).map("".join).map(str.lstrip))
@settings(max_examples=25, deadline=None)
def test_what_lies_between_two_starts_joins_to_the_text(kind, text):
    (starts,) = starts_of(ALL[kind], text)
    assert starts is not None
    assert starts == sorted(starts)
    assert all(0 <= start <= len(text) for start in starts)
    if starts and kind != "word pieces":  # which have no token for white space, nor for a lone accent
        pieces = [text[first:last] for first, last in itertools.pairwise([*starts, len(text)])]
        assert "".join(pieces) == text


@pytest.mark.parametrize("text", ["cafe\u0301 world", "x  cafe\u0301", "  e\u0301 b", "a e\u0301\u0301"])
def test_a_text_that_is_normalized_keeps_the_places_of_its_own_characters(text):
    for backend in (kinds.byte_level(nfc=True), kinds.byte_level(nfc=True, trims=False)):
        (starts,) = starts_of(backend, text)
        ids = encoded(backend, text)
        whole = unicodedata.normalize("NFC", text)
        for number, start in enumerate(starts):  # what precedes a token is normalized to what precedes it
            before = backend.decode(ids[:number]).rstrip("\ufffd")
            assert unicodedata.normalize("NFC", text[:start]) == before
        assert backend.decode(ids) == whole


def test_words_begin_after_the_space_where_no_token_holds_it():
    backend = kinds.word_piece()
    text = "Hello  World, CAFÉ"
    (starts,) = starts_of(backend, text)
    tokens = backend.encode(text, add_special_tokens=False).tokens
    for token, (first, last) in zip(tokens, itertools.pairwise([*starts, len(text)]), strict=True):
        plain = unicodedata.normalize("NFD", text[first:last].strip().lower()).replace("\u0301", "")
        assert plain == token.removeprefix("##")


def test_characters_that_one_stands_for_share_its_place():
    (starts,) = starts_of(kinds.unigram(), "a ﬁ b")
    tokens = kinds.unigram().encode("a ﬁ b", add_special_tokens=False).tokens
    assert starts[tokens.index("f")] == starts[tokens.index("i")] == 2


@pytest.mark.parametrize("kind", ALL)
def test_special_tokens_in_a_text_are_their_letters_there(kind):
    text = "<s>Hello<|end|> world<|end|>"
    (starts,) = starts_of(ALL[kind], text)
    tokens = ALL[kind].encode(text, add_special_tokens=False).tokens
    places = [start for start, token in zip(starts, tokens, strict=True) if token in kinds.SPECIAL]
    assert places == [0, 8, 21]


def test_a_token_that_takes_the_space_around_it_has_it():
    backend = kinds.byte_level()
    backend.add_special_tokens([AddedToken("<gap>", lstrip=True, rstrip=True)])
    text = "Hello  <gap>  world"
    (starts,) = starts_of(backend, text)
    after = encoded(backend, text).index(backend.token_to_id("<gap>")) + 1
    assert text[: starts[after - 1]].rstrip() == "Hello"
    assert text[starts[after] :].strip() == "world"


def test_a_bos_that_was_put_before_has_the_beginning():
    backend = kinds.byte_level()
    texts = ["Hello 你", "cafe\u0301"]
    ids = [(9, *encoded(backend, text)) for text in texts]
    found = TokenStarts(backend).of(texts, ids, [1, 1])
    for starts, own in zip(found, starts_of(backend, *texts), strict=True):
        assert starts.tolist() == [0, *own]


def test_runs_of_texts_give_what_each_gives_alone(monkeypatch):
    backend = kinds.byte_level()
    texts = ["Hello 你好", "", "a" * 50, "cafe\u0301", "b 🧪"]
    alone = [starts_of(backend, text)[0] for text in texts]
    monkeypatch.setattr(token_starts, "RUN_CHARS", 12)
    assert starts_of(backend, *texts) == alone
    assert list(token_starts.runs(texts)) == [(0, 2), (2, 3), (3, 5)]


def test_what_cannot_be_told_is_not_told():
    """Token ids that the text does not give, and offsets out of order."""
    backend = kinds.word_piece()
    assert TokenStarts(backend).of(["hello world"], [(5, 6)], [0]) == [None]

    class Encoding:
        tokens = ("b", "a")
        offsets = ((1, 2), (0, 1))

    assert token_starts.by_offsets("ab", Encoding()) is None


def test_a_vocabulary_that_lacks_characters_goes_by_offsets():
    backend = Tokenizer(models.WordLevel({"one": 0, "two": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_starts.pieces_of(backend) == {}
    assert starts_of(backend, "one 你 two") == [[0, 4, 6]]
    backend = Tokenizer(models.WordLevel({"one": 0}))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert starts_of(backend, "one one") == [[0, 4]]


def test_places_are_small_integers():
    (starts,) = TokenStarts(kinds.byte_level()).of(["Hello"], [encoded(kinds.byte_level(), "Hello")], [0])
    assert starts.dtype == np.int32
