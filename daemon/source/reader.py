"""Input files to parts of samples and rejects. Knows nothing about tokens, models or outputs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NoReturn

from daemon.errors import FileError, SampleError
from daemon.recipes import Recipe, configured
from daemon.records import InputFile, KeptPart, Part, PartExtent, Reject, Sample
from daemon.rejects import RejectSummary
from daemon.source.formats import format_by_content, format_of
from daemon.source.limits import ReadLimits
from daemon.source.parsing import (
    RawRecord,
    choose_recipe,
    not_an_object,
    parse_value,
    rejected,
    sample_id_of,
    to_sample,
    too_deep,
)
from daemon.source.stream import InputStream


async def read_parts(
    file: BinaryIO,
    source: InputFile,
    *,
    recipes: Sequence[Recipe],
    limits: ReadLimits,
    stored: Mapping[int, PartExtent],
) -> AsyncIterator[Part | KeptPart]:
    """Read an open file of any size as parts, in flat memory and off the event loop; see `part_blocks`."""
    blocks = part_blocks(file, source, recipes=recipes, limits=limits, stored=stored)
    while (parts := await asyncio.to_thread(next, blocks, None)) is not None:
        for part in parts:
            yield part


def part_blocks(
    file: BinaryIO,
    source: InputFile,
    *,
    recipes: Sequence[Recipe],
    limits: ReadLimits,
    stored: Mapping[int, PartExtent] | None = None,
) -> Iterator[list[Part | KeptPart]]:
    """Read a file's parts: after each block of it those that are complete, maybe none.

    The first record with all the fields of one of the `recipes` decides which is taken, of several the first;
    where the first part has none, a recipe that alone is configured is. A part whose extent is in `stored` is
    only counted. Blocks. Raises FileError where the file as a whole can't be used, possibly after some parts.
    """
    named, suffix = format_of(source.claim.name)
    fields = [recipe.fields for recipe in recipes]
    reaching = [recipe.fields for recipe in recipes if not all(recipe.places.values())]
    stream = InputStream(file, suffix, limits, is_plain=lambda head: format_by_content(head) is not None)
    is_as_named = named.begins(stream.beginning)
    found = named if is_as_named else format_by_content(stream.beginning) or named
    cutter = PartCutter(
        source,
        recipes=recipes,
        limits=limits,
        stored=stored or {},
        explain=lambda records: found.explain(stream.beginning, records, fields, reaching),
    )
    for records in found.read(stream, limits, fields):
        yield cutter.add(records)
    yield cutter.finish()


class PartCutter:
    """Cuts one file's records into parts of consecutive records, the last one marked.

    Where parts begin depends on the records and the limits alone.
    """

    def __init__(
        self,
        source: InputFile,
        *,
        recipes: Sequence[Recipe],
        limits: ReadLimits,
        stored: Mapping[int, PartExtent],
        explain: Callable[[int], FileError | None],
    ) -> None:
        """`explain` says why so many records are all that there is, and none of them usable."""
        self._source = source
        self._recipes = recipes
        self._recipe = recipes[0] if len(recipes) == 1 else None  # once it is chosen
        self._limits = limits
        self._stored = stored
        self._explain = explain
        self._group: list[RawRecord] = []
        self._weight = 0
        self._whole: list[RawRecord] = []  # a part's worth, held back until it is known not to be the last
        self._number = 0
        self._usable = False  # some record is
        self._rejected = RejectSummary()  # as long as none is
        self._seconds = 0.0  # of work since the last part

    def add(self, records: Iterable[RawRecord]) -> list[Part | KeptPart]:
        """The parts that are sure to be whole with these, none of them the last. Raises FileError."""
        began = time.perf_counter()
        parts: list[Part | KeptPart] = []
        for record in records:
            if self._whole:
                parts.append(self._part(self._whole, last=False, began=began))
                began = time.perf_counter()
                self._whole = []
            self._take(record)
        self._seconds += time.perf_counter() - began
        return parts

    def finish(self) -> list[Part | KeptPart]:
        """The last part. Raises FileError where there was nothing, or nothing usable."""
        rest = self._whole or self._group
        if not rest:
            raise FileError("empty", "the file holds no records")
        part = self._part(rest, last=True, began=time.perf_counter())
        self._check_usable()
        return [part]

    def _take(self, record: RawRecord) -> None:
        self._group.append(record)
        self._weight += len(record.text or "")
        if len(self._group) == self._limits.part_records or self._weight >= self._limits.part_bytes:
            self._whole, self._group, self._weight = self._group, [], 0

    def _part(self, group: list[RawRecord], *, last: bool, began: float) -> Part | KeptPart:
        first = group[0].place
        extent = PartExtent(self._number, first.record_index, len(group), first.extent_offset)
        self._number += 1
        if self._recipe is not None and self._stored.get(extent.number) == extent:
            self._usable = True  # for all that is known here
            return KeptPart(self._source, extent, last, self._recipe)
        self._recipe, samples, rejects = self._interpret(group)
        if self._stored.get(extent.number) == extent:  # the first part: it had to say what the recipe is
            return KeptPart(self._source, extent, last, self._recipe)
        seconds = self._seconds + time.perf_counter() - began
        self._seconds = 0.0
        return Part(
            file=self._source,
            extent=extent,
            last=last,
            recipe=self._recipe,
            samples=samples,
            rejects=rejects,
            read_seconds=seconds,
        )

    def _interpret(self, group: list[RawRecord]) -> tuple[Recipe, tuple[Sample, ...], tuple[Reject, ...]]:
        """`interpret`, and what it says of the file as a whole. Raises FileError where no recipe fits."""
        try:
            recipe, samples, rejects = interpret(group, self._recipe or self._recipes, self._limits)
        except FileError as error:
            raise self._explain(len(group)) or error from None
        self._usable = self._usable or bool(samples)
        if not self._usable:
            self._rejected.add(rejects)
        return recipe, samples, rejects

    def _check_usable(self) -> None:
        """Raises FileError where every record was rejected; what later stages reject is not known yet."""
        if not self._usable:
            records = self._rejected.records
            raise self._explain(records) or self._rejected.error()


def interpret(
    group: list[RawRecord], recipe: Recipe | Sequence[Recipe], limits: ReadLimits
) -> tuple[Recipe, tuple[Sample, ...], tuple[Reject, ...]]:
    """Each raw record as a sample or a reject, and the recipe, chosen here if several were given."""
    values = [parsed(raw, limits) for raw in group]
    if not isinstance(recipe, Recipe):
        recipe = (
            choose_recipe(values, recipe) or only_configured(recipe) or complain_of(group, values, recipe)
        )
    samples: list[Sample] = []
    rejects: list[Reject] = []
    for raw, value in zip(group, values, strict=True):
        try:
            if isinstance(value, SampleError):
                raise value
            samples.append(to_sample(value, recipe, raw.place))
        except SampleError as error:
            rejects.append(rejected(raw.place, error, sample_id_of(value)))
        except RecursionError:
            rejects.append(rejected(raw.place, too_deep()))
    return recipe, tuple(samples), tuple(rejects)


def parsed(raw: RawRecord, limits: ReadLimits) -> Any:
    """The record's JSON value, or the SampleError that it is."""
    if raw.error is not None:
        return raw.error
    try:
        if raw.text is None or size_of(raw.text) > limits.max_record_bytes:
            raise SampleError(
                "record_too_large",
                f"is larger than inbox.max_record_bytes = {limits.max_record_bytes}: shorten it",
            )
        return parse_value(raw.text, limits.max_nesting)
    except SampleError as error:
        return error


def size_of(text: str) -> int:
    """Bytes of a raw record."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def only_configured(recipes: Sequence[Recipe]) -> Recipe | None:
    """The recipe that is not built in, where there is one such."""
    own = configured(recipes)
    return own[0] if len(own) == 1 else None


def complain_of(group: list[RawRecord], values: list[Any], recipes: Sequence[Recipe]) -> NoReturn:
    """Raises the FileError of a file in which no record says what its texts are."""
    if any(isinstance(value, dict) for value in values):
        wanted = " nor ".join(" and ".join(sorted(recipe.fields)) for recipe in recipes)
        raise FileError(
            "no_recipe",
            f"the records have neither {wanted} among their fields:"
            " name your own in [texts] of the configuration",
        )
    summary = RejectSummary()
    for raw, value in zip(group, values, strict=True):
        error = value if isinstance(value, SampleError) else not_an_object(value)
        summary.add([rejected(raw.place, error)])
    raise summary.error("first ")
