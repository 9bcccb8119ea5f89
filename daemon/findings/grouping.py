"""Tells which samples form a group: those alike in a column, or in a field of their records.

Text, true and false make a group of each value; only the name that is shown is cut or rounded. Numbers with
more than FEW_NUMBERS values are cut at their quartiles, equal ones never apart. Knows no statistics.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from daemon.errors import ConfigError
from daemon.escaping import cut_short
from daemon.findings.results import IntArray
from daemon.findings.study import Study

DOMAIN = "domain"
MOST_GROUPS = 30
FEW_NUMBERS = 8
QUANTILES = (0.25, 0.5, 0.75)
NAME_LENGTH = 60  # characters that are shown of a text
NUMBER, TEXT, BOOLEAN = "number", "text", "boolean"
Key: TypeAlias = tuple[str, Any]  # kind and value
LARGEST = int(sys.float_info.max)
MOST_WHOLE = 1e16  # from here on float64 does not hold every whole number
NO_GROUPS = ("sample_id", "record_index", "extra")  # have a value of their own for each sample


@dataclass(frozen=True, slots=True)
class Grouping:
    """The group of each sample."""

    column: str | None  # None: there are no groups
    names: tuple[str, ...]
    group: IntArray  # (n_samples,) index into `names`, -1 where the sample has no value
    note: str = ""  # why there are none


def group_samples(study: Study, by: str | None) -> Grouping:
    """Groups by a column of metrics.parquet, else by a field of `extra`; without `by` by domain.

    Raises ConfigError where it is named and does not make between 2 and MOST_GROUPS groups.
    """
    column = DOMAIN if by is None else by
    values = column_values(study, column)
    nowhere = Grouping(None, (), np.full(study.n_samples, -1, np.int64))
    if values is None or not any(value is not None for value in values):
        if by is None:
            return nowhere
        own = column in NO_GROUPS and column in study.columns
        said = "every sample has one of its own" if own else "no sample has a value there"
        raise ConfigError(f"--by {column}: {said}: {known_columns(study, column)}")
    names, group = grouped(values)
    if len(names) > MOST_GROUPS or (by is not None and len(names) < 2):
        values_said = "1 different value" if len(names) == 1 else f"{len(names)} different values"
        said = f"{values_said}, where a report has room for 2 to {MOST_GROUPS}"
        if by is not None:
            raise ConfigError(f"--by {column}: {said}: {known_columns(study, column)}")
        note = f"No groups: {column} has {said}. --by COLUMN chooses another column."
        return Grouping(None, (), nowhere.group, note)
    return Grouping(column, names, group)


def column_values(study: Study, column: str) -> list[Any] | None:
    """The value of each sample, or None; None where neither a column nor a field has the name."""
    if column in study.columns and column not in NO_GROUPS:
        return list(study.metrics([column])[column].to_pylist())
    found: list[Any] = []
    if "extra" not in study.columns:
        return None
    for text in study.metrics(["extra"])["extra"].to_pylist():
        value = fields_of(text).get(column)
        found.append(value if isinstance(value, str | bool | int | float) else None)
    return found


def fields_of(extra: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(extra) if extra else {}
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def known_columns(study: Study, refused: str) -> str:
    """The columns and fields but the refused one by which the first samples could be grouped."""
    fields: dict[str, None] = {}
    if "extra" in study.columns:
        for text in study.metrics(["extra"])["extra"].slice(0, 100).to_pylist():
            fields |= dict.fromkeys(fields_of(text))
    known = [name for name in (DOMAIN, "complexity") if name in study.columns and has_values(study, name)]
    several = [cut_short(name, 40) for name in (*known, *list(fields)[:5]) if name != refused]
    return f"name another, such as {', '.join(several)}" if several else "no other is known"


def has_values(study: Study, name: str) -> bool:
    column = study.metrics([name])[name]
    return int(column.null_count) < len(column)


def grouped(values: Sequence[Any]) -> tuple[tuple[str, ...], IntArray]:
    """Names of groups, and the group of each value (n,). Equal values alone share a group, 1 and 1.0 do."""
    keys = [key_of(value) for value in values]
    found = {key for key in keys if key is not None}
    if len(found) > FEW_NUMBERS and all(kind == NUMBER for kind, _ in found):
        return by_quartile([None if key is None else key[1] for key in keys])
    ordered = [
        *sorted(key for key in found if key[0] == NUMBER),
        *sorted(key for key in found if key[0] != NUMBER),
    ]
    place = {key: number for number, key in enumerate(ordered)}
    return names_of(ordered), np.array([-1 if key is None else place[key] for key in keys], np.int64)


def key_of(value: Any) -> Key | None:
    """A kind and a value that tell groups apart; None of what is no value.

    Numbers beyond float64 are text; NaN and infinity are no values.
    """
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, bool):
        return BOOLEAN, str(value).lower()
    if isinstance(value, int) and abs(value) > LARGEST:
        return TEXT, str(value)
    return (NUMBER, value) if isinstance(value, int | float) else (TEXT, str(value))


def names_of(keys: Sequence[Key]) -> tuple[str, ...]:
    """A name for each key, different for different keys.

    A text is quoted where a number or a truth value has its name, and cut in its middle where its beginning
    is another's too.
    """
    others = {shown_number(value) if kind == NUMBER else str(value) for kind, value in keys if kind != TEXT}
    texts = {key: key[1] for key in keys if key[0] == TEXT}
    whole = {
        key: json.dumps(text, ensure_ascii=False) if text in others else text for key, text in texts.items()
    }
    begun = Counter(cut_short(text, NAME_LENGTH) for text in whole.values())
    names: list[str] = []
    for key in keys:
        if key[0] != TEXT:
            names.append(shown_number(key[1]) if key[0] == NUMBER else str(key[1]))
            continue
        name = cut_short(whole[key], NAME_LENGTH)
        names.append(name if begun[name] == 1 else cut_middle(whole[key]))
    return told_apart(names)


def cut_middle(text: str) -> str:
    """Not longer than NAME_LENGTH characters, with both ends."""
    if len(text) <= NAME_LENGTH:
        return text
    end = (NAME_LENGTH - 3) // 2
    return f"{text[: NAME_LENGTH - 3 - end]}...{text[-end:]}"


def told_apart(names: Sequence[str]) -> tuple[str, ...]:
    """The same names, numbered where several are alike."""
    taken = Counter(names)
    found: list[str] = []
    for name in names:
        unique = name
        if taken[name] > 1:
            numbered = (f"{name} ({number})" for number in itertools.count(1))
            unique = next(one for one in numbered if one not in taken)
            taken[unique] = 1
        found.append(unique)
    return tuple(found)


def shown_number(value: float) -> str:
    """Every digit of a number: a whole one as an integer, another as Python writes it."""
    if isinstance(value, int) or (value.is_integer() and abs(value) < MOST_WHOLE):
        return str(int(value))
    return repr(value)


def by_quartile(numbers: Sequence[float | None]) -> tuple[tuple[str, ...], IntArray]:
    """Up to four groups of about as many samples, named by their least and greatest number."""
    known = [number for number in numbers if number is not None]
    ordered = sorted(known)
    bounds = sorted({ordered[math.ceil(share * len(ordered)) - 1] for share in QUANTILES})
    raw = np.array([-1 if number is None else bisect.bisect_left(bounds, number) for number in numbers])
    used = np.unique(raw[raw >= 0])
    found = np.where(raw < 0, -1, np.searchsorted(used, raw)).astype(np.int64)
    inside: list[list[float]] = [[] for _ in used]
    for group, number in zip(found.tolist(), numbers, strict=True):
        if number is not None:
            inside[group].append(number)
    ends = [(min(some), max(some)) for some in inside]
    for shown in (shown_briefly, shown_number):
        names = [shown(a) if a == b else f"{shown(a)} to {shown(b)}" for a, b in ends]
        bounds_shown = [shown(end) for pair in ends for end in dict.fromkeys(pair)]
        if len(set(bounds_shown)) == len(bounds_shown):
            break
    return told_apart(names), found


def shown_briefly(value: float) -> str:
    """Six digits; of a whole number all."""
    return str(value) if isinstance(value, int) else f"{value:g}"
