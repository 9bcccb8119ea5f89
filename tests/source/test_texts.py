"""Which texts a record has by the recipe that its fields choose."""

from __future__ import annotations

import csv
import itertools
import json
import re
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from daemon.errors import FileError, SampleError
from daemon.recipes import (
    BUILT_IN_RECIPES,
    CHAT_RECIPE,
    COMPLETION_RECIPE,
    CONTRAST_RECIPE,
    PLAIN_RECIPE,
    PREFERENCE_RECIPE,
    SHARED_PROMPT_RECIPE,
    Conversation,
    Message,
    Recipe,
)
from daemon.records import Part, Sample
from daemon.source.parsing import Place, choose_recipe, parse_value, to_sample
from daemon.source.texts import member, shared_words
from tests.support.effort import examples
from tests.support.sources import parts_of

USER = {"role": "user", "content": "What color is the sky?"}
BLUE = {"role": "assistant", "content": "Blue."}
GREEN = {"role": "assistant", "content": "Green."}
SYSTEM = {"role": "system", "content": "Be brief."}
WORDS = st.text(st.sampled_from("ab .,-5\n\u3002"), max_size=8)


def sample_of(record: dict[str, Any], recipe: Recipe | None = None) -> Sample:
    value = parse_value(json.dumps(record), 32)
    chosen = recipe or choose_recipe([value], BUILT_IN_RECIPES)
    assert chosen is not None
    return to_sample(value, chosen, Place(0, 1, 0))


def why_not(record: dict[str, Any], recipe: Recipe | None = None) -> SampleError:
    with pytest.raises(SampleError) as caught:
        sample_of(record, recipe)
    return caught.value


def chat(*messages: dict[str, str], awaits_answer: bool = False) -> Conversation:
    return Conversation(tuple(Message(one["role"], one["content"]) for one in messages), awaits_answer)


@pytest.mark.parametrize(
    ("fields", "recipe"),
    [
        ("prompt fact hallucination", CONTRAST_RECIPE),
        ("prompt fact hallucination chosen rejected text messages completion", CONTRAST_RECIPE),
        ("prompt chosen rejected messages", PREFERENCE_RECIPE),
        ("prompt chosen rejected text", PREFERENCE_RECIPE),
        ("chosen rejected text", SHARED_PROMPT_RECIPE),
        ("prompt completion text messages", COMPLETION_RECIPE),
        ("text messages prompt chosen", PLAIN_RECIPE),
        ("messages prompt", CHAT_RECIPE),
        ("prompt", None),
    ],
)
def test_the_recipe_that_says_most_is_taken(fields, recipe):
    assert choose_recipe([{"x": 1}, dict.fromkeys(fields.split(), "a")], BUILT_IN_RECIPES) is recipe


def test_configured_recipes_come_before_the_built_in_ones_in_their_order():
    two = Recipe((("b", "{text} {note}"),), None, name="two")
    one = Recipe((("a", "{text}"),), None, name="one")
    assert choose_recipe([{"text": "t", "note": "n"}], (one, two, *BUILT_IN_RECIPES)) is one
    assert choose_recipe([{"text": "t", "note": "n"}], (two, one, *BUILT_IN_RECIPES)) is two
    assert choose_recipe([{"text": "t"}], (two, *BUILT_IN_RECIPES)) is PLAIN_RECIPE


def test_strings_are_joined_and_say_where_completions_begin():
    sample = sample_of(
        {"prompt": "The sky is", "chosen": "blue.", "rejected": " green.", "id": 1, "score": 2}
    )
    assert sample.texts == ("The sky is", "The sky is blue.", "The sky is green.")
    assert (sample.starts, sample.extra) == ((0, 10, 10), '{"score": 2}')
    sample = sample_of({"prompt": "The sky is", "completion": "blue."})
    assert (sample.texts, sample.starts) == (("The sky is", "The sky is blue."), (0, 10))
    assert sample_of({"prompt": "p", "fact": "f", "hallucination": ", h"}).starts == (0, 1, 1)
    assert sample_of({"text": "t"}).starts == ()


