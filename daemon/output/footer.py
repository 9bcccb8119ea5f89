"""Headers and footers of small Parquet files: what the format asks to be told of pages and columns.

As templates whose numbers are holes, to be filled for many files at a time. Knows nothing about what the
columns mean. Format: parquet.thrift of https://github.com/apache/parquet-format
"""

from __future__ import annotations

import pyarrow as pa

from daemon.output.thrift import BINARY, I32, I64, LIST, STRUCT, Field, Hole

# The numbers of parquet.thrift.
DATA_PAGE, PLAIN, RLE, UNCOMPRESSED = 0, 0, 3, 0
REQUIRED, OPTIONAL, REPEATED = 0, 1, 2
BYTE_ARRAY, FIXED_LEN_BYTE_ARRAY = 6, 7
UTF8, CONVERTED_LIST, UINT_32 = 0, 3, 13  # converted types
LOGICAL_FLOAT16 = 15
PHYSICAL = {
    pa.int32(): 1,
    pa.uint32(): 1,
    pa.int64(): 2,
    pa.float32(): 4,
    pa.float64(): 5,
    pa.string(): BYTE_ARRAY,
    pa.float16(): FIXED_LEN_BYTE_ARRAY,
}
CONVERTED = {pa.string(): UTF8, pa.uint32(): UINT_32}


def page_header() -> list[Field]:
    """`PageHeader` of parquet.thrift."""
    data_page = [
        Field(1, I32, Hole("values")),
        Field(2, I32, PLAIN),
        Field(3, I32, RLE),
        Field(4, I32, RLE),
    ]
    return [
        Field(1, I32, DATA_PAGE),
        Field(2, I32, Hole("page_bytes")),  # uncompressed
        Field(3, I32, Hole("page_bytes")),
        Field(5, STRUCT, data_page),
    ]


def file_metadata(schema: pa.Schema) -> list[Field]:
    """`FileMetaData` of parquet.thrift, of one row group."""
    root = [Field(4, BINARY, "schema"), Field(5, I32, len(schema))]
    elements = [element for field in schema for element in schema_elements(field)]
    row_group = [
        Field(1, LIST, [column_chunk(field) for field in schema], STRUCT),
        Field(2, I64, Hole("all_bytes")),
        Field(3, I64, Hole("rows")),
    ]
    return [
        Field(1, I32, 1),  # the format's version
        Field(2, LIST, [root, *elements], STRUCT),
        Field(3, I64, Hole("rows")),
        Field(4, LIST, [row_group], STRUCT),
        Field(6, BINARY, "lensd"),
    ]


def schema_elements(field: pa.Field) -> list[list[Field]]:
    """A column, or a group of a repeated group of a column for a list."""
    repetition = OPTIONAL if field.nullable else REQUIRED
    if not pa.types.is_list(field.type):
        return [leaf(field.name, field.type, repetition)]
    lists = [
        Field(3, I32, repetition),
        Field(4, BINARY, field.name),
        Field(5, I32, 1),
        Field(6, I32, CONVERTED_LIST),
    ]
    repeated = [Field(3, I32, REPEATED), Field(4, BINARY, "list"), Field(5, I32, 1)]
    return [lists, repeated, leaf("element", field.type.value_type, OPTIONAL)]


def leaf(name: str, kind: pa.DataType, repetition: int) -> list[Field]:
    element = [Field(1, I32, PHYSICAL[kind])]
    if pa.types.is_float16(kind):
        element.append(Field(2, I32, 2))  # bytes
    element += [Field(3, I32, repetition), Field(4, BINARY, name)]
    if kind in CONVERTED:
        element.append(Field(6, I32, CONVERTED[kind]))
    if pa.types.is_float16(kind):
        element.append(Field(10, STRUCT, [Field(LOGICAL_FLOAT16, STRUCT, [])]))
    return element


def column_chunk(field: pa.Field) -> list[Field]:
    nested = pa.types.is_list(field.type)
    metadata = [
        Field(1, I32, PHYSICAL[field.type.value_type if nested else field.type]),
        Field(2, LIST, [PLAIN, RLE], I32),
        Field(3, LIST, [field.name, *(("list", "element") if nested else ())], BINARY),
        Field(4, I32, UNCOMPRESSED),
        Field(5, I64, Hole("values")),
        Field(6, I64, Hole("chunk_bytes")),  # uncompressed
        Field(7, I64, Hole("chunk_bytes")),
        Field(9, I64, Hole("chunk_at")),
    ]
    return [Field(2, I64, 0), Field(3, STRUCT, metadata)]  # no place of metadata outside the footer
