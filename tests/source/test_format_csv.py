"""CSV and TSV against Python's own csv module, and what is told of rows and files that are none."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import io
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from daemon.errors import FileError
from daemon.records import Part, Recipe, Reject, Sample
from daemon.source.formats.rows import Row, RowSplitter
from tests.support.effort import examples
from tests.support.sources import LIMITS, parts_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
NASTY = st.text(alphabet='",\r\n \t;a"é', max_size=12)


async def read(folder: Path, name: str, content: bytes | str, **options: object) -> list[Part]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return await parts_of(path, **options)


def samples(parts: Sequence[Part]) -> list[Sample]:
    return [sample for part in parts for sample in part.samples]


def rejects(parts: Sequence[Part]) -> list[Reject]:
    return [reject for part in parts for reject in part.rejects]


def rows_of(content: bytes, cuts: Sequence[int], limit: int = 1 << 20) -> list[Row]:
    """The rows of a content that comes in pieces of these sizes, and then the rest."""
    splitter = RowSplitter(b",", limit)
    rows: list[Row] = []
    for cut in cuts:
        rows += splitter.feed(content[:cut])
        content = content[cut:]
    return [*rows, *splitter.feed(content), *splitter.finish()]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    columns=st.lists(TEXTS | NASTY, unique=True, max_size=3),
    rows=st.lists(st.lists(TEXTS | NASTY, min_size=4, max_size=4), min_size=1, max_size=5),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    suffix=st.sampled_from([".csv", ".tsv", ".csv.gz"]),
    mark=st.booleans(),
)
async def test_any_table_is_read_as_it_was_written(tmp_path, columns, rows, quoting, end, suffix, mark):
    header = ["text", *(column for column in columns if column not in ("text", "id", "domain", "complexity"))]
    rows = [row[: len(header)] for row in rows]
    sink = io.StringIO(newline="")
    if ({*"\r\n"} - {*end}) & {*"".join(map("".join, [header, *rows]))}:
        quoting = csv.QUOTE_ALL  # the writer quotes only the line ends that it writes
    delimiter = "\t" if suffix == ".tsv" else ","
    writer = csv.writer(sink, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([header, *rows])
    content = ("\ufeff" * mark + sink.getvalue()).encode()
    if suffix == ".csv.gz":
        content = gzip.compress(content)
    parts = await read(tmp_path, f"f{suffix}", content)
    assert not rejects(parts)
    expected = [dict(zip(header, row, strict=True)) for row in rows]
    found = [{"text": sample.texts[0], **json.loads(sample.extra or "{}")} for sample in samples(parts)]
    assert found == expected


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary() | NASTY.map(str.encode), magic=st.sampled_from([b"", b"text,a\n", b"PAR1"]))
async def test_any_bytes_are_records_or_a_file_error(tmp_path, content, magic):
    for name in ("f.csv", "f.tsv", "f.csv.gz", "f.parquet"):
        try:
            parts = await read(tmp_path, name, magic + content)
        except FileError as error:
            assert str(error).isprintable()
            continue
        entries = sorted(one.record_index for one in (*samples(parts), *rejects(parts)))
        assert entries == list(range(len(entries)))
        assert entries


@settings(deadline=None, max_examples=examples(300))
@given(text=st.text(alphabet='",\r\nab', max_size=40), cuts=st.lists(st.integers(0, 9), max_size=8))
@example(text='"a""', cuts=[3])
@example(text='"a"\r\n"b"\r', cuts=[4, 1])
def test_rows_are_those_of_the_csv_module_wherever_chunks_end(text, cuts):
    reader = csv.reader(io.StringIO(text, newline=""))
    expected: list[tuple[int, list[str]]] = []
    before = 0
    for fields in reader:
        if fields:
            expected.append((before + 1, fields))
        before = reader.line_num
    content = text.encode()
    try:
        found = rows_of(content, cuts)
    except FileError as error:
        assert error.reason == "malformed_csv"
        with pytest.raises(csv.Error):  # within a quote at the end
            list(csv.reader(io.StringIO(text.rstrip("\r\n") or '"', newline=""), strict=True))
        return
    assert [row.line for row in found] == [line for line, _ in expected]
    for row, (_, fields) in zip(found, expected, strict=True):
        assert row.raw is not None
        assert content[row.byte_offset :].startswith(row.raw)
        if not row.broken:
            assert next(csv.reader(io.StringIO(row.raw.decode(), newline=""))) == fields
    for limit in (0, 1, 3):
        small = rows_of(content, cuts, limit)
        assert [row.raw for row in small] == [
            row.raw if row.raw is not None and len(row.raw) <= limit else None for row in found
        ]


async def test_a_field_is_text_as_written_and_complexity_a_number(tmp_path):
    content = 'id,text,complexity,domain,n\n007,007,0.50,,1e3\n,1.0,007,law,\n x ,true,1E2,5, a \n,"",,,NaN\n'
    found = samples(await read(tmp_path, "f.csv", content))
    assert [(one.sample_id, one.texts[0], one.complexity, one.domain) for one in found] == [
        ("007", "007", 0.5, None),
        ("1", "1.0", None, "law"),
        (" x ", "true", 100.0, "5"),
        ("3", "", None, None),
    ]
    assert [json.loads(one.extra or "null") for one in found] == [
        {"n": "1e3"},
        {"complexity": "007", "n": ""},
        {"n": " a "},
        {"n": "NaN"},
    ]


async def test_a_bad_row_is_one_reject_with_its_place(tmp_path):
    lines = [
        b'id,"te""xt",text',
        b'a,"two\r\nlines",one',
        b"b,short",
        b"",
        b"c,many,fields,here",
        b'd,"closed"open,x',
        b"e,caf\xe9,x",
        b"f,ok," + b"x" * 400,
        b'g,5" pipe,fine',
    ]
    content = b"\n".join(lines)
    limits = dataclasses.replace(LIMITS, max_record_bytes=200)
    parts = await read(tmp_path, "f.csv", content, limits=limits)
    assert [one.texts for one in samples(parts)] == [("one",), ("fine",)]
    assert [(one.record_index, one.line, one.reason) for one in rejects(parts)] == [
        (1, 4, "malformed_csv"),
        (2, 6, "malformed_csv"),
        (3, 7, "malformed_csv"),
        (4, 8, "invalid_utf8"),
        (5, 9, "record_too_large"),
    ]
    for one, start in zip(rejects(parts), (b"b,", b"c,", b"d,", b"e,", b"f,"), strict=True):
        assert content[one.byte_offset :].startswith(start)
        assert one.message.startswith(f"line {one.line}: the record ")
    assert "has 2 fields, where the header has 3" in rejects(parts)[0].message
    assert [(one.line, content[one.byte_offset :][:1]) for one in samples(parts)] == [(2, b"a"), (10, b"g")]


@pytest.mark.parametrize(
    ("name", "content", "reason", "message"),
    [
        ("f.csv", "text\n", "empty", "no records"),
        ("f.csv", "\n\n", "empty", "no records"),
        ("f.csv", "id,prompt\n1,2\n", "no_recipe", "columns 'id', 'prompt', and not fact and"),
        ("f.csv", "text,a,a\n1,2,3\n", "duplicate_column", "two columns named 'a'"),
        (
            "f.csv",
            "id;text\n1;2\n",
            "unsupported_layout",
            "semicolons and no commas: write the table with commas$",
        ),
        ("f.csv", '"id";"text"\n1;2\n', "unsupported_layout", "semicolons and no commas"),
        ("f.csv", "id\ttext\n1\t2\n", "unsupported_layout", r"tabs and no commas: .* name it \.tsv"),
        ("f.tsv", "id,text\n1,2\n", "unsupported_layout", r"commas and no tabs: .* name it \.csv"),
        ("f.csv", 'text,x\na,b\nc,"d\ne,f\n', "malformed_csv", "row at line 3 never ends"),
        ("f.csv", '"te"xt,text\na,b\n', "malformed_csv", "first row has text after"),
        ("f.csv", "text," + "x" * 20_000, "record_too_large", "first row, which names the columns"),
        ("f.csv", b"text,caf\xe9\na,b\n", "unsupported_encoding", "first row is not UTF-8"),
        ("f.csv", "text\na\n".encode("utf-16"), "unsupported_encoding", "UTF-16 text: save it as UTF-8"),
        ("f.csv", "text\na\n".encode("utf-16-le"), "unsupported_encoding", "UTF-16 text: save it as UTF-8"),
        ("f.tsv", "text\na\n".encode("utf-16-be"), "unsupported_encoding", "UTF-16 text: save it as UTF-8"),
        ("f.csv", "text\na\n".encode("utf-32"), "unsupported_encoding", "UTF-32 text: save it as UTF-8"),
        ("f.csv.gz", gzip.compress(b"text\n" + b"a\n" * 99, mtime=0)[:-9], "corrupt_compression", "damaged"),
        (
            "f.csv.gz",
            gzip.compress(b"text\n" + b"a" * (2 << 20)),
            "decompressed_too_large",
            "max_decompressed",
        ),
        ("f.csv", 'text,x\n"a"b,c\n', "no_usable_record", "malformed_csv, line 2"),
    ],
)
async def test_an_unusable_table_says_why(tmp_path, name, content, reason, message):
    with pytest.raises(FileError, match=message) as caught:
        await read(tmp_path, name, content)
    assert caught.value.reason == reason
    assert str(caught.value).isprintable()


async def test_configured_texts_name_the_columns(tmp_path):
    recipe = Recipe((("q", "{a;b}: {n}"),), None)
    (part,) = await read(tmp_path, "f.csv", "a;b,n\nx,1\n", recipe=recipe)
    assert part.samples[0].texts == ("x: 1",)
    with pytest.raises(FileError, match="columns 'text', and not a;b and n"):
        await read(tmp_path, "f.csv", "text\nx\n", recipe=recipe)


async def test_what_came_before_an_open_quote_is_read_and_then_the_file_fails(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("text\n" + "a\n" * 250 + '"open\n' + "b\n" * 600_000)
    with pytest.raises(FileError, match="at line 252 never ends"):
        await parts_of(path)


@pytest.mark.slow
async def test_a_quote_that_never_ends_is_followed_in_flat_memory(tmp_path):
    path = tmp_path / "f.csv"
    path.write_bytes(b'text\n"' + b"open\n" * (8 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match="at line 2 never ends"):
            await parts_of(path)
        assert tracemalloc.get_traced_memory()[1] < 24 << 20
    finally:
        tracemalloc.stop()


async def test_parts_are_the_same_after_a_crash(tmp_path):
    content = "id,text\n" + "".join(f'{number},"te\nxt {number}"\n' for number in range(250))
    parts = await read(tmp_path, "f.csv", content)
    assert [part.extent.records for part in parts] == [100, 100, 50]
    for part in parts:
        assert content.encode()[part.extent.byte_offset :].startswith(
            f'{part.extent.first_record},"'.encode()
        )
    stored = {0: parts[0].extent, 1: parts[1].extent}
    again = await read(tmp_path, "f.csv", content, stored=stored)
    assert [part.extent for part in again] == [part.extent for part in parts]
    assert again[2].samples == parts[2].samples
