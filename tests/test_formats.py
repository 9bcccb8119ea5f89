"""A run over one file of each input format: the same records come out as the same rows."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from daemon.config import load_config
from daemon.service import serve

ROWS: list[dict[str, Any]] = [
    {
        "id": f"r{number}",
        "prompt": f"The sky, at {number} o'clock, is",
        "fact": ' "blue"',
        "hallucination": "\na line of its own",
        "complexity": number / 4,
        "domain": "weather",
        "note": f"00{number}",
    }
    for number in range(5)
]


def table(path: Path, delimiter: str) -> bytes:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path.read_bytes()


def parquet(path: Path) -> bytes:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    return path.read_bytes()


WRITERS: dict[str, Callable[[Path], bytes]] = {
    "jsonl": lambda path: "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
    "json": lambda path: json.dumps({"data": ROWS}, indent=1).encode(),
    "csv": lambda path: table(path, ","),
    "csv.gz": lambda path: gzip.compress(table(path, ",")),
    "tsv": lambda path: table(path, "\t"),
    "tsv.zst": lambda path: zstandard.compress(table(path, "\t")),
    "parquet": parquet,
}


@pytest.fixture(scope="module")
def outbox(tiny_toml, tmp_path_factory) -> Path:
    """The results of one run over one file of each format."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "inbox").mkdir()
    for suffix, write in WRITERS.items():
        (folder / f"inbox/{suffix}.{suffix}").write_bytes(write(folder / "draft"))
    settings = {
        "inbox.path": folder / "inbox",
        "outbox.path": folder / "outbox",
        "inbox.settle_seconds": 0,
        "inbox.part_records": 2,
        "http.enabled": False,
    }
    tally = serve(load_config(tiny_toml, {}, settings), once=True)
    assert (tally.failed, tally.committed) == (0, len(WRITERS))
    assert [path for path in (folder / "inbox").iterdir() if path.is_file()] == []
    return folder / "outbox"


def rows_of(outbox: Path, suffix: str, file: str) -> list[dict[str, Any]]:
    """The rows of a format's one folder, which is named after the input without its suffix."""
    (folder,) = (path for path in outbox.iterdir() if path.name.rpartition("-")[0] == suffix)
    assert not (folder / "rejects.jsonl").exists()
    return pq.read_table(folder / file).to_pylist()


@pytest.mark.parametrize("suffix", [suffix for suffix in WRITERS if suffix != "jsonl"])
def test_rows_are_those_of_the_same_records_as_json_lines(outbox, suffix):
    for file, key in (("metrics.parquet", "n_tokens_prompt"), ("features.parquet", "indices")):
        expected, found = rows_of(outbox, "jsonl", file), rows_of(outbox, suffix, file)
        assert len(found) == len(expected) > 0
        assert key in found[0]
        for row, wanted in zip(found, expected, strict=True):
            assert row.keys() == wanted.keys()
            for name, value in wanted.items():
                is_real = type(value) is float or name == "values"
                assert row[name] == (pytest.approx(value, rel=1e-4, abs=1e-6) if is_real else value), name
    extra = [json.loads(row["extra"]) for row in rows_of(outbox, suffix, "metrics.parquet")]
    assert extra == [{"note": f"00{number}"} for number in range(5)]
