"""Tells which samples form a group: those alike in a column, or in a field of their records.

Text, true and false make a group of each value. Numbers with more than FEW_NUMBERS values are cut at their
quartiles, equal ones never apart. Knows no statistics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from daemon.errors import ConfigError
from daemon.escaping import cut_short
from daemon.findings.results import IntArray
from daemon.findings.study import Study

DOMAIN = "domain"
MOST_GROUPS = 30
FEW_NUMBERS = 8
QUANTILES = (0.25, 0.5, 0.75)
NAME_LENGTH = 60
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
        raise ConfigError(f"--by {column}: no sample has a value there: {known_columns(study)}")
    names, group = grouped(values)
    if len(names) > MOST_GROUPS or (by is not None and len(names) < 2):
        said = f"{len(names)} different values, where a report has room for 2 to {MOST_GROUPS}"
        if by is not None:
            raise ConfigError(f"--by {column}: {said}: {known_columns(study)}")
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


def known_columns(study: Study) -> str:
    """The columns and fields by which the first samples could be grouped."""
    fields: dict[str, None] = {}
    if "extra" in study.columns:
        for text in study.metrics(["extra"])["extra"].slice(0, 100).to_pylist():
            fields |= dict.fromkeys(fields_of(text))
    known = [name for name in (DOMAIN, "complexity") if name in study.columns]
    return f"name another, such as {', '.join(cut_short(name, 40) for name in [*known, *list(fields)[:5]])}"


def grouped(values: Sequence[Any]) -> tuple[tuple[str, ...], IntArray]:
    """Names of groups, and the group of each value (n,)."""
    is_number = [isinstance(value, int | float) and not isinstance(value, bool) for value in values]
    numeric = all(number or value is None for number, value in zip(is_number, values, strict=True))
    if numeric and len({value for value in values if value is not None}) > FEW_NUMBERS:
        return by_quartile(np.array([np.nan if value is None else value for value in values], np.float64))
    labels = [None if value is None else shown(value) for value in values]
    names = tuple(sorted({label for label in labels if label is not None}))
    place = {name: number for number, name in enumerate(names)}
    return names, np.array([-1 if label is None else place[label] for label in labels], np.int64)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return cut_short(value if isinstance(value, str) else f"{value:g}", NAME_LENGTH)


def by_quartile(numbers: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[tuple[str, ...], IntArray]:
    """Up to four groups of about as many samples, named by their least and greatest number."""
    known = np.isfinite(numbers)
    bounds = np.unique(np.quantile(numbers[known], QUANTILES, method="inverted_cdf"))
    raw = np.searchsorted(bounds, numbers, side="left")
    used, group = np.unique(raw[known], return_inverse=True)
    found = np.full(len(numbers), -1, np.int64)
    found[known] = group
    names = []
    for place in range(len(used)):
        inside = numbers[found == place]
        least, most = f"{inside.min():g}", f"{inside.max():g}"
        names.append(least if least == most else f"{least} to {most}")
    return tuple(names), found
