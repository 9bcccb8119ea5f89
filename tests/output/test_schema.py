from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import finish, make_part, open_writer

from daemon.columns import analysis_columns
from daemon.output.schema import features_schema, metrics_schema
from daemon.output.tables import FEW_ROWS
from daemon.records import CONTRAST_RECIPE, PLAIN_RECIPE


@pytest.mark.parametrize("recipe", [CONTRAST_RECIPE, PLAIN_RECIPE])
def test_metrics_are_the_record_then_the_analysis_columns(recipe):
    schema = metrics_schema((7, 15), recipe)
    names = ["sample_id", "record_index", "domain", "complexity", "extra"]
    assert schema.names == names + [column.name for column in analysis_columns((7, 15), recipe)]
    assert schema.field("record_index").type == pa.int64()
    for column in analysis_columns((7, 15), recipe):
        expected = {"int": pa.int32(), "float": pa.float64(), "class": pa.string()}[column.kind]
        assert schema.field(column.name).type == expected
        assert schema.field(column.name).nullable == (column.kind == "float")


def test_features_are_the_columns_of_the_contract():
    fields = {field.name: field.type for field in features_schema("float32")}
    assert fields == {
        "sample_id": pa.string(),
        "record_index": pa.int64(),
        "text": pa.string(),
        "layer": pa.int32(),
        "hook_name": pa.string(),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "indices": pa.list_(pa.uint32()),
        "values": pa.list_(pa.float32()),
    }
    assert features_schema("float16").field("values").type == pa.list_(pa.float16())


def test_every_field_says_what_it_is():
    for schema in (metrics_schema((7,), CONTRAST_RECIPE), features_schema("float32")):
        assert all(field.metadata[b"description"] for field in schema)
    schema = metrics_schema((7,), CONTRAST_RECIPE)
    assert schema.field("axis_twist_diff").metadata == {
        b"unit": b"degree",
        b"description": b"axis_twist_hall - axis_twist_fact",
    }
    assert schema.field("stability_diff").metadata[b"description"] == b"stability_fact - stability_hall"


@pytest.mark.parametrize("values, split", [("float32", True), ("float16", False)])
def test_columns_are_encoded_as_meant(tmp_path, values, split):
    writer = open_writer(tmp_path / "unit", values=values)
    writer.write_part(finish(make_part(0, 0, FEW_ROWS + 1, last=True)))
    writer.write()
    features = encodings(tmp_path / "unit/features.parquet")
    assert "DELTA_BINARY_PACKED" in features["indices.list.element"]
    assert ("BYTE_STREAM_SPLIT" in features["values.list.element"]) == split
    assert "RLE_DICTIONARY" in features["sample_id"]
    metrics = encodings(tmp_path / "unit/metrics.parquet")
    assert "RLE_DICTIONARY" in metrics["l5_hall_shape_class"]
    assert "BYTE_STREAM_SPLIT" in metrics["l5_hall_gini"]


def encodings(path) -> dict[str, tuple[str, ...]]:
    """Of each leaf column; every one compressed with zstd and with statistics."""
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    assert {column.compression for column in columns} == {"ZSTD"}
    assert all(column.is_stats_set for column in columns)
    return {column.path_in_schema: column.encodings for column in columns}
