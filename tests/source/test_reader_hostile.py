"""Input made to break the reader: it costs a record or a file, never the process or its memory."""

from __future__ import annotations

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import pickle
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyarrow import feather, orc

from daemon.config import InboxSection
from daemon.errors import FileError, MachineError
from daemon.recipes import PLAIN_RECIPE, Recipe
from daemon.records import Part
from daemon.source.content import Decompression
from daemon.source.formats.lines import LineSplitter
from daemon.source.reader import ReadLimits
from tests.support import sources
from tests.support.effort import examples
from tests.support.sources import parts_of

LIMITS = dataclasses.replace(sources.LIMITS, max_record_bytes=1 << 20, max_decompressed_bytes=4 << 20)
LARGE = dataclasses.replace(LIMITS, max_decompressed_bytes=1 << 40)


async def read(
    name: str, content: bytes, recipe: Recipe | None = None, limits: ReadLimits = LIMITS
) -> list[Part]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        return await parts_of(path, recipe, limits)


async def reason_of(name: str, content: bytes, **options: object) -> str:
    with pytest.raises(FileError) as caught:
        await read(name, content, **options)
    return caught.value.reason


JSONISH = st.text(alphabet='[]{}",:\\ntu0e1-. \n\ud800é', max_size=60)


@settings(deadline=None, max_examples=examples(300))
@given(content=st.one_of(JSONISH.map(lambda text: text.encode("utf-8", "surrogatepass")), st.binary()))
@example(content=b'{"\\q": 1}')
@example(content=b'{"samples": [], "\\q": 1}')
@example(content=b'["\\')
@example(content=b'[{"a": "]')
@example(content=b"[NaN, -, 1e999]")
async def test_any_bytes_are_records_or_a_file_error(content):
    for name in ("f.json", "f.jsonl", "f.jsonl.gz", "f.json.zst"):
        try:
            parts = await read(name, content, recipe=PLAIN_RECIPE)
        except FileError as error:
            assert "\n" not in str(error)
            continue
        entries = [entry for part in parts for entry in (*part.samples, *part.rejects)]
        assert sorted(entry.record_index for entry in entries) == list(range(len(entries)))
        assert entries
        for entry in entries:
            assert content[: entry.byte_offset].count(b"\n") + 1 == entry.line


@settings(deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=6),
    cut=st.integers(1, 200),
)
async def test_a_truncated_document_is_never_taken_for_a_whole_one(texts, cut):
    raw = json.dumps([{"text": text} for text in texts], ensure_ascii=False).encode()
    assert await reason_of("f.json", raw[: -min(cut, len(raw) - 1)]) in ("malformed_json", "empty")


async def test_a_string_of_escaped_quotes_without_end_is_read_in_linear_time():
    quotes = b'"' + b'\\"' * 500_000
    (part,) = await read("f.jsonl", b'{"text": "a"}\n[[[[[[[[[' + quotes)
    assert [reject.reason for reject in part.rejects] == ["nesting_too_deep"]
    assert await reason_of("f.json", b"[" + quotes) == "malformed_json"


async def test_many_keys_of_which_the_last_is_twice_are_read_in_linear_time():
    pairs = ",".join(f'"k{number}":0' for number in range(80_000))
    (part,) = await read("f.jsonl", f'{{"text": "a"}}\n{{{pairs},"k79999":0}}'.encode())
    assert [reject.reason for reject in part.rejects] == ["duplicate_key"]
    assert "'k79999'" in part.rejects[0].message


@pytest.mark.parametrize("depth", [500, 900, 1000, 100_000])
async def test_depth_beyond_what_python_follows_is_a_reject(depth):
    deep = f'{{"text": "b", "x": {"[" * depth}{"]" * depth}}}'
    limits = dataclasses.replace(LIMITS, max_nesting=10**9)
    for name, content in (("f.jsonl", f'{{"text": "a"}}\n{deep}'), ("f.json", f'[{{"text": "a"}}, {deep}]')):
        (part,) = await read(name, content.encode(), limits=limits)
        assert part.extent.records == 2
        assert {reject.reason for reject in part.rejects} <= {"nesting_too_deep"}
        assert len(part.samples) == (2 if depth == 500 else part.extent.records - len(part.rejects))


def bomb(megabytes: int) -> bytes:
    squeeze = zstandard.ZstdCompressor().compressobj()
    return b"".join(squeeze.compress(b" " * (1 << 20)) for _ in range(megabytes)) + squeeze.flush()


