"""Parquet against pyarrow's whole table, and what is told of rows and files that are none."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import io
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow.parquet import encryption

from daemon.errors import FileError
from daemon.records import Part
from tests.support.sources import LIMITS, parts_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
UTC = datetime.UTC
WIDE = dataclasses.replace(LIMITS, max_record_bytes=1 << 20, max_decompressed_bytes=1 << 30)


def written(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


async def read(folder: Path, content: bytes, name: str = "f.parquet", **options: object) -> list[Part]:
    path = folder / name
    path.write_bytes(content)
    return await parts_of(path, **options)


def records(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """The samples' texts and other fields."""
    return [
        {"text": sample.texts[0], **json.loads(sample.extra or "{}")}
        for part in parts
        for sample in part.samples
    ]


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": TEXTS,
            "number": st.none() | st.integers(-(2**63), 2**63 - 1),
            "real": st.none() | st.floats(allow_nan=False, allow_infinity=False),
            "flag": st.none() | st.booleans(),
            "tags": st.none() | st.lists(st.none() | TEXTS, max_size=3),
            "turns": st.lists(
                st.fixed_dictionaries({"role": TEXTS, "n": st.none() | st.integers(0, 9)}), max_size=2
            ),
            "meta": st.none()
            | st.fixed_dictionaries({"a": st.none() | TEXTS, "b": st.lists(st.integers(0, 9), max_size=2)}),
        }
    ),
    min_size=1,
    max_size=30,
)
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "number": pa.int64(),
        "real": pa.float64(),
        "flag": pa.bool_(),
        "tags": pa.list_(pa.string()),
        "turns": pa.list_(pa.struct({"role": pa.string(), "n": pa.int32()})),
        "meta": pa.struct({"a": pa.large_string(), "b": pa.large_list(pa.int8())}),
    }
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=ROWS,
    group=st.integers(1, 40),
    dictionary=st.booleans(),
    codec=st.sampled_from(["none", "zstd", "snappy"]),
)
async def test_any_table_is_read_as_pyarrow_reads_it_whole(tmp_path, rows, group, dictionary, codec):
    table = pa.Table.from_pylist(rows, SCHEMA)
    content = written(table, row_group_size=group, use_dictionary=dictionary, compression=codec)
    parts = await read(tmp_path, content)
    assert not any(part.rejects for part in parts)
    assert records(parts) == pq.read_table(io.BytesIO(content)).to_pylist() == rows
    indices = [sample.record_index for part in parts for sample in part.samples]
    assert indices == list(range(len(rows)))
    assert {sample.line for part in parts for sample in part.samples} == {None}


NOON = datetime.datetime(2024, 1, 31, 12)
BERLIN = datetime.timezone(datetime.timedelta(hours=1))


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (decimal.Decimal("12.50"), pa.decimal128(6, 2), "12.50"),
        (decimal.Decimal("-0.00001"), pa.decimal256(40, 5), "-0.00001"),
        (datetime.date(2024, 1, 31), pa.date32(), '"2024-01-31"'),
        (datetime.time(1, 2, 3), pa.time64("us"), '"01:02:03.000000"'),
        (NOON, pa.timestamp("s"), '"2024-01-31 12:00:00.000"'),
        (1, pa.timestamp("ns"), '"1970-01-01 00:00:00.000000001"'),
        (NOON.replace(tzinfo=UTC), pa.timestamp("us", "Europe/Berlin"), '"2024-01-31 12:00:00.000000Z"'),
        (NOON.replace(tzinfo=BERLIN), pa.timestamp("ms", "+01:00"), '"2024-01-31 11:00:00.000Z"'),
        (datetime.timedelta(seconds=2), pa.duration("ms"), "2000"),
        (b"\xff\0", pa.binary(), '"/wA="'),
        (b"\xff\0", pa.binary(2), '"/wA="'),
        ("a", pa.dictionary(pa.int8(), pa.string()), '"a"'),
        (None, pa.null(), "null"),
        (2**64 - 1, pa.uint64(), "18446744073709551615"),
        (0.5, pa.float32(), "0.5"),
        (1e300, pa.float64(), "1e+300"),
        ([("k", 1), ("l", None)], pa.map_(pa.string(), pa.int8()), '[["k", 1], ["l", null]]'),
        ([datetime.date(2024, 1, 31)], pa.list_(pa.date32()), '["2024-01-31"]'),
        ({"d": decimal.Decimal("1.0")}, pa.struct({"d": pa.decimal128(3, 1)}), '{"d": 1.0}'),
        ({"e": b"a"}, pa.struct({"e": pa.binary()}), '{"e": "YQ=="}'),
        ([1, 2], pa.list_(pa.int8(), 2), "[1, 2]"),
    ],
)  # fmt: skip
async def test_a_value_is_what_json_has_for_it(tmp_path, value, kind, expected):
    table = pa.table({"text": ["t", "u"], "x": pa.array([value, None], kind)})
    (part,) = await read(tmp_path, written(table))
    assert not part.rejects
    assert [sample.extra for sample in part.samples] == [f'{{"x": {expected}}}', '{"x": null}']


