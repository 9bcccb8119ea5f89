"""A record's texts by its recipe: strings, or conversations of messages. Knows no tokens and no templates.

Values are those that `daemon.source.parsing` reads: numbers stand as they were written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from daemon.errors import SampleError
from daemon.escaping import cut_short
from daemon.prefixes import shared_length
from daemon.recipes import ROLES, Conversation, Message, Recipe, Text, path_of
from daemon.source.jsonvalues import as_text, json_type

MESSAGE_KEYS = ("role", "content", "name")  # a name is not rendered
PART_KEYS = ("type", "text")
SHAREGPT = ("from", "value")
LIST_FORM = "a list of {role, content}, in JSON Lines or Parquet"
OBJECTS = re.compile(r"\s*+\[\s*+\{")  # as a list of objects begins
PYTHON_MESSAGES = re.compile(r"\s*+\[\s*+\{\s*+'(?:role|content|from|value)'\s*+:.*\}\s*\]\s*", re.DOTALL)
INDEX = re.compile(r"-?[0-9]+")


class Texts(NamedTuple):
    """The texts of one record, in the order of its recipe.

    `starts` says where in each text its completion begins: a character, or of a conversation a message; 0 in
    the prompt itself. None in a text without a completion; empty where no text has one.
    """

    texts: tuple[Text, ...]
    starts: tuple[int | None, ...] = ()


def texts_of(record: Mapping[str, Any], recipe: Recipe) -> Texts:
    """Raises SampleError where the record lacks what the recipe needs."""
    if recipe.chats:
        return texts_of_chats(record, recipe)
    values: dict[str, str] = {}
    for place, is_field in recipe.places.items():
        value = record.get(place) if is_field else None
        values[place] = value if value.__class__ is str else place_text(record, place)
    texts = recipe.render(values)
    return Texts(texts, starts_after(texts[0], len(texts)) if recipe.joins else ())


def starts_after(prompt: Text, texts: int) -> tuple[int, ...]:
    """The first text is the prompt, and all others begin with it."""
    return (0, *[len(prompt.messages) if isinstance(prompt, Conversation) else len(prompt)] * (texts - 1))


def texts_of_chats(record: Mapping[str, Any], recipe: Recipe) -> Texts:
    """The texts of a recipe whose fields are strings or conversations."""
    fields = [
        field
        for field in ("prompt", "chosen", "rejected", "completion", "messages")
        if field in recipe.fields
    ]
    if recipe.fields == {"messages"}:
        return Texts((Conversation(only_chat(record, "messages")),))
    values = {field: string_or_chat(record, field) for field in fields}
    prompt = values.pop("prompt", None)
    parts = list(values.values())
    chats = [part for part in parts if not isinstance(part, str)]
    strings = [part for part in parts if isinstance(part, str)]
    if chats and strings:
        raise mixed(list(values))
    if chats:
        return conversations(prompt, chats, fields)
    return strings_of(prompt, strings, recipe)


def strings_of(prompt: str | Sequence[Message] | None, completions: Sequence[str], recipe: Recipe) -> Texts:
    if prompt is None:
        prompt = shared_words(*completions)
        return Texts((prompt, *completions), starts_after(prompt, 1 + len(completions)))
    if not isinstance(prompt, str):
        raise mixed(["prompt", *sorted(recipe.fields - {"prompt"})])
    fields = [name for name in ("chosen", "rejected", "completion") if name in recipe.fields]
    texts = recipe.render({"prompt": prompt, **dict(zip(fields, completions, strict=True))})
    return Texts(texts, starts_after(prompt, len(texts)))


def conversations(
    prompt: str | Sequence[Message] | None, completions: Sequence[Sequence[Message]], fields: Sequence[str]
) -> Texts:
    """The prompt as a conversation that awaits its answer, then the whole to the end of each completion.

    Completions that begin with the prompt's messages hold the whole conversation. So do two of them beside a
    prompt that is absent, or a string which is the content of a message that both begin with: then the prompt
    is what they begin with both.
    """
    if prompt is None or isinstance(prompt, str):
        if len(completions) < 2:
            raise mixed(fields)
        begins: Sequence[Message] = completions[0][: shared_length(*completions)]
    else:
        begins = prompt
        whole = [tuple(part[: len(begins)]) == tuple(begins) for part in completions]
        if not all(whole):
            check_answers(begins, completions, any(whole), fields)
            completions = [(*begins, *part) for part in completions]
    if not begins:
        raise SampleError(
            "bad_field",
            f"fields {' and '.join(map(repr, fields))} begin with no common message, and none is the prompt:"
            " give a field 'prompt' with the messages before the answers",
        )
    if isinstance(prompt, str) and prompt and all(prompt != message.content for message in begins):
        raise SampleError(
            "bad_chat",
            f"has in 'prompt' a text that is no message with which {' and '.join(map(repr, fields[1:]))} both"
            " begin: make 'prompt' a list of messages, or leave it out",
        )
    if any(len(part) == len(begins) for part in completions):
        raise SampleError("bad_field", "has no message after the prompt in one of its answers: give it one")
    starts = (0, *[len(begins)] * len(completions))
    awaits = Conversation(tuple(begins), awaits_answer=begins[-1].role != "assistant")
    return Texts((awaits, *(Conversation(tuple(part)) for part in completions)), starts)


def check_answers(
    begins: Sequence[Message], answers: Sequence[Sequence[Message]], some_whole: bool, fields: Sequence[str]
) -> None:
    """Raises SampleError where some answers repeat the prompt, or a part of it, and would say it twice."""
    asked_twice = any(part and part[0].role == begins[-1].role == "user" for part in answers if begins)
    if some_whole or asked_twice:
        raise SampleError(
            "bad_chat",
            f"repeats messages of {fields[0]!r} in a part of {' and '.join(map(repr, fields[1:]))}: repeat"
            " all of them in each, or none",
        )


def shared_words(one: str, other: str) -> str:
    """What both begin with, up to the word in which they part; the space before it belongs to the answers.

    Raises SampleError where that is nothing, or where the two are one text.
    """
    if one == other:
        raise SampleError(
            "bad_field", "fields 'chosen' and 'rejected' are the same text: leave the record out"
        )
    end = shared_length(one, other)
    while end and not one[end - 1].isspace():
        end -= 1
    if end and one[end - 1] == " ":
        end -= 1
    if not one[:end].strip():
        raise SampleError(
            "bad_field",
            "fields 'chosen' and 'rejected' begin with no common word, which would be the prompt:"
            " give it in a field 'prompt'",
        )
    return one[:end]


def string_or_chat(record: Mapping[str, Any], field: str) -> str | tuple[Message, ...]:
    value = record.get(field)
    if isinstance(value, list):
        return messages_of(value, field)
    if isinstance(value, str):
        check_prose(value, field)
    elif field in record and not isinstance(value, int):
        raise bad_field(field, value, "a string, or a list of {role, content}")
    return place_text(record, field)


def only_chat(record: Mapping[str, Any], field: str) -> tuple[Message, ...]:
    """Raises SampleError where the field is no conversation."""
    value = record.get(field)
    if isinstance(value, list):
        return messages_of(value, field)
    if field not in record:
        place_text(record, field)
    if isinstance(value, str):
        check_prose(value, field)
    raise bad_field(field, value, LIST_FORM)


def check_prose(text: str, field: str) -> None:
    """Raises SampleError for a conversation that was written as text, in JSON or as Python prints it."""
    if OBJECTS.match(text) and is_chat_as_text(text):
        raise SampleError(
            "bad_chat",
            f"has a conversation as text in field {field!r}: store it as a list (JSON Lines or Parquet)",
        )


def is_chat_as_text(text: str) -> bool:
    try:
        value = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return PYTHON_MESSAGES.fullmatch(text) is not None
    return isinstance(value, list) and all(
        isinstance(item, dict)
        and any(keys <= item.keys() for keys in ({"role", "content"}, {"from", "value"}))
        for item in value
    )


def messages_of(value: Sequence[Any], field: str) -> tuple[Message, ...]:
    """Raises SampleError, with the number of the message, for what is no conversation that can be read."""
    if not value:
        raise SampleError("bad_chat", f"has no message in field {field!r}: give it one")
    return tuple(message_of(item, f"message {n} of {field!r}") for n, item in enumerate(value, 1))


def message_of(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise SampleError(
            "bad_chat", f"has a JSON {json_type(value)} as {where}, and no object: write {{role, content}}"
        )
    role = value.get("role")
    if role is None and all(value.get(key) is not None for key in SHAREGPT):
        raise SampleError(
            "bad_chat",
            f"has 'from' and 'value' in {where}, and no role and content: rename them, and write human as"
            " user, gpt as assistant",
        )
    if role not in ROLES:
        shown = f"the role {cut_short(as_text(role), 20)!a}" if isinstance(role, str) else "no role"
        raise SampleError("bad_chat", f"has {shown} in {where}: roles are {', '.join(ROLES)}")
    check_keys(value, MESSAGE_KEYS, where)
    return Message(role, content_of(value.get("content"), where))


def check_keys(value: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises SampleError for another key that holds something: nobody knows what it would change."""
    for key, item in value.items():
        if key not in known and item is not None and item not in ("", [], {}):
            raise SampleError(
                "bad_chat",
                f"has {cut_short(key, 40)!a} in {where}, which lensd does not render: leave it out",
            )


