"""Recipes: which texts a record has, and which of them are compared. Knows no files and no models."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

SIGNED_NUMBER = re.compile(r"-?\.?\d")  # its sign or point is no punctuation of the sentence
STEP = re.compile(r"\.\w+|\[[^\[\]]+\]")
PLACE = re.compile(rf"(?P<field>[^.\[\]]+)(?P<rest>(?:{STEP.pattern})*)")


ROLES = ("system", "user", "assistant")  # of messages


class Message(NamedTuple):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """A text that a model's chat template renders."""

    messages: tuple[Message, ...]
    awaits_answer: bool = False  # the text ends where the assistant is to begin

    def __len__(self) -> int:
        """Characters of its messages."""
        return sum(len(message.content) for message in self.messages)


Text = str | Conversation


@dataclass(frozen=True, slots=True)
class Contrast:
    """Which texts of a sample are compared: names of texts of the same recipe."""

    reference: str
    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a record becomes texts: `(name, template)` pairs, and the contrast between them, if any.

    A template is literal, unless the recipe `joins`: then it names fields with a space between each two, and
    `join` says where that space is left out. In a recipe of `chats` fields may hold conversations.
    """

    templates: tuple[tuple[str, str], ...]
    contrast: Contrast | None
    joins: bool = False
    name: str = ""
    chats: bool = False

    @property
    def text_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.templates)

    @property
    def fields(self) -> frozenset[str]:
        """The record fields that the templates name, by which a file's recipe is chosen."""
        return fields_of(self.templates)

    @property
    def places(self) -> Mapping[str, bool]:
        """What the templates name, in alphabetical order: whether each is a field, or a path into one."""
        return places_of(self.templates)

    def render(self, values: dict[str, str]) -> tuple[str, ...]:
        """The texts of one record, in the order of the templates; `values` are by place."""
        if not self.joins:
            return tuple(filled(template, values) for _, template in self.templates)
        return tuple(
            functools.reduce(join, (values[field] for field in named_places(template)))
            for _, template in self.templates
        )


@functools.lru_cache(maxsize=64)
def fields_of(templates: tuple[tuple[str, str], ...]) -> frozenset[str]:
    return frozenset(path_of(place)[0] for place in places_of(templates))


@functools.lru_cache(maxsize=64)
def places_of(templates: tuple[tuple[str, str], ...]) -> Mapping[str, bool]:
    places = {place for _, template in templates for place in named_places(template)}
    return {place: len(path_of(place)) == 1 for place in sorted(places)}


@functools.lru_cache(maxsize=256)
def pieces_of(template: str) -> tuple[tuple[str, str | None], ...]:
    """A template as text, each piece with the place that follows it. Raises ValueError."""
    pieces = []
    for text, place, spec, conversion in string.Formatter().parse(template):
        if spec or conversion:
            raise ValueError(f"{{{place}}} must be a plain field name, without a format")
        if place is not None:
            path_of(place)
        pieces.append((text, place))
    return tuple(pieces)


@functools.lru_cache(maxsize=256)
def named_places(template: str) -> tuple[str, ...]:
    """The places that a template names, in its order."""
    return tuple(place for _, place in pieces_of(template) if place is not None)


def filled(template: str, values: dict[str, str]) -> str:
    """The template with a value at each place. Values are text, whatever braces they hold."""
    return "".join([text if place is None else text + values[place] for text, place in pieces_of(template)])


@functools.lru_cache(maxsize=256)
def path_of(place: str) -> tuple[str, ...]:
    """The steps from a record to a value: `messages[0][content]` -> messages, 0, content.

    A step is the key of an object or the index of an array. Raises ValueError.
    """
    found = PLACE.fullmatch(place)
    if found is None:
        raise ValueError(no_place(place))
    return found["field"], *(
        step[1:-1] if step[0] == "[" else step[1:] for step in STEP.findall(found["rest"])
    )


def no_place(place: str) -> str:
    return f"{{{place}}} must be a plain field name, or a path such as {{meta.source}} or {{turns[0][text]}}"


def join(prompt: str, completion: str) -> str:
    """Prompt and completion as one text, with a space between them where neither brings its own.

    No space where the completion is empty or begins with white space (as `str.isspace` has it) or with
    punctuation (Unicode category P*, but for the sign or point of a number such as -5), nor where the prompt
    is empty or ends with white space.
    """
    if not prompt or not completion or prompt[-1].isspace() or brings_its_own(completion):
        return prompt + completion
    return f"{prompt} {completion}"


def brings_its_own(completion: str) -> bool:
    """Whether a text that is not empty stands after another one without a space."""
    first = completion[0]
    if first.isspace():
        return True
    return unicodedata.category(first).startswith("P") and SIGNED_NUMBER.match(completion) is None


CONTRAST_RECIPE = Recipe(
    templates=(
        ("prompt", "{prompt}"),
        ("fact", "{prompt} {fact}"),
        ("hall", "{prompt} {hallucination}"),
    ),
    contrast=Contrast(reference="prompt", positive="fact", negative="hall"),
    joins=True,
    name="prompt-fact-hallucination",
)

PREFERENCE = Contrast(reference="prompt", positive="chosen", negative="rejected")

PREFERENCE_RECIPE = Recipe(
    templates=(
        ("prompt", "{prompt}"),
        ("chosen", "{prompt} {chosen}"),
        ("rejected", "{prompt} {rejected}"),
    ),
    contrast=PREFERENCE,
    joins=True,
    name="prompt-chosen-rejected",
    chats=True,
)

SHARED_PROMPT_RECIPE = Recipe(
    templates=(
        ("prompt", "what {chosen} and {rejected} begin with"),
        ("chosen", "{chosen}"),
        ("rejected", "{rejected}"),
    ),
    contrast=PREFERENCE,
    name="chosen-rejected",
    chats=True,
)

COMPLETION_RECIPE = Recipe(
    templates=(("prompt", "{prompt}"), ("completion", "{prompt} {completion}")),
    contrast=None,
    joins=True,
    name="prompt-completion",
    chats=True,
)

PLAIN_RECIPE = Recipe(templates=(("text", "{text}"),), contrast=None, name="text")

CHAT_RECIPE = Recipe(templates=(("messages", "{messages}"),), contrast=None, name="messages", chats=True)

# In the order in which they are tried: that with the most fields first, and `text` before `messages`.
BUILT_IN_RECIPES = (
    CONTRAST_RECIPE,
    PREFERENCE_RECIPE,
    SHARED_PROMPT_RECIPE,
    COMPLETION_RECIPE,
    PLAIN_RECIPE,
    CHAT_RECIPE,
)


def configured(recipes: Sequence[Recipe]) -> tuple[Recipe, ...]:
    """Those of `recipes` that are not built in."""
    return tuple(recipe for recipe in recipes if recipe not in BUILT_IN_RECIPES)