async def test_numbers_are_used_as_texts_and_columns(tmp_path):
    table = pa.table(
        {"id": [7], "text": pa.array([decimal.Decimal("1.50")]), "complexity": [2], "domain": [True]}
    )
    (sample,) = (await read(tmp_path, written(table)))[0].samples
    assert (sample.sample_id, sample.texts, sample.complexity, sample.domain) == ("7", ("1.50",), 2.0, "true")


async def test_a_bad_row_is_one_reject_with_its_row_and_group(tmp_path):
    text = pa.array([b"fine", b"caf\xe9", b"nan", b"x" * 20_000, b"deep"]).view(pa.string())
    deep: pa.DataType = pa.int8()
    nested: object = 1
    for _ in range(9):
        deep, nested = pa.list_(deep), [nested]
    table = pa.table(
        {
            "id": list("abcde"),
            "text": pa.concat_arrays([text, pa.array([None], pa.string())])[:5],
            "real": [0.0, 0.0, math.nan, math.inf, 0.0],
            "deep": pa.array([None, None, None, None, nested], deep),
        }
    )
    table = pa.concat_tables([table, table.slice(0, 1)])
    parts = await read(tmp_path, written(table, row_group_size=2))
    assert [sample.record_index for part in parts for sample in part.samples] == [0, 5]
    (part,) = parts
    assert [(one.record_index, one.reason, one.line, one.byte_offset) for one in part.rejects] == [
        (1, "invalid_utf8", None, None),
        (2, "not_finite", None, None),
        (3, "record_too_large", None, None),
        (4, "nesting_too_deep", None, None),
    ]
    assert [one.row_group for one in part.rejects] == [0, 1, 1, 2]
    assert [one.message.partition(": ")[0] for one in part.rejects] == [
        "row 2 (row group 0)", "row 3 (row group 1)", "row 4 (row group 1)", "row 5 (row group 2)"
    ]  # fmt: skip


GOOD = written(pa.table({"text": ["some text"] * 500, "n": list(range(500))}), row_group_size=100)


def doubled() -> bytes:
    array = pa.array(["a"])
    return written(pa.Table.from_arrays([array, array, array], ["text", "x", "x"]))


