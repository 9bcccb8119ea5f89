"""Names dictionaries, which their columns begin with. Knows no weights."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

from daemon.analysis.columns import repeated_column
from daemon.errors import ConfigError
from daemon.model.saeformat import TRANSCODERS
from daemon.model_info import SaeInfo, default_name
from daemon.recipes import Recipe

# Of hooks, by what follows `blocks.L.`; the residual stream after the layer goes without saying.
WORDS = {
    "hook_resid_post": "",
    "hook_resid_pre": "pre",
    "hook_resid_mid": "mid",
    "hook_mlp_out": "mlp",
    "hook_attn_out": "attn",
    "attn.hook_z": "z",
}
NOT_A_WORD = re.compile(r"\W+")
L0 = re.compile(r"l0_(?:\d+|small|medium|big)", re.IGNORECASE)  # in ids of Gemma Scope


def names_of(infos: Sequence[SaeInfo], given: Sequence[str | None]) -> tuple[str, ...]:
    """The name of each dictionary: the one given, else `l{L}` where it is its layer's only one, else of its
    layer, hook and width.

    Raises ConfigError where two would have one name.
    """
    of_layer = Counter(info.layer for info in infos)
    names = [
        name or (default_name(info.layer) if of_layer[info.layer] == 1 else made_name(info))
        for info, name in zip(infos, given, strict=True)
    ]
    for alike in groups(names):
        if any(given[number] is not None for number in alike):
            continue
        for tell in (by_exact_width, by_sparsity):
            words = [tell(infos[number]) for number in alike]
            if None not in words and len(set(words)) == len(words):
                for number, word in zip(alike, words, strict=True):
                    names[number] = f"{names[number]}_{word}"
                break
    for first, second, *_ in groups(names):
        raise ConfigError(
            f"SAEs {infos[first].source} and {infos[second].source} would both be named {names[first]}: give"
            " one of them another by name in its [[sae]]"
        )
    return tuple(names)


def check_columns(names: Sequence[str], recipes: Sequence[Recipe], *, log_probs: bool = False) -> None:
    """Raises ConfigError where two columns of dictionaries and texts would have one name."""
    for recipe in recipes:
        if (column := repeated_column(names, recipe, log_probs=log_probs)) is not None:
            raise ConfigError(
                f"the SAEs {', '.join(names)} and the texts {', '.join(recipe.text_names)} would give two"
                f" columns named {column}: set another name in an [[sae]], or rename a text"
            )


def groups(names: Sequence[str]) -> list[list[int]]:
    """The numbers of those that have one name, in whatever case: columns of such names are one in SQL."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        found[name.casefold()].append(number)
    return [numbers for numbers in found.values() if len(numbers) > 1]


def made_name(info: SaeInfo) -> str:
    """`l12_16k`, `l12_mlp_16k`: layer, place and width."""
    parts = (default_name(info.layer), place_word(info), width_word(info.d_sae))
    return "_".join(part for part in parts if part)


def place_word(info: SaeInfo) -> str:
    if info.architecture in TRANSCODERS:
        return "transcoder"
    place = info.hook_name.split(".", 2)[2]
    return WORDS.get(place, NOT_A_WORD.sub("_", place.replace("hook_", "")))


def width_word(d_sae: int) -> str:
    """16384 -> 16k, 262144 -> 262k, 1048576 -> 1m; below 10000 the number, but for multiples of 1024."""
    if d_sae >= 1_000_000:
        return f"{d_sae // 1_000_000}m"
    return f"{d_sae // 1000}k" if d_sae >= 10_000 or d_sae % 1024 == 0 else str(d_sae)


def by_exact_width(info: SaeInfo) -> str | None:
    return str(info.d_sae)


def by_sparsity(info: SaeInfo) -> str | None:
    """The L0 that an id names."""
    match = L0.search(info.source)
    return match[0].lower() if match else None
