"""CSV and TSV: the first row names the columns, each further row is a record.

All fields are text exactly as written, but for `complexity`, which is a number where it is written as JSON
writes one. An empty field is an empty text, quoted or not; in `id`, `domain` and `complexity` it is null.
pyarrow's reader tells neither at which line nor at which byte a row begins, and ends at the first damage.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence

from daemon.errors import FileError, SampleError
from daemon.source.formats.format import Blocks, InputFormat
from daemon.source.formats.rows import Row, RowSplitter
from daemon.source.formats.table import check_columns, record_of
from daemon.source.kinds import BOM, check_text
from daemon.source.limits import ReadLimits
from daemon.source.parsing import Fields, Place, RawRecord, is_record, number_as_written
from daemon.source.stream import InputStream

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")  # as JSON has it
NULL_IF_EMPTY = ("id", "domain", "complexity")
UTF16 = re.compile(rb"(?:[\x09-\x7e]\0){2}|(?:\0[\x09-\x7e]){2}")  # without a mark, as it begins


def read(
    stream: InputStream, limits: ReadLimits, recipes: Sequence[Fields], *, delimiter: str, title: str
) -> Blocks:
    check_beginning(stream.beginning, title)
    reader = RecordReader(delimiter, limits.max_record_bytes, recipes)
    splitter = RowSplitter(delimiter.encode(), limits.max_record_bytes)
    for chunk in stream.chunks():
        yield reader.records(splitter.feed(chunk))
    yield reader.records(splitter.finish())


def check_beginning(head: bytes, title: str) -> None:
    """Raises FileError where the content is no UTF-8 text."""
    if UTF16.match(head):
        raise FileError("unsupported_encoding", "the file is UTF-16 text: save it as UTF-8")
    check_text(head, title)


class RecordReader:
    """Makes records of rows, of which the first is the header."""

    def __init__(self, delimiter: str, max_record_bytes: int, recipes: Sequence[Fields]) -> None:
        self._delimiter = delimiter
        self._max = max_record_bytes
        self._recipes = recipes
        self._columns: list[str] = []  # nothing before the header
        self._special: list[tuple[int, str]] = []  # columns that are not text as it stands
        self._index = 0

    def records(self, rows: Iterator[Row]) -> Iterator[RawRecord]:
        for row in rows:
            if not self._columns:
                self._columns = self._header(row)
                self._special = [
                    (number, name) for number, name in enumerate(self._columns) if name in NULL_IF_EMPTY
                ]
                continue
            place = Place(self._index, row.line, row.byte_offset)
            self._index += 1
            try:
                yield RawRecord(place, self._record(row))
            except SampleError as error:
                yield RawRecord(place, None, error)

    def _record(self, row: Row) -> str | None:
        """The row as JSON, None where it is too large. Raises SampleError where it is malformed."""
        if row.broken:
            raise SampleError(
                "malformed_csv", "has text after the closing quote of a field: double the quotes within it"
            )
        if row.raw is None:
            return None
        fields: list[object] = [*self._fields(row.raw.decode("utf-8", "surrogateescape"))]
        if len(fields) != len(self._columns):
            raise SampleError(
                "malformed_csv",
                f"has {len(fields)} field{'s' * (len(fields) > 1)}, where the header has"
                f" {len(self._columns)}: quote a field that holds {DELIMITERS[self._delimiter]} or newlines",
            )
        for number, name in self._special:
            text = str(fields[number])
            if not text:
                fields[number] = None
            elif name == "complexity" and NUMBER.fullmatch(text):
                fields[number] = number_as_written(text)
        return record_of(self._columns, fields, self._max)

    def _fields(self, row: str) -> list[str]:
        if '"' not in row:
            return row.split(self._delimiter)
        fields: list[str] = []
        field = field_pattern(self._delimiter).match(row)
        while field is not None:
            quoted, unquoted, delimiter = field.groups()
            fields.append(unquoted if quoted is None else quoted.replace('""', '"'))
            field = field.re.match(row, field.end()) if delimiter else None
        return fields

    def _header(self, row: Row) -> list[str]:
        """The names of the columns. Raises FileError where it is no header."""
        if row.raw is None:
            raise FileError(
                "record_too_large",
                "the first row, which names the columns, is larger than inbox.max_record_bytes ="
                f" {self._max}: shorten it",
            )
        try:
            text = row.raw.removeprefix(BOM).decode()
        except UnicodeDecodeError:
            raise FileError("unsupported_encoding", "the first row is not UTF-8: save it as UTF-8") from None
        columns = [] if row.broken else self._fields(text)
        if not is_record(columns, self._recipes):
            self._check_delimiter(text)
        if row.broken:
            raise FileError(
                "malformed_csv", "the first row has text after the closing quote of a name: mend the header"
            )
        check_columns(columns, self._recipes)
        return columns

    def _check_delimiter(self, header: str) -> None:
        found = next((one for one in DELIMITERS if one in header), self._delimiter)
        if self._delimiter in header or found == self._delimiter:
            return
        wanted = DELIMITERS[self._delimiter]
        suffix = {",": ".csv", "\t": ".tsv"}.get(found)
        renamed = f", or name it {suffix}" if suffix else ""
        raise FileError(
            "unsupported_layout",
            f"the first row has {DELIMITERS[found]} and no {wanted}: write the table with {wanted}{renamed}",
        )


@functools.cache
def field_pattern(delimiter: str) -> re.Pattern[str]:
    """A field, quoted or not, and the delimiter after it, if any; possessive, so that no text is slow."""
    one = re.escape(delimiter)
    return re.compile(rf'(?:"([^"]*+(?:""[^"]*+|)*+)"|([^{one}]*+))({one}|\Z)')


CSV = InputFormat("csv", (".csv",), functools.partial(read, delimiter=",", title="CSV"))
TSV = InputFormat("tsv", (".tsv",), functools.partial(read, delimiter="\t", title="TSV"))