def encrypted(footer: bool) -> bytes:
    class Kms(encryption.KmsClient):
        def wrap_key(self, key_bytes, master_key_identifier):
            return key_bytes.hex()

        def unwrap_key(self, wrapped_key, master_key_identifier):
            return bytes.fromhex(wrapped_key)

    factory = encryption.CryptoFactory(lambda _: Kms())
    config = encryption.EncryptionConfiguration("k", column_keys={"k": ["text"]}, plaintext_footer=not footer)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), config)
    sink = pa.BufferOutputStream()
    table = pa.table({"text": ["a"]})
    with pq.ParquetWriter(sink, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def corrupt(group: int) -> bytes:
    start = pq.read_metadata(io.BytesIO(GOOD)).row_group(group).column(0).dictionary_page_offset
    return GOOD[:start] + b"\xff" * 16 + GOOD[start + 16 :]


@pytest.mark.parametrize(
    ("content", "reason", "message"),
    [
        (lambda: GOOD[:-1], "malformed_parquet", "damaged or cut off: its footer"),
        (lambda: GOOD[: len(GOOD) // 2], "malformed_parquet", "damaged or cut off: its footer"),
        (lambda: b"PAR1", "malformed_parquet", "damaged or cut off: its footer"),
        (lambda: b"PAR1" + b"\xff" * 100 + b"PAR1", "malformed_parquet", "damaged or cut off: its footer"),
        (lambda: corrupt(0), "malformed_parquet", "row group 0 can't be read"),
        (lambda: corrupt(3), "malformed_parquet", "row group 3 can't be read"),
        (lambda: encrypted(footer=True), "encrypted", "is encrypted: write it without"),
        (lambda: encrypted(footer=False), "encrypted", "is encrypted: write it without"),
        (lambda: written(pa.table({"text": pa.array([], pa.string())})), "empty", "no records"),
        (lambda: written(pa.table({"id": [1], "prompt": ["a"]})), "no_recipe", "columns 'id', 'prompt'"),
        (lambda: written(pa.table({"text": [b"a"]})), "no_recipe", "column 'text' holds bytes"),
        (doubled, "duplicate_column", "two columns named 'x'"),
        (
            lambda: written(pa.table({"text": ["a" * (2 << 20)]})),
            "decompressed_too_large",
            "max_decompressed",
        ),
        (lambda: written(pa.table({"text": [None]})), "no_usable_record", "bad_field, row 1 "),
    ],
)
async def test_an_unusable_table_says_why(tmp_path, content, reason, message):
    with pytest.raises(FileError, match=message) as caught:
        await read(tmp_path, content())
    assert caught.value.reason == reason
    assert str(caught.value).isprintable()


async def test_a_bomb_is_refused_by_its_footer(tmp_path):
    content = written(pa.table({"text": ["a" * (1 << 20)] * 32}), compression="zstd", use_dictionary=False)
    assert len(content) < 100_000
    with pytest.raises(FileError) as caught:
        await read(tmp_path, content, limits=dataclasses.replace(WIDE, max_compression_ratio=100))
    assert caught.value.reason == "compression_bomb"


@pytest.mark.slow
async def test_a_large_text_that_all_rows_share_is_never_held_for_all_of_them(tmp_path):
    """Its dictionary is small, and what it stands for is not."""
    content = written(pa.table({"text": ["a" * (1 << 20)] * 4000}), compression="zstd")
    limits = dataclasses.replace(WIDE, max_record_bytes=1000, max_compression_ratio=10**6)
    with pytest.raises(FileError) as caught:
        await read(tmp_path, content, limits=limits)
    assert caught.value.reason == "decompressed_too_large"


@pytest.mark.parametrize("first", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in range(7, 70, 7))])
async def test_damaged_bytes_are_records_or_a_file_error(first, tmp_path):
    for at in range(first, len(GOOD), 70):
        content = bytearray(GOOD)
        content[at] ^= 0xFF
        try:
            parts = await read(tmp_path, bytes(content))
        except FileError as error:
            assert str(error).isprintable(), at
        else:
            assert (
                sum(part.extent.records for part in parts)
                == parts[-1].extent.first_record + parts[-1].extent.records
            )


async def test_parts_are_the_same_after_a_crash(tmp_path):
    table = pa.table({"text": [f"text {number}" for number in range(250)]})
    content = written(table, row_group_size=70)
    parts = await read(tmp_path, content)
    assert [part.extent.records for part in parts] == [100, 100, 50]
    offsets = [part.extent.byte_offset for part in parts]
    assert offsets == [number * len(content) // 250 for number in (0, 100, 200)]
    stored = {0: parts[0].extent, 1: parts[1].extent}
    again = await read(tmp_path, content, stored=stored)
    assert [part.extent for part in again] == [part.extent for part in parts]
    assert again[2].samples == parts[2].samples


MEASURE = """
import asyncio, dataclasses, sys
from pathlib import Path
from daemon.recipes import BUILT_IN_RECIPES
from daemon.source.reader import part_blocks
from tests.support.sources import LIMITS, unclaimed
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
path = Path(sys.argv[1])
limits = dataclasses.replace(LIMITS, max_decompressed_bytes=1 << 40, part_records=1024)
peak = early = records = 0
with path.open("rb") as file:
    for parts in part_blocks(file, unclaimed(path), recipes=BUILT_IN_RECIPES, limits=limits):
        records += sum(part.extent.records for part in parts)
        peak = max(peak, resident())
        early = peak if records <= 40_000 else early
print(records, early, peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, suffix):
    rows = 200_000
    path = tmp_path / f"f.{suffix}"
    texts = [f"{'a text of some length, ' * 10}{number}" for number in range(rows)]
    if suffix == "csv":
        path.write_text("n,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate(texts)))
    else:
        path.write_bytes(written(pa.table({"n": list(range(rows)), "text": texts})))
    assert sum(map(len, texts)) > 40 << 20
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    read_rows, early, peak = map(int, done.stdout.split())
    assert read_rows == rows
    assert peak - early < 16 << 20


TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.mark.parametrize("kind", [pa.null(), pa.string(), pa.binary()])
@pytest.mark.parametrize(
    ("nulls", "chats", "recipe"),
    [
        ("text", {"messages": TURNS}, "messages"),
        ("prompt", {"chosen": TURNS, "rejected": [TURNS[0], TURNS[0]]}, "chosen-rejected"),
    ],
)
async def test_a_column_of_nulls_chooses_no_recipe(tmp_path, kind, nulls, chats, recipe):
    table = pa.Table.from_pylist([chats] * 2).add_column(0, nulls, pa.nulls(2, kind))
    (part,) = await read(tmp_path, written(table))
    assert (part.recipe.name, len(part.samples), part.rejects) == (recipe, 2, ())


async def test_bytes_beside_a_column_of_nulls_are_no_text(tmp_path):
    table = pa.table({"text": [b"a", b"b"], "prompt": [None, None], "completion": ["c", "d"]})
    with pytest.raises(FileError, match="column 'text' holds bytes, not text"):
        await read(tmp_path, written(table))


async def test_a_conversation_in_a_column_of_strings_is_a_reject(tmp_path):
    table = pa.table({"prompt": [json.dumps(TURNS), "Hi"], "completion": ["c", "d"]})
    (part,) = await read(tmp_path, written(table))
    assert [reject.reason for reject in part.rejects] == ["bad_chat"]
    assert len(part.samples) == 1
