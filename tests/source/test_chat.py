"""Conversations become the tokenizer's own ids, and each token is its message's."""

from __future__ import annotations

import itertools
import pickle
import re

import pytest

from daemon.errors import SampleError
from daemon.recipes import BUILT_IN_RECIPES, CHAT_RECIPE, Conversation, Message
from daemon.records import CountedTokens, Part, PartExtent, Sample
from daemon.source.chat import ChatTemplate
from daemon.source.counting import EncodedText, ReadRules
from daemon.source.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.chats import CHATML, COUNTING, STRIPPED, TEMPLATES, chat_tokenizer
from tests.support.sources import unclaimed

# Each role writes letters of its own, so that a token says whose it is.
CONTENT = {"system": "SYS", "user": "uu u", "assistant": "aaa a"}
ONE = ("user", "assistant")
CASES = {
    "one answer": ONE,
    "two answers": ONE * 2,
    "a system prompt": ("system", *ONE),
    "a system prompt, two answers": ("system", *ONE * 2),
}


def chat_of(roles: tuple[str, ...], awaits_answer: bool = False) -> Conversation:
    return Conversation(tuple(Message(role, CONTENT[role]) for role in roles), awaits_answer)


def plain(chat: Conversation) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in chat.messages]


@pytest.mark.parametrize("roles", CASES.values(), ids=CASES)
@pytest.mark.parametrize("awaits_answer", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_the_tokenizers_own(name, awaits_answer, roles):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    chat = chat_of(roles[:-1] if awaits_answer else roles, awaits_answer)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    own = tokenizer.apply_chat_template(plain(chat), add_generation_prompt=awaits_answer)["input_ids"]
    assert template.encode(chat, "all", None) == EncodedText(tuple(own))
    assert own.count(tiny.BOS) == (name in ("marked", "moved", "merged"))


def expected(name: str, role: str, text: str) -> list[bool]:
    """Token by token whether it is of this role, told from the rendered text by hand.

    A message's tokens are its content and all to the next message; with generation marks what they enclose.
    """
    before, after = {
        "chatml": (r"<\|im_start\|>{}\n", r"<\|im_end\|>\n"),
        "defaulted": (r"<\|im_start\|>{}\n", r"<\|im_end\|>\n"),
        "marked": (r"<\|im_start\|>{}\|", r"<\|im_end\|>" if role == "assistant" else r"<\|im_end\|>\n"),
        "merged": (r"\[/INST\]", r"<\|im_end\|>")
        if role == "assistant"
        else (r"\[INST\] (?:<<.*?>>)?", r"\[/INST\]"),
        "moved": (r"\[/INST\] ", r"<\|im_end\|>")
        if role == "assistant"
        else (r"\[INST\] (?:SYS\n\n)?", r"\[/INST\]"),
    }[name]
    spans = [
        found.span(1) for found in re.finditer(before.format(role) + rf"({CONTENT[role]}(?:{after}))", text)
    ]
    tokens = re.finditer(r"<\|im_start\|>|<\|im_end\|>|<bos>|.", text, re.DOTALL)
    return [any(start <= token.start() < end for start, end in spans) for token in tokens]


@pytest.mark.parametrize("roles", CASES.values(), ids=CASES)
@pytest.mark.parametrize("role", ["assistant", "user"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_roles_are_right_token_by_token_or_the_record_is_refused(name, role: CountedTokens, roles):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    chat = chat_of(roles)
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    if name == "moved" and roles == CASES["a system prompt, two answers"]:
        with pytest.raises(SampleError, match="moves or drops messages") as refused:
            template.encode(chat, role, None)
        assert refused.value.reason == "roles_unclear"
        return
    ids, counted, *_ = template.encode(chat, role, None)
    text = tokenizer.apply_chat_template(plain(chat), tokenize=False)
    assert counted is not None and len(ids) == len(counted)
    assert [bool(one) for one in counted] == expected(name, role, text)
    assert sum(counted) >= len(CONTENT[role]) * roles.count(role)


THOUGHT = Message("assistant", "hm/aaa")


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (STRIPPED, (Message("user", "u"), THOUGHT, Message("user", "u"), Message("assistant", "a"))),
        (COUNTING, (Message("user", "u"), Message("assistant", "aaa"))),
    ],
    ids=["an earlier answer is cut", "what stands first changes with the content"],
)
def test_a_conversation_that_its_beginning_does_not_begin_is_refused(template, messages):
    made = ChatTemplate.of(chat_tokenizer(template))
    assert made is not None
    made.encode(Conversation(messages), "all", None)
    with pytest.raises(SampleError, match="nothing tells which tokens are its message 2"):
        made.encode(Conversation(messages), "assistant", None)


@pytest.mark.parametrize("name", ["chatml", "marked", "merged", "defaulted"])
def test_a_completion_is_what_follows_the_prompt(name):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    chat = chat_of(("system", *ONE * 2))
    ids, counted, *_ = template.encode(chat, "completion", 4)
    prompt, *_ = template.encode(chat_of(("system", *ONE, "user"), awaits_answer=True), "completion", 0)
    assert counted == bytes(len(prompt)) + b"\1" * (len(ids) - len(prompt))
    assert ids[: len(prompt)] == prompt
    with pytest.raises(SampleError, match="has no token of a completion"):
        template.encode(chat, "completion", None)


def test_content_that_merges_with_what_stands_before_it_is_the_contents():
    """A token that straddles the border, here a doubled newline, belongs to the message."""
    merging = chat_tokenizer(CHATML)
    merging.add_tokens(["\n\n"])
    template = ChatTemplate.of(merging)
    assert template is not None
    chat = Conversation((Message("user", "\nu"), Message("assistant", "a")))
    ids, counted, *_ = template.encode(chat, "user", None)
    doubled = merging.convert_tokens_to_ids("\n\n")
    assert counted is not None
    assert counted[ids.index(doubled)] == 1 and counted.index(1) == ids.index(doubled)


def part_of(*chats: Conversation) -> Part:
    samples = tuple(
        Sample(i, f"s{i}", None, None, None, (chat,), i + 1, None) for i, chat in enumerate(chats)
    )
    return Part(unclaimed("f"), PartExtent(0, 0, len(samples), 0), True, CHAT_RECIPE, samples, ())


def rejects(template: str | None, chat: Conversation, tokens: CountedTokens = "all") -> list[tuple[str, str]]:
    made = Tokenizer(
        chat_tokenizer(template), prepend_bos=True, max_text_tokens=99, rules=ReadRules(tokens=tokens)
    )
    (part,) = made.tokenize([part_of(chat)])
    return [(reject.reason, reject.message) for reject in part.part.rejects]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("prepend_bos", [False, True])
def test_a_conversation_has_one_bos_where_the_saes_expect_it(name, prepend_bos):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    chat = chat_of(ONE)
    made = Tokenizer(tokenizer, prepend_bos=prepend_bos, max_text_tokens=99)
    ids = made.tokenize([part_of(chat)])[0].samples[0].token_ids[0]
    own = tuple(tokenizer.apply_chat_template(plain(chat))["input_ids"])
    added = prepend_bos and own[0] != tiny.BOS
    assert ids == ((tiny.BOS, *own) if added else own)
    assert ids.count(tiny.BOS) == (prepend_bos or name in ("marked", "moved", "merged"))


def test_a_tokenizer_that_was_shipped_renders_the_same():
    made = Tokenizer(chat_tokenizer(CHATML), prepend_bos=True, max_text_tokens=99)
    shipped = pickle.loads(pickle.dumps(made))
    chat = chat_of(ONE)
    assert shipped.tokenize([part_of(chat)])[0].samples == made.tokenize([part_of(chat)])[0].samples


def test_without_a_template_or_against_it_a_conversation_is_one_reject():
    ((reason, message),) = rejects(None, chat_of(ONE))
    assert reason == "no_chat_template"
    assert message.startswith(
        "text 'messages' is a conversation, and the model's tokenizer has no chat template"
    )
    ((reason, message),) = rejects(TEMPLATES["moved"], chat_of(("assistant", "user")))
    assert reason == "chat_refused" and "roles must alternate user and assistant" in message
    ((reason, message),) = rejects(CHATML, chat_of(("user",)), tokens="assistant")
    assert reason == "no_token_counts" and "text 'messages' has no token of the assistant" in message
    ((reason, _),) = rejects(CHATML, chat_of(ONE), tokens="completion")
    assert reason == "no_token_counts"


def counts_renderings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many messages each rendering has, as they are made."""
    sizes: list[int] = []
    applied = ChatTemplate._applied
    monkeypatch.setattr(
        ChatTemplate,
        "_applied",
        lambda self, messages, **options: sizes.append(len(messages)) or applied(self, messages, **options),
    )
    return sizes


@pytest.mark.parametrize("tokens", ["assistant", "user"])
def test_a_conversation_that_is_too_long_is_rendered_once(monkeypatch, tokens):
    sizes = counts_renderings(monkeypatch)
    ((reason, message),) = rejects(CHATML, chat_of(ONE * 20), tokens)
    assert (reason, sizes) == ("text_too_long", [40])
    assert "more than batching.max_text_tokens = 99" in message


def test_of_more_messages_than_are_told_apart_a_conversation_is_rendered_once(monkeypatch):
    most = 40
    monkeypatch.setattr("daemon.source.chat.MOST_MESSAGES", most)
    silent = "{% for message in messages %}{{ message.content }}{% endfor %}!"
    sizes = counts_renderings(monkeypatch)
    chat = Conversation((*chat_of(ONE).messages, *[Message("user", "")] * (most - 1)))
    ((reason, message),) = rejects(silent, chat, "user")
    assert (reason, sizes) == ("roles_unclear", [most + 1])
    assert f"has {most + 1} messages, and in more than {most} " in message
    sizes.clear()
    assert rejects(silent, chat) == [] and sizes == [most + 1]
    assert rejects(CHATML.replace("|im_start|", ""), chat_of(ONE), "user") == []


def test_a_template_that_asks_for_the_day_gives_the_same_on_every_day():
    template = "{{ strftime_now('%d %b %Y') }}|{{ strftime_now(\"%Y\") }}" + CHATML
    made = ChatTemplate.of(chat_tokenizer(template))
    assert made is not None
    ids, *_ = made.encode(chat_of(ONE), "all", None)
    assert chat_tokenizer(None).decode(ids).startswith("26 Jul 2024|2024")
    ((reason, message),) = rejects("{% set form = '%d' %}{{ strftime_now(form) }}" + CHATML, chat_of(ONE))
    assert reason == "chat_refused" and "has the day of the run in it" in message


def test_built_in_recipes_are_tried_by_how_much_they_say():
    sizes = [len(recipe.fields) for recipe in BUILT_IN_RECIPES]
    assert sizes == sorted(sizes, reverse=True)
    assert not any(one.fields == other.fields for one, other in itertools.combinations(BUILT_IN_RECIPES, 2))