def test_conversations_in_every_form_of_a_preference():
    expected = (chat(SYSTEM, USER, awaits_answer=True), chat(SYSTEM, USER, BLUE), chat(SYSTEM, USER, GREEN))
    for record in (
        {"prompt": [SYSTEM, USER], "chosen": [BLUE], "rejected": [GREEN]},
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
        {"prompt": USER["content"], "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
        {"prompt": "", "chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
        {"chosen": [SYSTEM, USER, BLUE], "rejected": [SYSTEM, USER, GREEN]},
    ):
        sample = sample_of(record)
        assert (sample.texts, sample.starts, sample.extra) == (expected, (0, 2, 2), None)


def test_a_conversation_keeps_its_roles_and_its_parts():
    nothing = {"name": "Ann", "tool_calls": [], "refusal": None, "reasoning_content": "", "audio": {}}
    sample = sample_of({"messages": [SYSTEM, USER | nothing, BLUE], "tools": None})
    assert sample.texts == (chat(SYSTEM, USER, BLUE),)
    assert (sample.starts, sample.extra) == ((), '{"tools": null}')
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two", "image": None}]
    assert (
        sample_of({"messages": [{"role": "user", "content": parts}]}).texts[0].messages[0].content
        == "one two"
    )
    assert sample_of({"messages": [{"role": "user", "content": 1.50}]}).texts[0].messages[0].content == "1.5"
    completed = sample_of({"prompt": [USER], "completion": [BLUE]})
    assert completed.texts == (chat(USER, awaits_answer=True), chat(USER, BLUE))
    assert completed.starts == (0, 1)


SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is 2+2?"}
SAID, OTHER = ({"role": "assistant", "content": answer} for answer in ("4", "5"))
IMAGE = {"type": "image", "image": "x"}


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        ({"messages": "User: hi"}, "bad_field", "a JSON string: make it a list of"),
        ({"messages": []}, "bad_chat", "has no message in field 'messages'"),
        (  # one answer repeats the prompt, the other does not
            {"prompt": [ASK], "chosen": [ASK, SAID], "rejected": [OTHER]},
            "bad_chat",
            "repeats messages of 'prompt' in a part of 'chosen' and 'rejected'",
        ),
        (  # both repeat its end alone
            {"prompt": [SYSTEM, ASK], "chosen": [ASK, SAID], "rejected": [ASK, OTHER]},
            "bad_chat",
            "repeats messages of 'prompt' in a part of 'chosen' and 'rejected'",
        ),
        ({"messages": ["hi"]}, "bad_chat", "has a JSON string as message 1 of 'messages'"),
        (
            {"messages": [USER, {"role": "tool", "content": "x"}]},
            "bad_chat",
            "has the role 'tool' in message 2 of 'messages'",
        ),
        ({"messages": [{"content": "x"}]}, "bad_chat", "has no role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "bad_chat", "has no role"),
        ({"messages": [{"role": "user"}]}, "bad_chat", "has no content"),
        ({"messages": [{"role": "user", "content": None}]}, "bad_chat", "has no content"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "bad_chat", "a part that is no text"),
        (
            {"messages": [BLUE | {"tool_calls": [{"id": "1"}]}]},
            "bad_chat",
            "has 'tool_calls' in message 1 of 'messages', which lensd does not render",
        ),
        ({"messages": [BLUE | {"reasoning_content": "hm"}]}, "bad_chat", "has 'reasoning_content'"),
        (
            {"messages": [BLUE | {"audio": {"id": 1}, "images": ["b"]}]},
            "bad_chat",
            "has 'audio' in message 1",
        ),
        ({"messages": [USER, BLUE | {"refusal": "no"}]}, "bad_chat", "has 'refusal' in message 2"),
        ({"messages": [BLUE | {"weight": 0}]}, "bad_chat", "has 'weight'"),
        ({"messages": [BLUE | {"prefix": False}]}, "bad_chat", "has 'prefix'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "x", "image": "y"}]}]},
            "bad_chat",
            "has 'image' in a part of message 1",
        ),
        (
            {"messages": [{"from": "human", "value": "hi"}]},
            "bad_chat",
            "has 'from' and 'value' in message 1 of 'messages', and no role and content: rename them",
        ),
        ({"messages": None}, "bad_field", "a JSON null: make it a list of {role, content}, in JSON Lines or"),
        ({"messages": USER}, "bad_field", "a JSON object: make it a list of {role, content}"),
        ({"prompt": [USER], "chosen": "Blue.", "rejected": "Green."}, "bad_field", "partly strings"),
        (
            {"prompt": "other", "chosen": [USER, BLUE], "rejected": [USER, GREEN]},
            "bad_chat",
            "has in 'prompt' a text that is no message with which 'chosen' and 'rejected' both begin",
        ),
        ({"prompt": "Blue.", "chosen": [USER, BLUE], "rejected": [USER, GREEN]}, "bad_chat", "in 'prompt'"),
        ({"prompt": [USER], "chosen": [BLUE], "rejected": "Green."}, "bad_field", "partly strings"),
        ({"prompt": "x", "completion": [BLUE]}, "bad_field", "partly strings"),
        ({"prompt": [USER], "chosen": None, "rejected": [BLUE]}, "bad_field", "'chosen' is a JSON null"),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [USER, BLUE]},
            "bad_field",
            "no message after the prompt",
        ),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "bad_field", "begin with no common message"),
        ({"prompt": "x", "chosen": [BLUE], "rejected": [GREEN]}, "bad_field", "begin with no common message"),
        ({"chosen": [USER, BLUE], "rejected": [USER, BLUE]}, "bad_field", "no message after the prompt"),
        ({"chosen": "one", "rejected": "one"}, "bad_field", "are the same text"),
        ({"chosen": "one", "rejected": "two"}, "bad_field", "begin with no common word"),
        ({"prompt": ["a"], "fact": "b", "hallucination": "c"}, "bad_field", "'prompt' is a JSON array"),
    ],
)
def test_what_can_not_be_read_rightly_is_a_reject_that_says_why(record, reason, said):
    error = why_not(record)
    assert error.reason == reason
    assert said in str(error)


