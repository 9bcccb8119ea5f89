from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from daemon.bos import puts_bos
from daemon.errors import ConfigError
from daemon.model.loading import load_tokenizer
from daemon.model.location import ModelLocation
from daemon.recipes import PLAIN_RECIPE
from daemon.records import Part, PartExtent, Reject, Sample
from daemon.rejects import REJECT_REASONS
from daemon.source.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.sources import unclaimed

SOURCE = unclaimed("f")


def part_of(*texts: str, rejects: tuple[Reject, ...] = ()) -> Part:
    samples = [Sample(i, f"id{i}", None, None, None, (text,), i + 1, 10 * i) for i, text in enumerate(texts)]
    return Part(
        SOURCE, PartExtent(0, 0, len(samples) + len(rejects), 0), True, PLAIN_RECIPE, tuple(samples), rejects
    )


def tokenizer(**options: object) -> Tokenizer:
    return Tokenizer(tiny.byte_tokenizer(), **{"prepend_bos": True, "max_text_tokens": 10, **options})


def test_texts_become_ids_after_one_bos():
    (part,) = tokenizer().tokenize([part_of("ab", "c")])
    assert [len(sample.token_ids[0]) for sample in part.samples] == [3, 2]
    assert all(sample.token_ids[0][0] == tiny.BOS for sample in part.samples)
    assert part.n_tokens == 5


def test_without_bos_nothing_is_added():
    (part,) = tokenizer(prepend_bos=False).tokenize([part_of("ab")])
    assert len(part.samples[0].token_ids[0]) == 2


def test_a_text_that_brings_its_bos_gets_no_other():
    (part,) = tokenizer().tokenize([part_of("<bos>ab", "ab", "a<bos>b", "<bos><bos>a", "<bos", "<bos>")])
    ids = [sample.token_ids[0] for sample in part.samples]
    a, b = ids[1][1:]
    assert ids[0] == ids[1] == (tiny.BOS, a, b)
    assert ids[2] == (tiny.BOS, a, tiny.BOS, b)  # further on it is a token like others
    assert ids[3] == (tiny.BOS, tiny.BOS, a)  # the text's own two
    assert len(ids[4]) == 1 + len("<bos")
    assert [reject.reason for reject in part.part.rejects] == ["empty_text"]  # nothing but BOS
    (part,) = tokenizer(prepend_bos=False).tokenize([part_of("<bos>ab", "<bos>")])
    assert [sample.token_ids[0] for sample in part.samples] == [(tiny.BOS, a, b), (tiny.BOS,)]


def test_texts_that_are_read_both_ways_say_whose_their_bos_is():
    (part,) = tokenizer(both_ways=True).tokenize([part_of("ab", "<bos>ab", "", "<bos>", "a" * 10)])
    added, own = part.samples
    assert added.token_ids == own.token_ids
    assert (added.bos_added, own.bos_added) == ((True,), (False,))
    assert added.bare_ids == (added.token_ids[0][1:],)
    assert own.bare_ids == own.token_ids
    for sample, text in zip(part.samples, ("ab", "<bos>ab"), strict=True):
        for way in (True, False):
            assert sample.read_by(way) == tuple(tokenizer(prepend_bos=way).encode([text]))
    assert (added.n_tokens, own.n_tokens) == (3 + 2, 3 + 3)
    assert [reject.reason for reject in part.part.rejects] == ["empty_text", "empty_text", "text_too_long"]
    assert added.without_texts().bare_ids == added.bare_ids  # as it is shipped to a worker


def test_where_all_read_alike_a_sample_says_nothing_of_it():
    for way in (True, False):
        (part,) = tokenizer(prepend_bos=way).tokenize([part_of("ab")])
        assert part.samples[0].bos_added == part.samples[0].bare_ids == ()
        assert part.samples[0].read_by(way) == part.samples[0].token_ids


@pytest.mark.parametrize("puts", [True, False])
def test_a_tokenizers_habit_is_seen_in_what_it_makes_of_a_text(puts):
    made = tiny.byte_tokenizer()
    if puts:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", tiny.BOS)]
        )
    assert puts_bos(made) is puts


def test_eos_stands_for_a_bos_that_the_model_lacks_once():
    bare = tiny.byte_tokenizer()
    bare.bos_token = None
    ids = Tokenizer(bare, prepend_bos=True, max_text_tokens=9).encode(["<bos>a", "a"])
    assert ids[0] == ids[1]


def test_parts_share_the_time_by_their_texts(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([10.0, 16.0]).__next__)
    monkeypatch.setattr("daemon.source.tokenizer.time", clock)
    parts = tokenizer().tokenize([part_of("a", "b"), part_of(), part_of("c")])
    assert [part.part.tokenize_seconds for part in parts] == [4.0, 0.0, 2.0]


def test_a_part_without_samples_has_nothing_to_tokenize():
    (part,) = tokenizer().tokenize([part_of()])
    assert part.samples == () and part.part.tokenize_seconds == 0.0


def test_empty_and_overlong_texts_become_rejects_in_order():
    earlier = Reject(1, None, 2, 5, "malformed_json", "m")
    (part,) = tokenizer().tokenize([part_of("x" * 10, "fine", "", rejects=(earlier,))])
    assert [sample.sample.sample_id for sample in part.samples] == ["id1"]
    assert part.part.samples == (part.samples[0].sample,)
    assert [reject.reason for reject in part.part.rejects] == [
        "text_too_long",
        "malformed_json",
        "empty_text",
    ]
    assert "has 11 tokens, more than batching.max_text_tokens = 10" in part.part.rejects[0].message
    assert (part.part.rejects[2].line, part.part.rejects[2].byte_offset) == (3, 20)


