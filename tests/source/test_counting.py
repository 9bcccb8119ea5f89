"""Which tokens of a text count, and which stay where it is too long."""

from __future__ import annotations

import functools

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from daemon.recipes import COMPLETION_RECIPE, PLAIN_RECIPE, Recipe
from daemon.records import CountedTokens, LongTexts, Part, PartExtent, Sample, TokenizedPart
from daemon.source.counting import EncodedText, ReadRules
from daemon.source.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.effort import examples
from tests.support.sources import unclaimed

CORPUS = [
    "the sky is blue, the sea is blue too",
    "is it the sky  or\n\nthe sea?",
    "caf\u00e9 \u5929\u7a7a is \U0001f600 blue",
]
TEXT = st.text(st.sampled_from("the skyiblu ,?\n\u00e9\u5929\U0001f600"), max_size=14)


def trained(backend: Backend, **options: object) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<bos>"], show_progress=False, **options)
    backend.train_from_iterator(CORPUS * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


def byte_level(*, use_regex: bool, trims: bool) -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=trims)
    return trained(backend, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: spaces are letters, and one stands before each text."""
    backend = Backend(models.BPE(byte_fallback=False, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<bos>"], show_progress=False)
    backend.train_from_iterator([*CORPUS * 4, "the skyiblu ,?\n\u00e9\u5929\U0001f600"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return {
        "words": lambda: byte_level(use_regex=True, trims=False),
        "words, trimmed": lambda: byte_level(use_regex=True, trims=True),
        "across words": lambda: byte_level(use_regex=False, trims=False),
        "sentencepiece": sentencepiece,
    }[kind]()


def part_of(*samples: Sample, recipe: Recipe = COMPLETION_RECIPE) -> Part:
    return Part(unclaimed("f"), PartExtent(0, 0, len(samples), 0), True, recipe, samples, ())


def completed(prompt: str, whole: str) -> Sample:
    return Sample(0, "s", None, None, None, (prompt, whole), 1, None, starts=(0, len(prompt)))


def read(
    made: PreTrainedTokenizerFast,
    part: Part,
    tokens: CountedTokens = "completion",
    long_texts: LongTexts = "reject",
    **options: object,
) -> TokenizedPart:
    rules = ReadRules(tokens, long_texts)
    tokenizer = Tokenizer(made, **{"prepend_bos": True, "max_text_tokens": 99, "rules": rules, **options})
    return tokenizer.tokenize([part])[0]


def by_hand(kind: str, made: PreTrainedTokenizerFast, ids: list[int], prompt: str) -> list[bool]:
    """Whether each token ends after the prompt, told by the lengths of the tokens themselves."""
    tokens = made.convert_ids_to_tokens(ids)
    if kind == "sentencepiece":
        left, at = 1 + len(prompt), 0  # with the space before the text
        lengths = [len(token) for token in tokens]
    else:
        left, at = len(prompt.encode()), 0
        lengths = [len(token) for token in tokens]  # a letter for each byte
    counted = []
    for length in lengths:
        at += length
        counted.append(at > left)
    return counted


@pytest.mark.parametrize("kind", ["words", "words, trimmed", "across words", "sentencepiece"])
@settings(max_examples=examples(200), deadline=None)
@given(prompt=TEXT, completion=TEXT)
@example(prompt="the sky is", completion=" blue")
@example(prompt="the s", completion="ky is")
@example(prompt="\u5929", completion="\U0001f600 ")
@example(prompt="the  ", completion="  sky")
def test_a_completion_is_the_tokens_that_end_after_the_prompt(kind, prompt, completion):
    made = tokenizer_of(kind)
    assume(prompt and completion and prompt.strip())
    whole = prompt + completion
    part = read(made, part_of(completed(prompt, whole)))
    (sample,) = part.samples
    ids = made.backend_tokenizer.encode(whole, add_special_tokens=False).ids
    assert list(sample.token_ids[1]) == [made.bos_token_id, *ids]
    assert sample.counted is not None
    assert [bool(one) for one in sample.counted[1]] == [False, *by_hand(kind, made, ids, prompt)]
    assert sample.counted[0] == b"\1" * len(sample.token_ids[0])  # all of a prompt counts


def test_the_same_ids_are_read_whichever_tokens_count():
    made = tokenizer_of("words")
    sample = completed("the sky", "the sky is blue")
    every = read(made, part_of(sample), "all").samples[0]
    assert every.counted is None
    assert read(made, part_of(sample)).samples[0].token_ids == every.token_ids


def test_a_text_without_a_token_that_counts_is_a_reject():
    made = tokenizer_of("words")
    part = read(made, part_of(completed("the sky", "the sky")))
    ((reason, message),) = [(reject.reason, reject.message) for reject in part.part.rejects]
    assert reason == "no_token_counts"
    assert message.startswith(
        "text 'completion' has no token of a completion, and analysis.tokens = 'completion'"
    )
    plain = Sample(0, "s", None, None, None, ("the sky",), 1, None)
    for tokens in ("completion", "assistant", "user"):
        part = read(made, part_of(plain, recipe=PLAIN_RECIPE), tokens)
        assert [reject.reason for reject in part.part.rejects] == ["no_token_counts"]


def test_a_text_that_can_not_be_encoded_costs_its_record_alone_whichever_tokens_count():
    letters = Backend(models.WordPiece(vocab={"a": 0, "b": 1, "<bos>": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<bos>")
    part = read(made, part_of(completed("a", "a b"), completed("a", "a z"), completed("b", "b a")))
    assert [sample.token_ids[1] for sample in part.samples] == [(2, 0, 1), (2, 1, 0)]
    assert [reject.reason for reject in part.part.rejects] == ["unknown_token"]


def long_sample(text: str) -> Part:
    return part_of(Sample(0, "s", None, None, None, (text,), 1, None), recipe=PLAIN_RECIPE)


@pytest.mark.parametrize(("keep", "kept"), [("keep_end", "fgh"), ("keep_start", "abc")])
def test_a_long_text_keeps_its_bos_and_its_end_or_start(keep, kept):
    made = tiny.byte_tokenizer()
    part = read(made, long_sample("abcdefgh"), "all", keep, max_text_tokens=4)
    (ids,) = part.samples[0].token_ids
    assert (ids[0], made.decode(ids[1:]), part.cut_texts) == (tiny.BOS, kept, 1)
    part = read(made, long_sample("<bos>abcdefgh"), "all", keep, max_text_tokens=4, prepend_bos=False)
    assert part.samples[0].token_ids == (ids,)  # its own is kept, too
    part = read(made, long_sample("abcdefgh"), "all", keep, max_text_tokens=9)
    assert (len(part.samples[0].token_ids[0]), part.cut_texts) == (9, 0)
    part = read(made, long_sample("abcdefgh"), "all", keep, max_text_tokens=9, context=4)
    assert (part.samples[0].token_ids, part.cut_texts) == ((ids,), 1)


def test_where_nothing_but_bos_would_be_left_a_long_text_is_rejected():
    part = read(tiny.byte_tokenizer(), long_sample("abc"), "all", "keep_end", max_text_tokens=1)
    assert [reject.reason for reject in part.part.rejects] == ["text_too_long"]


def test_a_cut_that_takes_all_tokens_that_count_is_a_reject():
    made = tiny.byte_tokenizer()
    sample = completed("abcdefgh", "abcdefgh ij")
    part = read(made, part_of(sample), "completion", "keep_start", max_text_tokens=5)
    assert [reject.reason for reject in part.part.rejects] == ["no_token_counts"]
    part = read(made, part_of(sample), "completion", "keep_end", max_text_tokens=5)
    assert made.decode(part.samples[0].token_ids[1]) == "<bos>h ij"
    assert part.samples[0].counted == (b"\1" * 5, b"\0\0\1\1\1")
    assert part.cut_texts == 2


@pytest.mark.parametrize(("skips_bos", "reasons"), [(False, []), (True, ["no_token_counts"])])
def test_a_cut_that_leaves_nothing_but_bos_to_one_way_of_reading_is_a_reject(skips_bos, reasons):
    """Cut to BOS and its last token, which is BOS again: without the added one it is BOS alone."""
    rules = ReadRules("all", "keep_end", skips_bos)
    made = Tokenizer(tiny.byte_tokenizer(), prepend_bos=True, both_ways=True, max_text_tokens=2, rules=rules)
    (part,) = made.tokenize([long_sample("abc<bos>")])
    assert [reject.reason for reject in part.part.rejects] == reasons


@settings(max_examples=examples(200))
@given(
    st.binary(min_size=1, max_size=9),
    st.integers(1, 8),
    st.sampled_from(["keep_end", "keep_start"]),
    st.booleans(),
)
def test_ids_and_mask_are_cut_alike(data, most, keep, has_head):
    head = int(has_head)
    assume(head < most < len(data))
    text = EncodedText(tuple(data), data).cut(most, keep, head)
    inner = list(data[head:])
    while len(inner) > most - head:
        inner.pop(0 if keep == "keep_end" else -1)
    assert list(text.ids) == [*data[:head], *inner]
    assert text.counted == bytes(text.ids)