@pytest.mark.parametrize("written", [json.dumps, repr, lambda chat: "\n " + json.dumps(chat, indent=1)])
@pytest.mark.parametrize("fields", ["chosen rejected", "prompt completion", "prompt chosen rejected"])
def test_a_conversation_as_text_is_no_prose(fields, written):
    record = dict.fromkeys(fields.split(), written([USER, BLUE]))
    error = why_not(record)
    assert (error.reason, str(error)) == (
        "bad_chat",
        f"has a conversation as text in field '{fields.split()[0]}': store it as a list"
        " (JSON Lines or Parquet)",
    )


@pytest.mark.parametrize(
    "chat", ["not a list", '[{"a": 1}]', '[{"role": "x", "content": "y"}] is JSON', "[{role}]", "[{"]
)
def test_other_text_in_brackets_is_prose(chat):
    assert sample_of({"prompt": chat, "completion": "."}).texts == (chat, f"{chat}.")


def test_a_cell_of_messages_is_sent_to_a_format_that_has_lists():
    error = why_not({"messages": json.dumps([{"from": "human", "value": "hi"}])})
    assert (error.reason, "(JSON Lines or Parquet)" in str(error)) == ("bad_chat", True)


@pytest.mark.parametrize(
    ("nulls", "rest", "recipe"),
    [
        ("text", {"messages": [USER]}, CHAT_RECIPE),
        ("prompt completion text", {"messages": [USER]}, CHAT_RECIPE),
        ("prompt", {"chosen": [USER, BLUE], "rejected": [USER, GREEN]}, SHARED_PROMPT_RECIPE),
        ("messages", {"text": "a"}, PLAIN_RECIPE),
        ("text", {}, PLAIN_RECIPE),
        ("text messages", {}, PLAIN_RECIPE),
    ],
)
def test_a_null_field_is_as_if_absent_when_the_recipe_is_chosen(nulls, rest, recipe):
    record = dict.fromkeys(nulls.split()) | rest
    assert choose_recipe([record], BUILT_IN_RECIPES) is recipe
    assert choose_recipe([dict.fromkeys(record), record], BUILT_IN_RECIPES) is recipe


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("It is wet", "It is warm", "It is"),
        ("\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no", "\n\nHuman: hi\n\nAssistant:"),
        ("Q?\nyes", "Q?\nno", "Q?\n"),
        ("The sky", "The sky is blue", "The"),
    ],
)
def test_the_prompt_is_the_words_that_both_answers_begin_with(chosen, rejected, prompt):
    sample = sample_of({"chosen": chosen, "rejected": rejected})
    assert sample.texts == (prompt, chosen, rejected)
    assert sample.starts == (0, len(prompt), len(prompt))


@settings(max_examples=examples(300))
@given(WORDS, WORDS, WORDS)
@example("a b", "", "c")
def test_the_shared_words_are_those_that_a_list_of_words_gives(begin, one, other):
    one, other = begin + one, begin + other
    assume(one != other)
    words = [re.findall(r"\S+|\s", text) for text in (one, other)]
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*words, strict=False)))
    if same and not same[-1][0].isspace():
        same.pop()  # the other may go on with it
    if same and same[-1][0] == " ":
        same.pop()
    expected = "".join(word for word, _ in same)
    if expected.strip():
        assert shared_words(one, other) == expected
    else:
        with pytest.raises(SampleError, match="no common word"):
            shared_words(one, other)


@settings(max_examples=examples(300))
@given(WORDS, WORDS)
def test_a_text_is_its_prompt_and_then_what_follows_its_start(prompt, completion):
    sample = sample_of({"prompt": prompt, "completion": completion})
    whole, start = sample.texts[1], sample.starts[1]
    assert isinstance(whole, str) and start == len(prompt)
    assert whole[:start] == prompt
    assert whole[start:] in (completion, " " + completion)


