"""Recipes: how a record becomes texts, and which of them are compared. Knows no files and no models."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from dataclasses import dataclass

SIGNED_NUMBER = re.compile(r"-?\.?\d")  # its sign or point is no punctuation of the sentence


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
    `join` says where that space is left out.
    """

    templates: tuple[tuple[str, str], ...]
    contrast: Contrast | None
    joins: bool = False

    @property
    def text_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.templates)

    @property
    def fields(self) -> frozenset[str]:
        """The record fields that the templates name."""
        return fields_of(self.templates)

    def render(self, values: dict[str, str]) -> tuple[str, ...]:
        """The texts of one record, in the order of the templates."""
        if not self.joins:
            return tuple(template.format_map(values) for _, template in self.templates)
        return tuple(
            functools.reduce(join, (values[field] for field in named_fields(template)))
            for _, template in self.templates
        )


@functools.lru_cache(maxsize=64)
def fields_of(templates: tuple[tuple[str, str], ...]) -> frozenset[str]:
    return frozenset(field for _, template in templates for field in named_fields(template))


@functools.lru_cache(maxsize=64)
def named_fields(template: str) -> tuple[str, ...]:
    """The fields that a template names, in its order."""
    return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field)


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
)


PLAIN_RECIPE = Recipe(templates=(("text", "{text}"),), contrast=None)


BUILT_IN_RECIPES = (CONTRAST_RECIPE, PLAIN_RECIPE)
