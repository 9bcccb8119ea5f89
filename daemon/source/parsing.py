"""One record's bytes to a Sample, or to the reason why not. Knows no files, formats or tokenizers.

Invalid UTF-8 arrives as surrogate escapes, so that it costs one record and not the file.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from daemon.errors import SampleError
from daemon.escaping import cut_short
from daemon.recipes import Recipe
from daemon.records import Reject, Sample
from daemon.source.jsonvalues import MARK, Number, as_text, json_type
from daemon.source.texts import texts_of

ESCAPED_BYTE = re.compile("[\udc80-\udcff]")  # what surrogateescape makes of a byte that is not UTF-8
SURROGATE = re.compile("[\ud800-\udfff]")
Fields = frozenset[str]  # that a record needs for its texts
# A string or a bracket; possessive, so that no text makes it slow; `close` is empty if a string never ends.
TOKEN = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+|)*+(?P<close>"?)|[\[{]|[\]}]', re.DOTALL)
BRACKETS = {"[": 1, "{": 1, "]": -1, "}": -1}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record is in its file. A row of a table that is no text has neither line nor byte offset."""

    record_index: int
    line: int | None
    byte_offset: int | None
    row_group: int | None = None
    position: int = 0  # about how many bytes of the file lie before it, where there is no byte offset

    @property
    def extent_offset(self) -> int:
        return self.position if self.byte_offset is None else self.byte_offset

    def __str__(self) -> str:
        """Of a message."""
        if self.line is not None:
            return f"line {self.line}"
        return f"row {self.record_index + 1} (row group {self.row_group})"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record as JSON, or why it is none; both are None where it was too large to keep."""

    place: Place
    text: str | None
    error: SampleError | None = None


def check_unicode(raw: str) -> None:
    """Raises SampleError where the record's own text holds bytes that are not UTF-8."""
    if not raw.isascii() and ESCAPED_BYTE.search(raw):
        raise SampleError("invalid_utf8", "has bytes that are not UTF-8: save the file as UTF-8")


def refuse_constant(name: str) -> NoReturn:
    raise SampleError("not_finite", f"has {name}, which is not JSON: use null or a number")


def number_as_written(text: str) -> Number:
    """A value that stands in a record's JSON as the number that `text` is."""
    return Number(f"{MARK}{text}{MARK}")


def exact_number(text: str) -> Number:
    """Raises SampleError where float64, which every reader takes it for, has no finite number for it."""
    if ("e" in text or "E" in text or len(text) > 300) and not math.isfinite(float(text)):
        raise SampleError("not_finite", "has a number beyond the range of float64: use a smaller one")
    return number_as_written(text)


def exact_integer(text: str) -> int | Number:
    """As an int of Python, but for -0, which would be another number."""
    return number_as_written(text) if text == "-0" else int(text)


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise SampleError("duplicate_key", f"has the key {printable(twice)} twice: keep one")
    return result


EXTRA = json.JSONEncoder(ensure_ascii=False)
LENIENT = json.JSONDecoder(strict=False)
DECODER = json.JSONDecoder(
    object_pairs_hook=unique_object,
    parse_constant=refuse_constant,
    parse_float=exact_number,
    parse_int=exact_integer,
)


def parse_value(raw: str, max_nesting: int) -> Any:
    """The JSON value that `raw` is. Raises SampleError."""
    check_unicode(raw)
    if raw.count("[") + raw.count("{") > max_nesting and depth_of(raw) > max_nesting:
        raise SampleError(
            "nesting_too_deep", f"nests deeper than inbox.max_nesting = {max_nesting}: flatten it"
        )
    try:
        return DECODER.decode(raw)
    except json.JSONDecodeError as error:
        raise SampleError(
            "malformed_json", f"is not JSON: {error.msg} at its character {error.pos + 1}: correct it"
        ) from None
    except ValueError:  # Python refuses integers of over 4300 digits
        raise SampleError("not_finite", "has a number of over 4300 digits: shorten it") from None
    except RecursionError:
        raise too_deep() from None


def too_deep() -> SampleError:
    """For a record that `inbox.max_nesting` admits but this Python can't follow."""
    return SampleError("nesting_too_deep", "nests too deep to be read: flatten it")


def depth_of(raw: str) -> int:
    """How deep brackets nest, strings left out."""
    deepest = depth = 0
    for token in TOKEN.finditer(raw):
        depth += BRACKETS.get(token[0], 0)
        deepest = max(deepest, depth)
    return deepest


