from __future__ import annotations

import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon.sink.parquet import ParquetFile
from daemon.sink.schema import features_options, features_schema
from daemon.sink.writer import FEATURES_GROUP_BYTES

TABLE = pa.table({"x": pa.array(range(10), pa.int64())})


def open_file(path, group_tables: float) -> ParquetFile:
    return ParquetFile(path, TABLE.schema, group_bytes=int(TABLE.nbytes * group_tables), options={})


def group_rows(path) -> list[int]:
    metadata = pq.read_metadata(path)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def test_row_groups_are_of_a_steady_size_and_the_rest_goes_last(tmp_path):
    file = open_file(tmp_path / "t.parquet", group_tables=2)
    for _ in range(5):
        file.append(TABLE)
    written = (tmp_path / "t.parquet").stat
    totals = file.close()
    assert (totals.name, totals.rows, totals.bytes) == ("t.parquet", 50, written().st_size)
    assert group_rows(tmp_path / "t.parquet") == [20, 20, 10]


def test_a_large_table_stays_one_row_group(tmp_path):
    file = open_file(tmp_path / "t.parquet", group_tables=0.5)
    file.append(TABLE)
    file.append(TABLE)
    file.close()
    assert group_rows(tmp_path / "t.parquet") == [10, 10]


def test_what_is_gathered_is_written_without_a_copy(tmp_path, monkeypatch):
    write, allocated = pq.ParquetWriter.write_table, []

    def watched(self: pq.ParquetWriter, table: pa.Table, **options: object) -> None:
        allocated.append(pa.total_allocated_bytes())
        write(self, table, **options)

    monkeypatch.setattr(pq.ParquetWriter, "write_table", watched)
    tables = [pa.table({"x": np.arange(100_000) + number}) for number in range(10)]
    held = sum(table.nbytes for table in tables)
    file = ParquetFile(tmp_path / "t.parquet", tables[0].schema, group_bytes=2 * held, options={})
    for table in tables:
        file.append(table)
    before = pa.total_allocated_bytes()
    file.close()
    assert group_rows(tmp_path / "t.parquet") == [1_000_000]
    assert allocated[0] - before < held / 2


def test_discarded_content_is_not_written(tmp_path):
    file = open_file(tmp_path / "t.parquet", group_tables=2)
    file.append(TABLE)
    file.discard()
    file.discard()
    assert (tmp_path / "t.parquet").read_bytes() == b""


def test_a_folder_whose_name_is_not_utf8_is_fine(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    file = open_file(folder / "t.parquet", group_tables=2)
    file.append(TABLE)
    file.close()
    assert pq.read_table(pa.py_buffer((folder / "t.parquet").read_bytes())).equals(TABLE)


@pytest.mark.parametrize(("values", "most"), [("float32", 5.5), ("float16", 3.5)])
def test_an_activation_takes_few_bytes_and_comes_back_as_it_was(values, most, tmp_path):
    """At the density of the bundled dictionaries; magnitudes are random, the worst that compression meets."""
    chance = np.random.Generator(np.random.PCG64(0))
    rows, d_sae, l0 = 3000, 2304, 65
    schema = features_schema(values)
    indices = np.sort(chance.permuted(np.tile(np.arange(d_sae), (rows, 1)), axis=1)[:, :l0], axis=1)
    magnitudes = chance.lognormal(0, 1, (rows, l0)).astype(values)
    table = pa.table(
        {
            "sample_id": [f"s{row // 3}" for row in range(rows)],
            "record_index": np.arange(rows) // 3,
            "text": ["text"] * rows,
            "sae": ["l7", "l15", "l22"] * (rows // 3),
            "layer": pa.array([7, 15, 22] * (rows // 3), pa.int32()),
            "hook_name": ["blocks.7.hook_resid_post"] * rows,
            "position": pa.array([9] * rows, pa.int32()),
            "token_id": pa.array(chance.integers(0, 49152, rows), pa.int32()),
            "indices": list(indices.astype(np.uint32)),
            "values": list(magnitudes),
        },
        schema=schema,
    )
    file = ParquetFile(
        tmp_path / "f", schema, group_bytes=FEATURES_GROUP_BYTES, options=features_options(values)
    )
    file.append(table)
    assert file.close().bytes <= most * rows * l0
    assert pq.read_table(tmp_path / "f").equals(table)


@pytest.mark.parametrize(("parts", "compression"), [(1, "UNCOMPRESSED"), (4, "UNCOMPRESSED"), (8, "ZSTD")])
def test_a_file_is_small_by_all_its_rows_not_by_those_of_its_first_row_group(tmp_path, parts, compression):
    path = tmp_path / "t.parquet"
    options = {"compression": "zstd", "compression_level": 3}
    file = ParquetFile(path, TABLE.schema, group_bytes=TABLE.nbytes * 6, options=options)
    for _ in range(parts):
        file.append(TABLE)
    file.close()
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(i).column(0).compression for i in range(metadata.num_row_groups)]
    assert set(groups) == {compression}
    assert metadata.num_rows == 10 * parts
