from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon.analysis.columns import analysis_columns
from daemon.recipes import CHAT_RECIPE, CONTRAST_RECIPE, PLAIN_RECIPE
from daemon.sink.parquet import SMALL_ROWS
from daemon.sink.schema import Layout, features_schema, metrics_schema, stored_columns, texts_schema
from tests.support.handmade import finish, make_part, open_writer, store


@pytest.mark.parametrize("recipe", [CONTRAST_RECIPE, PLAIN_RECIPE])
def test_metrics_are_the_record_then_the_analysis_columns(recipe):
    schema = metrics_schema(("l7", "l15"), recipe)
    names = ["sample_id", "record_index", "domain", "complexity", "extra"]
    assert schema.names == names + [column.name for column in analysis_columns(("l7", "l15"), recipe)]
    assert schema.field("record_index").type == pa.int64()
    for column in analysis_columns(("l7", "l15"), recipe):
        expected = {"int": pa.int32(), "float": pa.float64(), "class": pa.string()}[column.kind]
        assert schema.field(column.name).type == expected
        assert schema.field(column.name).nullable == (column.kind == "float")


def test_features_are_the_columns_of_the_contract():
    fields = {field.name: field.type for field in features_schema("float32")}
    assert fields == {
        "sample_id": pa.string(),
        "record_index": pa.int64(),
        "text": pa.string(),
        "sae": pa.string(),
        "layer": pa.int32(),
        "hook_name": pa.string(),
        "position": pa.int32(),
        "token_id": pa.int32(),
        "indices": pa.list_(pa.uint32()),
        "values": pa.list_(pa.float32()),
    }
    assert features_schema("float16").field("values").type == pa.list_(pa.float16())


def test_texts_are_the_columns_of_the_contract():
    fields = {
        "sample_id": pa.string(),
        "record_index": pa.int64(),
        "text": pa.string(),
        "content": pa.string(),
        "token_ids": pa.list_(pa.int32()),
        "token_starts": pa.list_(pa.int32()),
    }
    assert {field.name: field.type for field in texts_schema(chats=False)} == fields
    roles = {"token_roles": pa.list_(pa.string())}
    assert {field.name: field.type for field in texts_schema(chats=True)} == fields | roles
    nullable = {field.name for field in texts_schema(chats=True) if field.nullable}
    assert nullable == {"token_starts", "token_roles"}


def test_every_field_says_what_it_is():
    schemas = metrics_schema(("l7",), CONTRAST_RECIPE), features_schema("float32"), texts_schema(chats=True)
    for schema in schemas:
        assert all(field.metadata[b"description"] for field in schema)
    schema = metrics_schema(("l7",), CONTRAST_RECIPE)
    assert schema.field("axis_twist_diff").metadata == {
        b"unit": b"degree",
        b"description": b"axis_twist_hall - axis_twist_fact",
    }
    assert schema.field("stability_diff").metadata[b"description"] == b"stability_fact - stability_hall"


@pytest.mark.parametrize("rows", [1, SMALL_ROWS, SMALL_ROWS + 1])
@pytest.mark.parametrize("values", ["float32", "float16"])
def test_columns_are_encoded_as_meant(tmp_path, values, rows):
    features, metrics = both(tmp_path / "unit", rows, values)
    assert features["indices.list.element"] == features["values.list.element"] == {"PLAIN", "RLE"}
    assert "RLE_DICTIONARY" in features["sample_id"]
    assert "RLE_DICTIONARY" in metrics["l5_hall_shape_class"]
    assert "RLE_DICTIONARY" not in metrics["l5_hall_gini"]
    for path in ("features", "metrics"):
        file = tmp_path / f"unit/{path}.parquet"
        columns = columns_of(file)
        small = pq.read_metadata(file).num_rows <= SMALL_ROWS
        assert {column.compression for column in columns} == {"UNCOMPRESSED" if small else "ZSTD"}
        assert all(column.is_stats_set for column in columns)


@pytest.mark.parametrize("values", ["float32", "float16"])
@pytest.mark.parametrize("recipe", [CONTRAST_RECIPE, PLAIN_RECIPE], ids=["contrast", "plain"])
@pytest.mark.parametrize("rows", [0, 1, 64, 3000])
def test_only_encodings_that_every_reader_knows_are_used(tmp_path, rows, recipe, values):
    """Byte streams, deltas and pages of the second version are beyond readers of the last years."""
    for encodings in both(tmp_path / "unit", rows, values, recipe):
        assert set().union(*encodings.values()) <= {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}


@pytest.mark.parametrize("rows", [1, SMALL_ROWS + 1])
def test_texts_are_encoded_as_meant(tmp_path, rows):
    writer = open_writer(tmp_path / "unit", CHAT_RECIPE)
    store(writer, finish(make_part(0, 0, rows, last=True, recipe=CHAT_RECIPE)))
    writer.write()
    columns = encodings(tmp_path / "unit/texts.parquet")
    assert set().union(*columns.values()) <= {"PLAIN", "RLE", "RLE_DICTIONARY", "PLAIN_DICTIONARY"}
    repeated = {name for name, kinds in columns.items() if "RLE_DICTIONARY" in kinds}
    assert repeated == {"sample_id", "record_index", "text", "token_roles.list.element"}


def test_what_is_stored_of_texts_is_a_part_of_a_units_identity():
    recipes = CONTRAST_RECIPE, CHAT_RECIPE
    without = stored_columns(("l7",), recipes, Layout(texts=False))
    assert stored_columns(("l7",), recipes, Layout())[: len(without)] == without
    names = [[name for name, _ in columns] for columns in stored_columns(("l7",), recipes, Layout())]
    assert ["token_roles" in columns for columns in names[len(without) :]] == [False, True]


def both(folder, rows, values, recipe=CONTRAST_RECIPE) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The encodings of each leaf column of an output's features and metrics."""
    rejected = () if rows else (0,)
    writer = open_writer(folder, recipe, values=values)
    store(writer, finish(make_part(0, 0, rows or 1, rejected=rejected, last=True, recipe=recipe)))
    writer.write()
    return encodings(folder / "features.parquet"), encodings(folder / "metrics.parquet")


def encodings(path) -> dict[str, set[str]]:
    return {column.path_in_schema: set(column.encodings) for column in columns_of(path)}


def columns_of(path) -> list[pq.ColumnChunkMetaData]:
    metadata = pq.read_metadata(path)
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return [group.column(number) for group in groups for number in range(group.num_columns)]


def test_columns_lie_text_by_text_and_metric_by_metric():
    names = [column.name for column in analysis_columns(("l7",), CONTRAST_RECIPE)]
    assert names[:4] == ["n_tokens_prompt", "n_tokens_fact", "n_tokens_hall", "l7_prompt_l0_norm"]
    assert names[-17:] == [
        "centroid_drift_fact",
        "centroid_drift_hall",
        "centroid_drift_diff",
        "axis_twist_fact",
        "axis_twist_hall",
        "axis_twist_diff",
        "stability_fact",
        "stability_fact_std",
        "stability_hall",
        "stability_hall_std",
        "stability_diff",
        "entropy_fact",
        "entropy_hall",
        "entropy_diff",
        "cross_layer_consistency_fact",
        "cross_layer_consistency_hall",
        "cross_layer_consistency_diff",
    ]