@pytest.mark.parametrize(
    ("limit", "reason"), [(4 << 20, "decompressed_too_large"), (1 << 40, "compression_bomb")]
)
@pytest.mark.parametrize("name", ["f.json.zst", "f.jsonl.zst"])
async def test_a_decompression_bomb_is_stopped_at_the_limit(name, limit, reason):
    packed = bomb(256)
    assert len(packed) < 1 << 16
    limits = dataclasses.replace(LIMITS, max_decompressed_bytes=limit)
    tracemalloc.start()
    try:
        assert await reason_of(name, packed, limits=limits) == reason
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_limits_of_decompression_name_the_setting_that_raises_them(suffix):
    packed = gzip.compress(bytes(17 << 20)) if suffix == ".gz" else bomb(17)
    ratio = (17 << 20) // len(packed)
    for limits, reason, setting in (
        (
            {"max_decompressed_bytes": 1 << 20},
            "decompressed_too_large",
            "inbox.max_decompressed_bytes = 1048576",
        ),
        (
            {"max_compression_ratio": ratio // 4},
            "compression_bomb",
            f"inbox.max_compression_ratio = {ratio // 4}",
        ),
    ):
        with pytest.raises(FileError, match=setting) as caught:
            list(Decompression(suffix, dataclasses.replace(LARGE, **limits)).feed(packed))
        assert caught.value.reason == reason
    assert (
        sum(
            map(
                len,
                Decompression(suffix, dataclasses.replace(LARGE, max_compression_ratio=4 * ratio)).feed(
                    packed
                ),
            )
        )
        == 17 << 20
    )


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_stream_may_unpack_to_exactly_the_limit(suffix):
    content = LINE * 9
    packed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    assert (
        b"".join(
            Decompression(suffix, dataclasses.replace(LARGE, max_decompressed_bytes=len(content))).feed(
                packed
            )
        )
        == content
    )
    with pytest.raises(FileError) as caught:
        list(
            Decompression(suffix, dataclasses.replace(LARGE, max_decompressed_bytes=len(content) - 1)).feed(
                packed
            )
        )
    assert caught.value.reason == "decompressed_too_large"


def test_what_compresses_well_is_no_bomb_up_to_16_mebibytes():
    packed = bomb(16)
    assert len(packed) * 1000 < 16 << 20
    assert (
        sum(map(len, Decompression(".zst", dataclasses.replace(LARGE, max_compression_ratio=1)).feed(packed)))
        == 16 << 20
    )
    with pytest.raises(FileError) as caught:
        list(
            Decompression(".zst", dataclasses.replace(LARGE, max_compression_ratio=1)).feed(
                packed + zstandard.compress(b" ")
            )
        )
    assert caught.value.reason == "compression_bomb"


@pytest.mark.parametrize("window_log", [28, 30, 31])
@pytest.mark.parametrize("before", [b"", zstandard.compress(b"")])
async def test_a_frame_that_wants_a_huge_window_names_it_and_the_setting(window_log, before):
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, compression_level=1)
    squeeze = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = before + squeeze.compress(LINE) + squeeze.flush()
    for name in ("f.jsonl.zst", "f.jsonl"):
        with pytest.raises(FileError) as caught:
            await read(name, packed)
        assert caught.value.reason == "zstd_window_too_large"
        assert f"a window of {1 << window_log} bytes" in str(caught.value)
        assert "inbox.max_zstd_window_bytes = 134217728" in str(caught.value)
        raised = dataclasses.replace(LIMITS, max_zstd_window_bytes=1 << window_log)
        (part,) = await read(name, packed, limits=raised)
        assert [sample.texts for sample in part.samples] == [("a",)]


@pytest.mark.skipif(shutil.which("zstd") is None, reason="needs the program zstd")
async def test_what_zstd_long_writes_is_read_with_the_limit_raised():
    command = ["zstd", "--long=31", "--stdout"]
    packed = subprocess.run(command, input=LINE, capture_output=True, check=True).stdout
    with pytest.raises(FileError, match="a window of 2147483648 bytes"):
        await read("f.jsonl.zst", packed)
    highest = InboxSection(max_zstd_window_bytes=1 << 31).max_zstd_window_bytes
    (part,) = await read(
        "f.jsonl.zst", packed, limits=dataclasses.replace(LIMITS, max_zstd_window_bytes=highest)
    )
    assert len(part.samples) == 1