def content_of(value: Any, where: str) -> str:
    """The text of a message: a string, or a list of text parts."""
    if isinstance(value, str | int):
        return as_text(value)
    if not isinstance(value, list):
        raise SampleError("bad_chat", f"has no content in {where}: give it a text")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise SampleError("bad_chat", f"has a part that is no text in {where}: lensd reads text alone")
        check_keys(part, PART_KEYS, f"a part of {where}")
    return "".join(as_text(part["text"]) for part in value)


def place_text(record: Mapping[str, Any], place: str) -> str:
    """The text at a place of the record, resolved over JSON's objects and arrays and nothing else.

    Raises SampleError where there is none.
    """
    value: Any = record
    steps = path_of(place)
    for step in steps:
        value = member(value, step)
        if value is MISSING:
            if len(steps) == 1:
                raise SampleError("missing_field", f"has no field {place!r}, which the texts need: add it")
            raise SampleError("missing_field", f"has nothing at {place!r}, which the texts need: add it")
    if not isinstance(value, str | int):
        raise bad_field(place, value, "a string")
    return as_text(value)


MISSING = object()


def member(value: Any, step: str) -> Any:
    """The member of an object, or the item of an array, from its end where the index is negative."""
    if isinstance(value, dict):
        return value.get(step, MISSING)
    if isinstance(value, list) and INDEX.fullmatch(step):
        try:
            return value[int(step)]
        except (IndexError, ValueError):
            return MISSING
    return MISSING


def bad_field(field: str, value: Any, wanted: str) -> SampleError:
    return SampleError("bad_field", f"field {field!r} is a JSON {json_type(value)}: make it {wanted}")


def mixed(fields: Sequence[str]) -> SampleError:
    names = " and ".join(map(repr, fields))
    return SampleError(
        "bad_field", f"fields {names} are partly strings and partly conversations: write all in one way"
    )
