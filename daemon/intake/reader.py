"""Input files to parts of samples and rejects. Knows nothing about tokens, models or outputs."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, NoReturn, Protocol

from daemon.errors import FileError, SampleError
from daemon.intake.document import DocumentFramer, check_text
from daemon.intake.lines import LineSplitter
from daemon.intake.parsing import (
    REJECT_REASONS,
    RawRecord,
    choose_recipe,
    parse_value,
    rejected,
    sample_id_of,
    to_sample,
    too_deep,
)
from daemon.intake.source import chunks
from daemon.records import BUILT_IN_RECIPES, KeptPart, Part, PartExtent, Recipe, Reject, Sample, Source

__all__ = ["REJECT_REASONS", "PartReader", "ReadLimits", "read_parts"]

NAME = re.compile(r"\.(json|jsonl|ndjson)(\.gz|\.zst)?\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class ReadLimits:
    max_record_bytes: int
    max_nesting: int
    max_decompressed_bytes: int  # of a compressed file
    max_compression_ratio: int
    part_records: int
    part_bytes: int = 4 << 20  # of raw records, after which a part ends early


class Framer(Protocol):
    """Finds the records in a stream of bytes."""

    def feed(self, chunk: bytes) -> Iterator[RawRecord]: ...

    def finish(self) -> Iterator[RawRecord]: ...


def format_of(name: str) -> tuple[str, str | None]:
    """`json` or `jsonl`, and the compression's suffix if any. Raises FileError for another name."""
    match = NAME.search(name)
    if match is None:
        raise FileError(
            "unsupported_format", "the name must end in .json, .jsonl or .ndjson, optionally .gz or .zst"
        )
    return "json" if match[1].lower() == "json" else "jsonl", match[2].lower() if match[2] else None


async def read_parts(
    file: BinaryIO,
    source: Source,
    *,
    recipe: Recipe | None,
    limits: ReadLimits,
    stored: Mapping[int, PartExtent],
) -> AsyncIterator[Part | KeptPart]:
    """An open file of any size as parts, in flat memory; see `PartReader`.

    Raises FileError where the file as a whole can't be used, possibly after some parts.
    """
    reader = PartReader(source, recipe=recipe, limits=limits, stored=stored)
    content = chunks(
        file,
        format_of(source.claim.name)[1],
        max_bytes=limits.max_decompressed_bytes,
        max_ratio=limits.max_compression_ratio,
    )
    async for chunk in content:
        for part in await asyncio.to_thread(reader.feed, chunk):
            yield part
    for part in await asyncio.to_thread(reader.finish):
        yield part


class PartReader:
    """Cuts one file's content into parts of consecutive records, the last one marked.

    `recipe` None lets the file choose: the first record with all the fields of a built-in recipe decides. A
    part whose extent is in `stored` is only counted. Where parts begin depends on the content and the limits
    alone.
    """

    def __init__(
        self,
        source: Source,
        *,
        recipe: Recipe | None,
        limits: ReadLimits,
        stored: Mapping[int, PartExtent] | None = None,
    ) -> None:
        """Raises FileError where the file's name tells no format."""
        self._source = source
        self._recipe = recipe
        self._limits = limits
        self._stored = stored or {}
        framer = DocumentFramer if format_of(source.claim.name)[0] == "json" else LineSplitter
        self._framer: Framer = framer(limits.max_record_bytes)
        self._group: list[RawRecord] = []
        self._weight = 0
        self._whole: list[RawRecord] = []  # a part's worth, held back until it is known not to be the last
        self._number = 0
        self._started = False
        self._seconds = 0.0  # of work since the last part

    def feed(self, chunk: bytes) -> list[Part | KeptPart]:
        """The parts that are sure to be whole with this chunk, none of them the last. Raises FileError."""
        began = time.perf_counter()
        if not self._started:
            check_text(chunk)
            self._started = True
        parts: list[Part | KeptPart] = []
        for record in self._framer.feed(chunk):
            if self._whole:
                parts.append(self._part(self._whole, last=False, began=began))
                began = time.perf_counter()
                self._whole = []
            self._take(record)
        self._seconds += time.perf_counter() - began
        return parts

    def finish(self) -> list[Part | KeptPart]:
        """The remaining parts. Raises FileError where the content ended too early, or held nothing."""
        began = time.perf_counter()
        parts: list[Part | KeptPart] = []
        for record in self._framer.finish():
            if self._whole:
                parts.append(self._part(self._whole, last=False, began=began))
                self._whole = []
            self._take(record)
        rest = self._whole or self._group
        if not rest:
            raise FileError("empty", "the file holds no records")
        return [*parts, self._part(rest, last=True, began=began)]

    def _take(self, record: RawRecord) -> None:
        self._group.append(record)
        self._weight += len(record.text or "")
        if len(self._group) == self._limits.part_records or self._weight >= self._limits.part_bytes:
            self._whole, self._group, self._weight = self._group, [], 0

    def _part(self, group: list[RawRecord], *, last: bool, began: float) -> Part | KeptPart:
        first = group[0].place
        extent = PartExtent(self._number, first.record_index, len(group), first.byte_offset)
        self._number += 1
        if self._recipe is not None and self._stored.get(extent.number) == extent:
            return KeptPart(self._source, extent, last, self._recipe)
        self._recipe, samples, rejects = interpret(group, self._recipe, self._limits)
        if self._stored.get(extent.number) == extent:  # the first part: it had to say what the recipe is
            return KeptPart(self._source, extent, last, self._recipe)
        seconds = self._seconds + time.perf_counter() - began
        self._seconds = 0.0
        return Part(
            source=self._source,
            extent=extent,
            last=last,
            recipe=self._recipe,
            samples=samples,
            rejects=rejects,
            read_seconds=seconds,
        )


def interpret(
    group: list[RawRecord], recipe: Recipe | None, limits: ReadLimits
) -> tuple[Recipe, tuple[Sample, ...], tuple[Reject, ...]]:
    """Each raw record as a sample or a reject, and the recipe, chosen here if none was given."""
    values = [parsed(raw, limits) for raw in group]
    if recipe is None:
        recipe = choose_recipe(values) or complain_of(group, values)
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


def complain_of(group: list[RawRecord], values: list[Any]) -> NoReturn:
    """Raises the FileError of a file in which no record says what its texts are."""
    if any(isinstance(value, dict) for value in values):
        wanted = " nor ".join(" and ".join(sorted(recipe.fields)) for recipe in BUILT_IN_RECIPES)
        raise FileError(
            "no_recipe",
            f"the records have neither {wanted} among their fields:"
            " name your own in [texts] of the configuration",
        )
    first = values[0] if isinstance(values[0], SampleError) else "is not an object"
    raise FileError(
        "no_usable_record",
        f"none of its first records can be used; line {group[0].place.line}: the record {first}",
    )