def test_a_text_may_have_exactly_the_tokens_of_the_limit():
    (part,) = tokenizer().tokenize([part_of("x" * 9)])
    assert [len(sample.token_ids[0]) for sample in part.samples] == [10]
    (part,) = tokenizer().limited(9).tokenize([part_of("x" * 9)])
    assert [reject.reason for reject in part.part.rejects] == ["text_too_long"]


def test_a_text_beyond_the_models_context_is_rejected_whatever_the_limit():
    (part,) = tokenizer(context=6).tokenize([part_of("x" * 5, "x" * 6, "x" * 20)])
    assert [sample.sample.sample_id for sample in part.samples] == ["id0"]
    assert [reject.reason for reject in part.part.rejects] == ["text_too_long"] * 2
    assert "has 7 tokens, more than the 6 that the model reads" in part.part.rejects[0].message


def test_a_model_without_bos_uses_eos_and_without_either_is_refused():
    bare = tiny.byte_tokenizer()
    bare.bos_token = None
    assert Tokenizer(bare, prepend_bos=True, max_text_tokens=9).encode(["a"])[0][0] == tiny.BOS
    bare.eos_token = None
    with pytest.raises(ConfigError, match="neither BOS nor EOS"):
        Tokenizer(bare, prepend_bos=True, max_text_tokens=9)


def with_one_token_more(token: str = "<extra>") -> object:
    more = tiny.byte_tokenizer()
    more.add_tokens([token])
    return more


def test_a_token_beyond_the_models_embeddings_costs_its_record_alone():
    made = Tokenizer(with_one_token_more(), prepend_bos=True, max_text_tokens=99, vocabulary=tiny.BOS + 1)
    (part,) = made.tokenize([part_of("fine", "a <extra> b", "also fine")])
    assert [sample.sample.sample_id for sample in part.samples] == ["id0", "id2"]
    (reject,) = part.part.rejects
    assert (reject.reason, reject.sample_id) == ("unknown_token", "id1")
    assert "has a token of id 257, but the model has 257 embeddings" in reject.message
    assert reject.reason in REJECT_REASONS


def test_every_token_that_the_model_embeds_is_read():
    made = Tokenizer(with_one_token_more(), prepend_bos=True, max_text_tokens=99, vocabulary=tiny.BOS + 2)
    (part,) = made.tokenize([part_of("a<extra>b")])
    assert part.samples[0].token_ids[0][2] == tiny.BOS + 1


def test_ids_may_leave_gaps():
    gaps = tiny.byte_tokenizer()
    saved = json.loads(gaps.backend_tokenizer.to_str())
    saved["added_tokens"].append({**saved["added_tokens"][0], "id": 900, "content": "<far>"})
    saved["model"]["vocab"]["<far>"] = 900
    gaps = PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(json.dumps(saved)), bos_token="<bos>")
    made = Tokenizer(gaps, prepend_bos=True, max_text_tokens=99, vocabulary=300)
    (part,) = made.tokenize([part_of("a", "<far>")])
    assert [reject.reason for reject in part.part.rejects] == ["unknown_token"]


def test_a_bos_beyond_the_models_embeddings_is_refused_at_the_start():
    with pytest.raises(ConfigError, match="BOS token has the id 256, but the model has 256 embeddings"):
        tokenizer(vocabulary=tiny.BOS)
    tokenizer(vocabulary=tiny.BOS, prepend_bos=False)


def test_a_text_that_the_tokenizer_can_not_encode_costs_its_record_alone():
    letters = Backend(models.WordPiece(vocab={"a": 0, "b": 1, "<bos>": 2}, unk_token="[UNK]"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<bos>")
    made = Tokenizer(fast, prepend_bos=True, max_text_tokens=9, vocabulary=3)
    (part,) = made.tokenize([part_of("a b", "a c", "b", "z", "a a")])
    assert [sample.token_ids[0] for sample in part.samples] == [(2, 0, 1), (2, 1), (2, 0, 0)]
    assert [(reject.reason, reject.sample_id) for reject in part.part.rejects] == [
        ("unknown_token", "id1"),
        ("unknown_token", "id3"),
    ]
    assert "no token for" in part.part.rejects[0].message


@pytest.mark.parametrize("name", ["tokenizer.json", "both", "emptied"])
def test_a_model_without_a_tokenizer_is_refused(name, tmp_path):
    folder = tiny.save_llama(tmp_path / "model")
    if name == "emptied":
        saved = json.loads((folder / "tokenizer.json").read_text())
        saved["model"]["vocab"] = {}
        (folder / "tokenizer.json").write_text(json.dumps(saved))
    else:
        (folder / "tokenizer.json").unlink()
        if name == "both":
            (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ConfigError, match="tokenizer") as error:
        load_tokenizer(ModelLocation("m", str(folder), None))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_bug_is_not_taken_for_a_text_without_tokens(monkeypatch):
    """Of the tokenizer's library alone an error is one text's."""
    tokenizer = Tokenizer(tiny.byte_tokenizer(), prepend_bos=False, max_text_tokens=8)
    monkeypatch.setattr(Tokenizer, "_encode", lambda *_: [].pop())
    with pytest.raises(IndexError):
        tokenizer.tokenize([part_of("ab", "cd")])
