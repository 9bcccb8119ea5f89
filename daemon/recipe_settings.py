"""The settings of recipes: `[texts]` with `[contrast]`, and `[[recipe]]`. Checked, and made into recipes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import field_validator, model_validator

from daemon.analysis.columns import repeated_column
from daemon.recipes import Contrast, Recipe, named_places, no_place, path_of
from daemon.setting_types import Section, SettingName

RECIPE_LOOKS = (
    "[[recipe]] with name and texts; in the environment JSON, such as"
    ' [{"name": "mine", "texts": {"question": "{prompt}"}}]'
)


class ContrastSection(Section):
    reference: str
    positive: str
    negative: str


def check_recipes(value: Any) -> Any:
    """Raises ValueError for one recipe where a list of them is due."""
    if not isinstance(value, list | tuple) or not all(isinstance(one, Mapping | Section) for one in value):
        raise ValueError(f"expected a list of tables: {RECIPE_LOOKS}")
    return value


class RecipeSection(Section):
    """How records with certain fields become texts."""

    name: SettingName
    texts: dict[str, str]  # name -> template
    contrast: ContrastSection | None = None

    @field_validator("texts")
    @classmethod
    def check_texts(cls, value: dict[str, str]) -> dict[str, str]:
        return checked_texts(value)

    @model_validator(mode="after")
    def check_contrast(self) -> RecipeSection:
        check_contrast(self.contrast, self.texts, f"texts of the recipe {self.name!r}")
        check_columns(self.recipe, f"texts of the recipe {self.name!r}")
        return self

    @property
    def recipe(self) -> Recipe:
        return recipe_of(self.texts, self.contrast, self.name)


def recipe_of(texts: Mapping[str, str], contrast: ContrastSection | None, name: str = "texts") -> Recipe:
    compared = None if contrast is None else Contrast(**contrast.model_dump())
    return Recipe(templates=tuple(texts.items()), contrast=compared, name=name)


def checked_texts(texts: dict[str, str]) -> dict[str, str]:
    """The same. Raises ValueError unless each is a word and a template, and there is one."""
    if not texts:
        raise ValueError("expected at least one name = template")
    for name, template in texts.items():
        if not name.isidentifier():
            raise ValueError(f"text name {name!r} must be a word, since it names columns")
        check_template(name, template)
    return texts


def check_template(name: str, template: str) -> None:
    """Raises ValueError unless the template names fields, or paths into them: `"{prompt} {meta.fact}"`."""
    try:
        places = named_places(template)
        for place in places:
            if not path_of(place)[0].isidentifier():
                raise ValueError(no_place(place))
    except ValueError as error:
        raise ValueError(f"template {name!r}: {error}") from None
    if any("\ud800" <= char <= "\udfff" for char in template):  # JSON in the environment can hold one
        raise ValueError(f"template {name!r} has an unpaired surrogate, which is no character: leave it out")
    if not places:
        raise ValueError(f"template {name!r} names no field: write e.g. {name} = '{{prompt}}'")


def check_contrast(contrast: ContrastSection | None, texts: Mapping[str, str], where: str) -> None:
    """Raises ValueError where it names no text of these, or one twice."""
    if contrast is None:
        return
    for role, name in contrast:
        if name not in texts:
            raise ValueError(f"contrast.{role} = {name!r} is not in {where}: use one of {', '.join(texts)}")
    if len(set(contrast.model_dump().values())) < 3:
        raise ValueError("[contrast] compares a text with itself: name three different ones")


def check_columns(recipe: Recipe, where: str) -> None:
    """Raises ValueError where two columns differ by case alone: SQL takes them for one."""
    if (name := repeated_column(("l0",), recipe)) is not None:
        raise ValueError(f"{where} would give two columns named {name}: rename a text")


def check_order(recipes: Sequence[Recipe]) -> None:
    """Raises ValueError where one is never taken: an earlier one has some of its fields, and no others."""
    for first, second in itertools.combinations(recipes, 2):
        if first.fields <= second.fields:
            raise ValueError(
                f"recipe {second.name!r} is never taken: records with its fields have those of"
                f" {first.name!r} ({', '.join(sorted(first.fields))}), which comes first: put the one with"
                " more fields first"
            )