def parsed_object(raw: bytes) -> dict[str, Any] | None:
    """The JSON object that the bytes are, checked no further; None where they are none, or damaged."""
    try:
        value = LENIENT.decode(raw.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def is_record(value: Iterable[str], recipes: Sequence[Fields]) -> bool:
    """Whether an object, or the columns of a table, have all the fields of one of the recipes."""
    return any(fields.issubset(value) for fields in recipes)


def choose_recipe(values: Iterable[Any], recipes: Sequence[Recipe]) -> Recipe | None:
    """The recipe of the first object that has all the fields of one; of several the first of `recipes`.

    A field that is null is as if absent, unless a recipe is found only with such fields.
    """
    objects = [value for value in values if isinstance(value, dict)]
    return first_fitting(map(not_null, objects), recipes) or first_fitting(map(set, objects), recipes)


def not_null(value: Mapping[str, Any]) -> set[str]:
    return {name for name, item in value.items() if item is not None}


def first_fitting(present: Iterable[set[str]], recipes: Sequence[Recipe]) -> Recipe | None:
    return next((recipe for names in present for recipe in recipes if recipe.fields <= names), None)


def to_sample(value: Any, recipe: Recipe, place: Place) -> Sample:
    """Raises SampleError where the record lacks what the recipe needs.

    Strings are used as they are, numbers as they were written, booleans as JSON writes them. What neither a
    text nor a column uses goes into `extra`, in the record's order.
    """
    if not isinstance(value, dict):
        raise not_an_object(value)
    check_surrogates(value)
    texts = texts_of(value, recipe)
    sample_id, domain, complexity = sample_id_of(value), domain_of(value), complexity_of(value)
    used = set(recipe.places)  # a field into which a path reaches holds more, and stays
    for name, column in (("id", sample_id), ("domain", domain), ("complexity", complexity)):
        if column is not None or value.get(name) is None:
            used.add(name)
    extra = {name: item for name, item in value.items() if name not in used}
    return Sample(
        record_index=place.record_index,
        sample_id=sample_id if sample_id is not None else str(place.record_index),
        domain=domain,
        complexity=complexity,
        extra=without_marks(EXTRA.encode(extra)) if extra else None,
        texts=texts.texts,
        starts=texts.starts,
        line=place.line,
        byte_offset=place.byte_offset,
        row_group=place.row_group,
    )


def not_an_object(value: Any) -> SampleError:
    return SampleError("not_an_object", f"is a JSON {json_type(value)}, not an object: write one as {{...}}")


def without_marks(encoded: str) -> str:
    """JSON of which each Number stands as it was written."""
    if encoded.isascii() or MARK not in encoded:
        return encoded
    return encoded.replace(f'"{MARK}', "").replace(f'{MARK}"', "")


def domain_of(record: dict[str, Any]) -> str | None:
    """The domain as text; None where it is absent, null, or an object or array."""
    domain = record.get("domain")
    return as_text(domain) if isinstance(domain, str | int) else None


def complexity_of(record: dict[str, Any]) -> float | None:
    """The complexity; None where it is no number."""
    complexity = record.get("complexity")
    if isinstance(complexity, Number):
        return float(complexity.written)
    if isinstance(complexity, bool) or not isinstance(complexity, int):
        return None
    try:
        return float(complexity)
    except OverflowError:
        raise SampleError(
            "not_finite", "field 'complexity' is beyond the range of float64: use a smaller number"
        ) from None


def check_surrogates(value: Any) -> None:
    """Raises SampleError where a string holds a lone surrogate, which no UTF-8 file can store."""
    if isinstance(value, str):
        if not value.isascii() and not isinstance(value, Number) and SURROGATE.search(value):
            raise SampleError(
                "lone_surrogate", r"has an unpaired \ud800-\udfff escape, which is no character: drop it"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            if not key.isascii():
                check_surrogates(key)
            check_surrogates(item)
    elif isinstance(value, list):
        for item in value:
            check_surrogates(item)


def sample_id_of(value: Any) -> str | None:
    """The record's own id, where it has one that can be shown."""
    if not isinstance(value, dict):
        return None
    found = value.get("id")
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        return None
    text = as_text(found)
    return None if SURROGATE.search(text) else text


def printable(text: str) -> str:
    """A field name for a message: never long, never unprintable."""
    return ascii(cut_short(text))


def rejected(place: Place, error: SampleError, sample_id: str | None = None) -> Reject:
    return Reject(
        record_index=place.record_index,
        sample_id=sample_id,
        line=place.line,
        byte_offset=place.byte_offset,
        reason=error.reason,
        message=f"{place}: the record {error}",
        row_group=place.row_group,
    )