async def test_a_frame_that_needs_a_dictionary_says_so():
    examples = [b'{"text": "a sample of number %d"}' % number for number in range(2000)]
    dictionary = zstandard.train_dictionary(2000, examples)
    packed = zstandard.ZstdCompressor(dict_data=dictionary).compress(LINE * 9)
    with pytest.raises(FileError, match=f"needs the dictionary {dictionary.dict_id()}") as caught:
        await read("f.jsonl.zst", packed)
    assert caught.value.reason == "zstd_dictionary"


def test_a_line_over_the_limit_is_not_held_in_memory():
    def content() -> Iterator[bytes]:
        yield b'{"text": "'
        for _ in range(64):
            yield b"x" * (1 << 20)
        yield b'"}\n{"text": "a"}'

    splitter = LineSplitter(1 << 20)
    tracemalloc.start()
    try:
        (long,) = [record for chunk in content() for record in splitter.feed(chunk)]
        (short,) = splitter.finish()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert long.text is None
    assert (short.text, short.place.line, short.place.byte_offset) == ('{"text": "a"}', 2, 13 + (64 << 20))


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
async def test_record_sizes_are_bytes_in_every_format(name):
    record = json.dumps({"text": "é" * 40}, ensure_ascii=False).encode()
    content = LINE + record if name == "f.jsonl" else b"[" + LINE + b"," + record + b"]"
    for limit, rejects in ((len(record), 0), (len(record) - 1, 1)):
        limits = dataclasses.replace(LIMITS, max_record_bytes=limit)
        (part,) = await read(name, content, recipe=PLAIN_RECIPE, limits=limits)
        assert len(part.rejects) == rejects


LINE = b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("f.jsonl.gz", gzip.compress(LINE, mtime=0) + bytes(512)),
        (
            "f.jsonl.gz",
            gzip.compress(b"", mtime=0) + gzip.compress(LINE, mtime=0) + gzip.compress(b"", mtime=0),
        ),
        ("f.jsonl.zst", zstandard.compress(b"") + zstandard.compress(LINE)),
        ("f.jsonl.zst", b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(LINE)),
        ("F.JSONL.GZ", gzip.compress(b"\xef\xbb\xbf" + LINE, mtime=0)),
    ],
)
async def test_odd_but_valid_compression_is_read(name, content):
    (part,) = await read(name, content)
    assert [sample.texts for sample in part.samples] == [("a",)]


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        zstandard.compress,
        lambda raw: b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + zstandard.compress(raw),
    ],
)
@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.jsonl.gz", "f.json.zst", "f.NDJSON.GZ"])
@pytest.mark.parametrize(
    "content", [LINE, b"[" + LINE + b"]", b"\xef\xbb\xbf" + LINE, b"\x1e" + LINE], ids=repr
)
async def test_content_counts_over_the_suffix_of_compression(name, pack, content):
    for written in (content, pack(content), pack(content[:5]) + pack(content[5:])):
        (part,) = await read(name, written)
        assert [sample.texts for sample in part.samples] == [("a",)]
        assert part.rejects == ()


@pytest.mark.parametrize("name", ["f.jsonl", "f.jsonl.gz"])
@pytest.mark.parametrize("pack", [gzip.compress, zstandard.compress])
async def test_what_is_compressed_twice_says_so(name, pack):
    with pytest.raises(FileError, match="compressed twice: decompress it once"):
        await read(name, pack(gzip.compress(LINE)))


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.json", LINE)
    return content.getvalue()


def tarred() -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.json"))
    return content.getvalue()


def table(write: Callable[[pa.Table, io.BytesIO], object]) -> bytes:
    content = io.BytesIO()
    write(pa.table({"text": ["a"]}), content)
    return content.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("CREATE TABLE t (x)")
        return connection.serialize()


def array() -> bytes:
    content = io.BytesIO()
    np.save(content, np.arange(3))
    return content.getvalue()


