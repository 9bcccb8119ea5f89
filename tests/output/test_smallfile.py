"""Small files read back, in every reader, as what a general writer would have written."""

from __future__ import annotations

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import finish, make_part, open_writer

from daemon.output.ragged import Ragged
from daemon.output.smallfile import SmallFiles
from daemon.output.tables import FEW_ROWS, arrow

SCHEMA = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("note", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("count", pa.int32(), nullable=False),
        pa.field("indices", pa.list_(pa.uint32()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
        pa.field("halves", pa.list_(pa.float16()), nullable=False),
    ]
)
FILES = SmallFiles(SCHEMA)
TEXTS = ["", "a", "naïve 🧪", "line\nfeed\x00", "long " * 100]
INT64, INT32 = np.iinfo(np.int64), np.iinfo(np.int32)


def some_record(chance: np.random.Generator) -> dict[str, object]:
    n = int(chance.choice([0, 0, 1, 2, 7, 8, 9, 300]))
    return {
        "name": str(chance.choice(TEXTS)),
        "index": int(chance.choice([0, -1, INT64.min, INT64.max])),
        "note": chance.choice([None, *TEXTS]),
        "score": chance.choice([None, -0.0, 1e-310, 0.1, np.inf]),
        "count": int(chance.choice([0, INT32.min, INT32.max])),
        "indices": chance.integers(0, 2**32, n).tolist(),
        "values": chance.normal(size=n).astype(np.float32).tolist(),
        "halves": chance.normal(size=n).astype(np.float16).tolist(),
    }


def as_column(field: pa.Field, values: list) -> object:
    if pa.types.is_list(field.type):
        offsets = np.cumsum([0, *map(len, values)])
        flat = [value for row in values for value in row]
        return Ragged(offsets, np.array(flat, field.type.value_type.to_pandas_dtype()))
    if pa.types.is_string(field.type):
        return np.array(values, object)
    return np.array(values, field.type.to_pandas_dtype())


def encoded(records: list[dict], sizes: list[int]) -> tuple[list[bytes], pa.Table]:
    """The files, and all of their rows."""
    columns = [as_column(field, [record[field.name] for record in records]) for field in SCHEMA]
    files = FILES.encode(columns, np.array(sizes))
    arrays = [arrow(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    assert [file.rows for file in files] == sizes
    return [bytes(file.content) for file in files], table


@pytest.mark.parametrize("seed", range(30))
def test_any_rows_read_back_as_they_were(seed):
    chance = np.random.Generator(np.random.PCG64(seed))
    sizes = chance.choice([1, 2, 8, 9, 64, 70], chance.integers(1, 6)).tolist()
    contents, table = encoded([some_record(chance) for _ in range(sum(sizes))], sizes)
    start = 0
    for content, size in zip(contents, sizes, strict=True):
        expected = table.slice(start, size)
        start += size
        assert pq.read_table(pa.py_buffer(content)).equals(expected)
        assert pl.read_parquet(content).to_dicts() == expected.to_pylist()


@pytest.mark.parametrize("n", [1, 7, 8, 9, FEW_ROWS, 20 * FEW_ROWS])
def test_duckdb_reads_them_in_one_glob_with_others(n, tmp_path):
    record = {"name": "n", "index": 3, "note": None, "score": 0.5, "count": -1, "indices": [1, 2**32 - 1]}
    records = [
        record | {"name": "é" * (i % 3), "values": [1.5] * (i % 4), "halves": [0.5] * (i % 2)}
        for i in range(n)
    ]
    records[0] |= {"note": "x" * 100_000, "score": None, "indices": []}
    (content,), table = encoded(records, [n])
    (tmp_path / "small.parquet").write_bytes(content)
    pq.write_table(table, tmp_path / "general.parquet")
    found = duckdb.sql(f"SELECT * FROM '{tmp_path}/*.parquet' ORDER BY filename, file_row_number")
    expected = [tuple(row.values()) for row in table.to_pylist()]
    assert found.fetchall() == 2 * expected


def test_metadata_is_what_a_general_writer_says():
    records = [
        {"name": "a", "index": 1, "note": None, "score": 1.0, "count": 2, "indices": [], "values": [1.0]}
    ]
    (content,), table = encoded([records[0] | {"halves": []}], [1])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False, store_schema=False)
    ours, general = (pq.ParquetFile(pa.py_buffer(file)) for file in (content, sink.getvalue()))
    assert ours.schema.equals(general.schema)
    assert ours.schema_arrow.equals(general.schema_arrow)
    for c in range(ours.metadata.num_columns):
        a, b = (file.metadata.row_group(0).column(c) for file in (ours, general))
        assert (a.num_values, a.physical_type, a.path_in_schema) == (
            b.num_values,
            b.physical_type,
            b.path_in_schema,
        )


@pytest.mark.parametrize(
    ("samples", "codec"), [(1, "UNCOMPRESSED"), (FEW_ROWS, "UNCOMPRESSED"), (FEW_ROWS + 1, "ZSTD")]
)
def test_a_few_rows_are_not_worth_compressing_and_many_are(samples, codec, tmp_path):
    writer = open_writer(tmp_path / "unit")
    writer.write_part(finish(make_part(0, 0, samples, last=True)))
    writer.write()
    metadata = pq.read_metadata(tmp_path / "unit/metrics.parquet")
    assert metadata.row_group(0).column(0).compression == codec