NESTED = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}],
    "meta": {"source": "web", "0": "zero", "n": 1.50, "yes": True},
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{messages[0][content]}", "hi"),
        ("{messages[-1][content]} {meta.source}", "ho web"),
        ("{meta[source]}: {meta[0]}", "web: zero"),
        ("{{{meta.n}}} {meta.yes}", "{1.5} true"),
    ],
)
def test_templates_reach_into_nested_fields(template, text):
    sample = sample_of(NESTED, Recipe((("t", template),), None))
    assert sample.texts == (text,)
    assert json.loads(sample.extra or "")["meta"] == NESTED["meta"]  # it holds more than the text


@pytest.mark.parametrize(
    ("template", "reason", "said"),
    [
        ("{messages[2][content]}", "missing_field", "has nothing at 'messages[2][content]'"),
        ("{messages[0].text}", "missing_field", "has nothing at"),
        ("{messages.content}", "missing_field", "has nothing at"),
        ("{messages[0_1][content]}", "missing_field", "has nothing at"),
        ("{messages[ 1 ][content]}", "missing_field", "has nothing at"),
        ("{messages[+1][content]}", "missing_field", "has nothing at"),
        ("{messages[\u0661][content]}", "missing_field", "has nothing at"),
        ("{messages.\u0661.content}", "missing_field", "has nothing at"),
        ("{meta.source.upper}", "missing_field", "has nothing at"),
        ("{meta.__class__}", "missing_field", "has nothing at"),
        ("{other.x}", "missing_field", "has nothing at"),
        ("{other}", "missing_field", "has no field 'other'"),
        ("{messages[0]}", "bad_field", "field 'messages[0]' is a JSON object: make it a string"),
    ],
)
def test_a_path_that_leads_nowhere_is_a_reject(template, reason, said):
    error = why_not(NESTED, Recipe((("t", template),), None))
    assert error.reason == reason
    assert said in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(300))
@given(JSON, st.sampled_from(["__class__", "__init__", "upper", "append", "keys", "real", "0", "-1", "a"]))
def test_a_step_leads_to_values_of_the_json_alone(value, step):
    found = member(value, step)
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    assert any(found is one for one in inside) or type(found) is object


RECORD = {"chosen": [USER, BLUE], "rejected": [USER, GREEN]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl", json.dumps(RECORD) + "\n" + json.dumps(RECORD)),
        ("f.json", json.dumps([RECORD, RECORD])),
        ("f.json", json.dumps([RECORD, RECORD], indent=2)),
        ("f.json", json.dumps({"data": [RECORD, RECORD]}, indent=2)),
        ("f.json", json.dumps(RECORD, indent=2) + "\n" + json.dumps(RECORD, indent=2)),
        ("f.json", json.dumps(RECORD) + json.dumps({"messages": [USER]} | RECORD)),
    ],
    ids=["lines", "an array", "a printed array", "a list under a key", "printed objects", "objects in a row"],
)
async def test_lists_of_messages_are_no_lists_of_records(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    (part,) = await parts_of(tmp_path / name)
    assert isinstance(part, Part) and not part.rejects
    assert [sample.texts for sample in part.samples] == [sample_of(RECORD).texts] * 2


async def test_a_file_that_is_one_conversation_is_one_record(tmp_path):
    for number, indent in enumerate([None, 2]):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps({"messages": [USER, BLUE]}, indent=indent))
        (part,) = await parts_of(path)
        assert isinstance(part, Part)
        assert [sample.texts for sample in part.samples] == [(chat(USER, BLUE),)]


@pytest.mark.parametrize(
    ("record", "template", "said"),
    [
        ({"a": ["x", "y"]}, "{a[5]}", "nothing at 'a[5]'"),
        ({"a": {"b": "x"}}, "{a.c}", "nothing at 'a.c'"),
        ({"a": {"0": "x"}}, "{a[1]}", "nothing at 'a[1]'"),
    ],
)
async def test_a_record_whose_path_leads_nowhere_is_no_table_of_columns(tmp_path, record, template, said):
    for name, indent in (("f.jsonl", None), ("f.json", 1)):
        (tmp_path / name).write_text(json.dumps(record, indent=indent))
        with pytest.raises(FileError, match="its only record can't be used: missing_field") as caught:
            await parts_of(tmp_path / name, Recipe((("t", template),), None))
        assert said in str(caught.value)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
async def test_conversations_in_cells_of_a_table_are_rejects(tmp_path, suffix):
    path = tmp_path / f"f.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if suffix == "tsv" else ",")
        writer.writerows([("chosen", "rejected"), (json.dumps([USER, BLUE]), json.dumps([USER, GREEN]))])
    with pytest.raises(FileError, match=r"bad_chat.*store it as a list"):
        await parts_of(path)