NOT_JSON = {
    "bzip2": bz2.compress(LINE),
    "xz": lzma.compress(LINE),
    "lzma": lzma.compress(LINE, lzma.FORMAT_ALONE),
    "zip archive": zipped(),
    "tar archive": tarred(),
    "Arrow": table(feather.write_feather),
    "ORC": table(orc.write_table),
    "SQLite": database(),
    "NumPy": array(),
    "pickle": pickle.dumps([{"text": "a"}]),
    "PDF": b"%PDF-1.7\n%\xe2\xe3",
    "HDF5": b"\x89HDF\r\n\x1a\n\0",
    "PNG": b"\x89PNG\r\n\x1a\n\0",
    "HTML": b"\n<!DOCTYPE html>\n<html>",
    "XML": b'<?xml version="1.0"?>',
    "rich text": b"{\\rtf1\\ansi a}",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
}


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.jsonl.gz"])
@pytest.mark.parametrize("what", NOT_JSON)
async def test_another_kind_of_file_is_named_with_the_remedy(name, what):
    for content in (NOT_JSON[what], gzip.compress(NOT_JSON[what])):
        with pytest.raises(FileError) as caught:
            await read(name, content)
        assert what in str(caught.value)
        assert caught.value.reason == "binary"
        assert ": " in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize(
    "text", ['{"text": "a"}\n', '\n[{"text": "é"}]', '[\n  {"text": "\u4e2d"}]', '{"\u4e2d": 1}']
)
async def test_another_encoding_is_named_with_the_remedy(encoding, text):
    contents = [text.encode(encoding)]
    if encoding.endswith("e"):
        contents.append(f"\ufeff{text}".encode(encoding))
    for content in contents:
        for name in ("f.json", "f.jsonl"):
            with pytest.raises(FileError, match=f"{encoding[:6].upper()} text: save it as UTF-8") as caught:
                await read(name, content)
            assert caught.value.reason == "unsupported_encoding"


async def test_a_compressed_binary_file_is_recognised():
    assert await reason_of("f.jsonl.gz", gzip.compress(b"") + gzip.compress(b"\0\1\2")) == "binary"


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_a_stream_that_ends_early_is_damaged(cut):
    for suffix, packed in ((".gz", gzip.compress(LINE * 9)), (".zst", zstandard.compress(LINE * 9))):
        stream = Decompression(suffix, LIMITS)
        with pytest.raises(FileError):
            list(stream.feed(packed[:-cut]))
            stream.finish()


def test_a_window_that_the_memory_does_not_hold_is_no_damage_of_the_file():
    """In a process of its own, whose address space has room for a quarter of the window."""
    program = """
import resource, zstandard
from daemon.errors import MachineError
from daemon.source.content import Decompression
from tests.source.test_reader_hostile import LARGE

parameters = zstandard.ZstdCompressionParameters(window_log=27, compression_level=1)
squeeze = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
packed = squeeze.compress(bytes(1 << 20)) + squeeze.flush()
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
try:
    list(Decompression(".zst", LARGE).feed(packed))
except MachineError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "not enough memory to unpack a .zst stream: free some" in ran.stdout


@pytest.mark.parametrize(
    "error", [MemoryError(), zlib.error("Error -4 while decompressing data: insufficient memory")]
)
def test_memory_that_gzip_lacks_is_no_damage_of_the_file(error, monkeypatch):
    class Full:
        eof, unused_data = False, b""

        def decompress(self, data: bytes, /) -> bytes:
            raise error

    stream = Decompression(".gz", LIMITS)
    monkeypatch.setattr(stream, "_new_member", Full)
    with pytest.raises(MachineError, match=r"not enough memory to unpack a \.gz stream"):
        list(stream.feed(gzip.compress(LINE)))


async def test_garbage_after_a_member_is_damage():
    assert await reason_of("f.jsonl.gz", gzip.compress(LINE) + b"junk") == "corrupt_compression"
    assert await reason_of("f.jsonl.zst", zstandard.compress(LINE) + b"junk!") == "corrupt_compression"


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
async def test_parts_are_bounded_in_bytes_too(name):
    records = [json.dumps({"text": "x" * 400}) for _ in range(7)]
    content = "\n".join(records) if name == "f.jsonl" else f"[{','.join(records)}]"
    parts = await read(name, content.encode(), limits=dataclasses.replace(LIMITS, part_bytes=1000))
    assert [part.extent.records for part in parts] == [3, 3, 1]


async def test_some_object_without_the_fields_asks_for_a_recipe():
    assert await reason_of("f.jsonl", b'{oops\n{"label": 1}') == "no_recipe"
    assert await reason_of("f.json", b"[1, 2]") == "no_usable_record"


async def test_a_column_that_a_text_uses_is_still_a_column():
    recipe = Recipe((("t", "{domain}: {text} {complexity}"),), None)
    record = b'{"text": "a", "domain": "d", "complexity": 2, "id": [1], "n": 1}'
    (part,) = await read("f.json", record, recipe=recipe)
    (sample,) = part.samples
    assert sample.texts == ("d: a 2",)
    assert (sample.domain, sample.complexity, sample.sample_id) == ("d", 2.0, "0")
    assert sample.extra == '{"id": [1], "n": 1}'
