"""A format is a file and a line in the registry: names, messages and reading follow."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon.errors import FileError
from daemon.sink.outbox import output_folder_name
from daemon.source import formats
from daemon.source.formats import FORMATS, format_of, without_suffix
from daemon.source.reader import ReadLimits
from tests.support.sources import LIMITS, parts_of

DAEMON = Path(__file__).parents[2] / "daemon"
ROWS = [{"id": f"r{number}", "text": f"text {number}"} for number in range(3)]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"id,text\n" + b"".join(f"{row['id']},{row['text']}\n".encode() for row in ROWS)


def parquet(rows: Sequence[dict[str, object]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue().to_pybytes()


CONTENTS = {
    "jsonl": JSON_LINES,
    "json": json.dumps(ROWS).encode(),
    "csv": CSV,
    "tsv": CSV.replace(b",", b"\t"),
    "parquet": parquet(ROWS),
}


async def read(tmp_path: Path, name: str, content: bytes, limits: ReadLimits = LIMITS) -> list[str]:
    path = tmp_path / name
    path.write_bytes(content)
    parts = await parts_of(path, limits=limits)
    assert not [part.rejects for part in parts if part.rejects]
    return [f"{sample.sample_id} {sample.texts[0]}" for part in parts for sample in part.samples]


def test_every_name_says_its_format():
    said = {suffix: one.name for one in FORMATS for suffix in one.suffixes}
    assert said == {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "json",
        ".parquet": "parquet",
        ".csv": "csv",
        ".tsv": "tsv",
    }
    for suffix, name in said.items():
        assert format_of(f"a.b{suffix.upper()}") == (formats.BY_SUFFIX[suffix], None)
        assert output_folder_name(without_suffix(f"a.b{suffix}"), "unit") == "a.b-unit"
        assert without_suffix(f"a{suffix}{suffix}") == f"a{suffix}"
        if name != "parquet":
            assert format_of(f"a{suffix}.GZ")[1] == ".gz"
            assert output_folder_name(without_suffix(f"a{suffix}.zst"), "unit") == "a-unit"
    with pytest.raises(FileError, match=r"\.csv or \.tsv, optionally with \.gz or \.zst, or in \.parquet"):
        format_of("a.parquet.gz")


@pytest.mark.parametrize("name", CONTENTS)
async def test_the_same_records_are_the_same_samples_in_every_format(tmp_path, name):
    expected = ["r0 text 0", "r1 text 1", "r2 text 2"]
    assert await read(tmp_path, f"f.{name}", CONTENTS[name]) == expected
    if name != "parquet":
        assert await read(tmp_path, f"f.{name}.gz", gzip.compress(CONTENTS[name])) == expected


@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.csv", "f.tsv", "f.parquet", "f.jsonl.gz"])
@pytest.mark.parametrize("content", ["json", "jsonl", "parquet"])
async def test_content_counts_over_the_suffix_where_it_tells(tmp_path, name, content):
    assert await read(tmp_path, name, CONTENTS[content]) == ["r0 text 0", "r1 text 1", "r2 text 2"]


@pytest.mark.parametrize(
    ("name", "content", "reason", "message"),
    [
        ("f.parquet", CSV, "binary", "is not Parquet"),
        ("f.parquet", b"PK\x03\x04", "binary", "a zip archive .* not Parquet"),
        ("f.parquet", gzip.compress(CONTENTS["parquet"]), "unsupported_compression", "decompress it"),
        ("f.jsonl.gz", gzip.compress(CONTENTS["parquet"]), "unsupported_compression", "decompress it"),
        ("f.parquet", b"", "empty", "no records"),
        ("f.csv", b"", "empty", "no records"),
        ("f.csv", b"PK\x03\x04", "binary", "not CSV text"),
        ("f.csv", b"text\n\0\n", "binary", "not CSV text: save it as UTF-8 CSV"),
        ("f.tsv", b"<html><body>", "binary", "HTML or XML, not TSV text"),
        ("f.csv.gz", CSV, "corrupt_compression", "damaged"),
    ],
)
async def test_content_that_does_not_fit_its_name_is_told(tmp_path, name, content, reason, message):
    with pytest.raises(FileError, match=message) as caught:
        await read(tmp_path, name, content)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


def example() -> str:
    """The code of "How to add" in daemon/README.md."""
    _, _, section = (DAEMON / "README.md").read_text().partition("## How to add")
    return section.partition("```python\n")[2].partition("```")[0]


READ = """
import asyncio, json, sys
from pathlib import Path
from daemon.source.formats import EXPECTED, without_suffix
from daemon.source.inputs import InputNames
from daemon.sink.outbox import output_folder_name
from tests.support.sources import parts_of
parts = asyncio.run(parts_of(Path(sys.argv[1])))
places = [(sample.texts[0], sample.line, sample.byte_offset) for part in parts for sample in part.samples]
folder = output_folder_name(without_suffix("x.txt"), "u")
print(json.dumps([InputNames().owner("x.txt"), folder, EXPECTED, places]))
"""


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_format_of_the_documentation_is_one_file_and_one_line(tmp_path, suffix):
    ignored = shutil.ignore_patterns("presets", "__pycache__", "*.so", "*.c", "*.md")
    shutil.copytree(DAEMON, tmp_path / "daemon", ignore=ignored)
    folder = tmp_path / "daemon/source/formats"
    (folder / "plaintext.py").write_text(example())
    registry = folder / "__init__.py"
    line = "PARQUET, CSV, TSV)"
    source = registry.read_text()
    assert source.count(line) == 1
    added = "from daemon.source.formats.plaintext import TEXT\n"
    import_line = "from daemon.source.kinds import Compression\n"
    source = source.replace(import_line, added + import_line)
    registry.write_text(source.replace(line, "PARQUET, CSV, TSV, TEXT)"))
    content = "one\n\ntw\u00f6\nthree".encode()
    path = tmp_path / f"f.txt{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{DAEMON.parent}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    owner, output, expected, places = json.loads(done.stdout)
    assert (owner, output) == ("input", "x-u")
    assert ".tsv or .txt, optionally" in expected
    assert places == [["one", 1, 0], ["tw\u00f6", 3, 5], ["three", 4, 10]]
