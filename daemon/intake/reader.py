"""Input files to parts of samples and rejects. Knows nothing about tokens, models or outputs."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from daemon.errors import FileError, SampleError
from daemon.intake.document import document_records
from daemon.intake.lines import line_groups
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
from daemon.intake.source import chunks, content_sha256
from daemon.records import BUILT_IN_RECIPES, Part, Recipe, Reject, Sample, Source

__all__ = ["REJECT_REASONS", "ReadLimits", "content_sha256", "read_parts"]

NAME = re.compile(r"\.(json|jsonl|ndjson)(\.gz|\.zst)?\Z", re.IGNORECASE)
PART_BYTES = 4 << 20  # of raw records, after which a part ends early


@dataclass(frozen=True, slots=True)
class ReadLimits:
    max_record_bytes: int
    max_nesting: int
    max_file_bytes: int  # of a .json file, uncompressed
    part_records: int


async def read_parts(source: Source, *, recipe: Recipe | None, limits: ReadLimits) -> AsyncIterator[Part]:
    """The file as parts of consecutive records, the last one marked.

    `recipe` None lets the file choose: the first record with all the fields of a built-in recipe decides.
    Raises FileError where the file as a whole can't be used, possibly after some parts.
    """
    began = time.perf_counter()
    pending: Part | None = None
    async for group in record_groups(source, limits):
        if pending is not None:
            yield pending
        number = 0 if pending is None else pending.number + 1
        chosen, samples, rejects = await asyncio.to_thread(interpret, group, recipe, limits)
        recipe = chosen  # the first part decides for the file
        pending = Part(
            source=source,
            number=number,
            last=False,
            recipe=chosen,
            samples=samples,
            rejects=rejects,
            read_seconds=time.perf_counter() - began,
        )
        began = time.perf_counter()
    if pending is None:
        raise FileError("empty", "the file holds no records")
    yield dataclasses.replace(pending, last=True)


async def record_groups(source: Source, limits: ReadLimits) -> AsyncIterator[list[RawRecord]]:
    """Consecutive raw records, a part's worth at a time."""
    match = NAME.search(source.claim.name)
    if match is None:
        raise FileError(
            "unsupported_format", "the name must end in .json, .jsonl or .ndjson, optionally .gz or .zst"
        )
    content = chunks(source.claim.path, match[2].lower() if match[2] else None)
    if match[1].lower() != "json":
        async for group in line_groups(
            content,
            max_record_bytes=limits.max_record_bytes,
            group_records=limits.part_records,
            group_bytes=PART_BYTES,
        ):
            yield group
        return
    document = await whole(content, limits.max_file_bytes)
    records = await asyncio.to_thread(document_records, document)
    while group := await asyncio.to_thread(take_group, records, limits.part_records):
        yield group


def take_group(records: Iterator[RawRecord], most: int) -> list[RawRecord]:
    """The next records, at most `most` and about PART_BYTES of them."""
    group: list[RawRecord] = []
    weight = 0
    for record in records:
        group.append(record)
        weight += len(record.text or "")
        if len(group) == most or weight >= PART_BYTES:
            break
    return group


async def whole(content: AsyncIterator[bytes], max_bytes: int) -> bytes:
    """All of a stream. Raises FileError where it is over the limit."""
    held = bytearray()
    async for chunk in content:
        held += chunk
        if len(held) > max_bytes:
            raise FileError(
                "too_large",
                f"over inbox.max_file_bytes = {max_bytes} uncompressed, and a .json file is read whole:"
                " write one record a line as .jsonl, which has no such limit",
            )
    return bytes(held)


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
        wanted = " or ".join("+".join(sorted(recipe.fields)) for recipe in BUILT_IN_RECIPES)
        raise FileError(
            "no_recipe",
            f"none of the first {len(group)} records has the fields {wanted}:"
            " name your own in [texts] of the configuration",
        )
    first = values[0] if isinstance(values[0], SampleError) else "is not an object"
    raise FileError(
        "no_usable_record",
        f"none of the first {len(group)} records can be used; the first: line {group[0].place.line}:"
        f" the record {first}",
    )
