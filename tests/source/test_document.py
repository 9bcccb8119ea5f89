"""The framing of JSON documents in chunks, against a slow reader of whole documents."""

from __future__ import annotations

import itertools
import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from daemon.errors import FileError
from daemon.source.formats import framing
from daemon.source.formats.document import DocumentFramer
from daemon.source.formats.framing import RecordFramer
from daemon.source.formats.lines import RECORD_SEPARATOR, LineSplitter
from daemon.source.parsing import BRACKETS, TOKEN, Place, RawRecord
from tests.support.effort import examples

MANY = 1 << 30
DECODER = json.JSONDecoder(strict=False)
WHITESPACE = re.compile(r"[ \t\r\n]*")
WORD = re.compile(r'[^,\[\]{}" \t\r\n]+')


@dataclass(frozen=True, slots=True)
class Reading:
    """The records of a document, and the error that ended it."""

    records: tuple[RawRecord, ...]
    reason: str | None
    message: str | None


def reading(records: Iterable[RawRecord]) -> Reading:
    found: list[RawRecord] = []
    try:
        found.extend(records)  # keeps what came before an error
    except FileError as error:
        return Reading(tuple(found), error.reason, str(error))
    return Reading(tuple(found), None, None)


def framed(
    chunks: Iterable[bytes], max_record_bytes: int = MANY, framer: framing.Framer | None = None
) -> Iterator[RawRecord]:
    """The records that a framer finds, by default one of documents whose lists are under `samples`."""
    framer = DocumentFramer(max_record_bytes, list_key="samples") if framer is None else framer
    for chunk in chunks:
        yield from framer.feed(chunk)
    yield from framer.finish()


def pieces(content: bytes, cuts: Iterable[int]) -> list[bytes]:
    """The content cut at some places."""
    places = [0, *sorted(cuts), len(content)]
    return [content[start:end] for start, end in itertools.pairwise(places)]


class WholeDocument:
    """The oracle: a cursor over whole documents as text, which asks `json` where values end."""

    def __init__(self, content: bytes, max_record_bytes: int) -> None:
        self._text = content.decode("utf-8", "surrogateescape")
        self._max = max_record_bytes
        self._marks: list[int] = []  # places of byte-order marks between documents
        self._at = 0
        self._index = 0

    def records(self) -> Iterator[RawRecord]:
        before = ""
        while opening := self._next(before):
            start = self._at
            if opening == "[":
                yield from self._elements()
                before = "list"
            elif opening == "{" and self._enter_samples():
                yield from self._elements()
                self._leave_object()
                before = "list"
            elif opening == "{" or (before == "record" and opening not in "]}:,"):
                self._at = start
                yield self._record(self._end_of_value())
                before = "record"
            elif before:
                raise self._malformed("expected nothing after the end")
            else:
                raise self._malformed("expected an array of records, or an object")

    def _next(self, before: str) -> str:
        """Skip what may stand between documents; what the next one begins with."""
        if self._peek() == "," and before == "record":
            self._at += 1
        while self._peek() in ("\ufeff", "\udcef"):
            if self._text[self._at] == "\udcef":  # the beginning of a mark, or of nothing
                raise self._malformed("expected an array of records, or an object")
            self._marks.append(self._at)
            self._at += 1
        return self._peek()

    def _elements(self) -> Iterator[RawRecord]:
        self._at += 1
        if self._peek() == "]":
            self._at += 1
            return
        while True:
            self._peek()
            yield self._record(self._end_of_value())
            mark = self._peek()
            if mark not in (",", "]"):
                raise self._malformed("expected a comma or the end of the array")
            self._at += 1
            if mark == "]":
                return

    def _enter_samples(self) -> bool:
        self._at += 1
        while self._peek() == '"':
            key = self._key()
            if self._peek() == "[" and key == "samples":
                return True
            self._at = self._end_of_value()
            if self._peek() != ",":
                break
            self._at += 1
        return False

    def _key(self) -> str:
        end = self._end_by_brackets()
        raw, self._at = self._text[self._at : end], end
        if self._peek() != ":":
            raise self._malformed("expected a colon")
        self._at += 1
        try:
            return str(DECODER.decode(raw))
        except ValueError:
            return ""

    def _leave_object(self) -> None:
        while self._peek() == ",":
            self._at += 1
            if self._peek() != '"':
                raise self._malformed("expected a key")
            if self._key() == "samples":
                raise self._malformed("the key 'samples' comes twice")
            self._peek()
            self._at = self._end_of_value()
        if self._peek() != "}":
            raise self._malformed("expected a comma or the end of the object")
        self._at += 1

    def _record(self, end: int) -> RawRecord:
        before = self._text[: self._at]
        text = self._text[self._at : end]
        place = Place(self._index, before.count("\n") + 1, len(as_bytes(before)))
        self._index += 1
        self._at = end
        return RawRecord(place, text if len(as_bytes(text)) <= self._max else None)

    def _end_of_value(self) -> int:
        if self._at == len(self._text):
            raise self._malformed("the file ends in the middle: it may be truncated")
        if self._text[self._at] not in '"[{':
            word = WORD.match(self._text, self._at)
            if word is None:
                raise self._malformed("expected a value")
            return word.end()
        try:
            return DECODER.raw_decode(self._text, self._at)[1]
        except (ValueError, RecursionError):
            return self._end_by_brackets()

    def _end_by_brackets(self) -> int:
        depth = 0
        for match in TOKEN.finditer(self._text, self._at):
            depth += BRACKETS.get(match[0], 0)
            if match["close"] == "":
                break
            if depth <= 0:
                return match.end()
        raise self._malformed("the file ends in the middle: it may be truncated")

    def _peek(self) -> str:
        match = WHITESPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return self._text[self._at : self._at + 1]

    def _malformed(self, why: str) -> FileError:
        before = self._text[: self._at]
        start = before.rfind("\n") + 1
        column = sum(byte & 0xC0 != 0x80 for byte in as_bytes(before[start:])) + 1
        column -= sum(start <= mark < self._at for mark in self._marks)
        line = before.count("\n") + 1
        return FileError(
            "malformed_json", f"not valid JSON at line {line}, column {column}: {why}: export it again"
        )


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


@pytest.fixture
def every_cut_counts(monkeypatch):
    """Lets the layout be told by a few bytes, so that chunks end within and after them."""
    monkeypatch.setattr(framing, "PROBE_BYTES", 3)


SCALARS = st.one_of(
    st.text(max_size=6),
    st.integers(),
    st.sampled_from([None, True, 1.5, "\\", '"', "[", "}", "\n", "é", "😀", "samples"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["a", "samples", 'q"']), inner)
    ),
    max_leaves=15,
)
RECORDS = st.lists(VALUES, max_size=6)
DOCUMENTS = st.one_of(
    RECORDS,
    VALUES,
    st.builds(lambda before, records, after: {**before, "samples": records, **after},
              st.dictionaries(st.sampled_from("ab"), VALUES),
              RECORDS,
              st.dictionaries(st.sampled_from("cd"), VALUES)),
)  # fmt: skip
WRITTEN = st.builds(
    lambda values, ascii_only, indent, mark, between: between.join(
        mark + json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
        for value in values
    ),
    st.lists(DOCUMENTS, min_size=1, max_size=3),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
    st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\x1e"]),
    st.sampled_from([b"", b"\n", b"\r\n", b",\n", b" , ", b"\n\n", b"\r"]),
)
PIECES = [b'"', b"\\", b"[", b"]", b"{", b"}", b",", b":", b"\n", b" ", b"1", b"nul", b"\xc3", b"\xa9", b"\0"]
PIECES += [b"\xef\xbb\xbf", b"\xef", b"\xef\xbb", b"\x1e", b'{"a":1}\n', b'{"a":1}', b"[{", b"}{", b"},"]
PIECES += [b'"a"', b'"samples"', b'"samples":[', b'\\"', b'[{"a":[1]},']
JSONISH = st.lists(st.sampled_from(PIECES), max_size=40).map(b"".join)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A document with a few stretches replaced."""
    content = draw(WRITTEN)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 4)))
        content = content[:start] + draw(st.sampled_from([b"", *PIECES])) + content[end:]
    return content


@settings(
    deadline=None, max_examples=examples(1000), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.one_of(WRITTEN, damaged(), JSONISH),
    cuts=st.lists(st.integers(0, 400), max_size=30),
    max_record_bytes=st.one_of(st.just(MANY), st.integers(0, 40)),
)
@example(content=b'{"a": x"y, "samples": [1]}', cuts=[], max_record_bytes=MANY)
@example(content=b'{"s\\u0061mples": [1, 2]}', cuts=[], max_record_bytes=MANY)
@example(content=b'{"samples": [1], "s\\u0061mples": [2]}', cuts=[20], max_record_bytes=MANY)
@example(content=b'["\\', cuts=[3], max_record_bytes=MANY)
@example(content=b'["\\\\", "\\""]', cuts=[3, 9], max_record_bytes=MANY)
@example(content=b"[12", cuts=[2], max_record_bytes=MANY)
@example(content=b"[[[[[[[1]]]]]],[2]]]", cuts=[6, 12], max_record_bytes=MANY)
@example(content=b'\xef\xbb\xbf{"a": 1}\xef\xbb\xbf[1', cuts=[10, 12], max_record_bytes=MANY)
@example(content=b'{"a": 1}, {"b": 2},\n"c" null ,', cuts=[8, 9], max_record_bytes=MANY)
def test_every_cut_of_every_document_reads_as_the_whole_one(content, cuts, max_record_bytes):
    expected = reading(WholeDocument(content, max_record_bytes).records())
    chunks = pieces(content, (cut for cut in cuts if cut < len(content)))
    for way in (chunks, [content], [bytes([byte]) for byte in content]):
        assert reading(framed(way, max_record_bytes)) == expected


@settings(
    deadline=None, max_examples=examples(1000), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    content=st.one_of(WRITTEN, damaged(), JSONISH),
    cuts=st.lists(st.integers(0, 400), max_size=30),
    max_record_bytes=st.one_of(st.just(MANY), st.integers(0, 40)),
    named_lines=st.booleans(),
    recipe=st.sampled_from([{"a"}, {"text"}, {"samples", "c"}]),
)
@example(b'{"a":1}{"a":1}\n{"a":1},\r\n', [8, 9, 17], MANY, True, {"a"})
@example(b'\x1e{"a":\n1}\n\x1e\n\n{"a":1}', [1, 12], MANY, True, {"a"})
def test_every_cut_of_every_content_reads_as_the_whole_one(
    every_cut_counts, content, cuts, max_record_bytes, named_lines, recipe
):
    def read(chunks: list[bytes]) -> Reading:
        framer = RecordFramer(max_record_bytes, named_lines=named_lines, recipes=[frozenset(recipe)])
        return reading(framed(chunks, framer=framer))

    expected = read([content])
    assert expected.reason in (None, "malformed_json", "no_usable_record", "binary", "unsupported_encoding")
    chunks = pieces(content, (cut for cut in cuts if cut < len(content)))
    for way in (chunks, [bytes([byte]) for byte in content]):
        assert read(way) == expected
    places = [record.place for record in expected.records]
    assert [place.record_index for place in places] == list(range(len(places)))
    assert [place.byte_offset for place in places] == sorted({place.byte_offset for place in places})
    for record in expected.records:
        assert record.place.line == content.count(b"\n", 0, record.place.byte_offset) + 1
        if record.text is not None:
            assert content[record.place.byte_offset :].startswith(as_bytes(record.text))


@settings(deadline=None, max_examples=examples(300))
@given(
    content=st.one_of(JSONISH, WRITTEN),
    cuts=st.lists(st.integers(0, 400), max_size=30),
    max_record_bytes=st.one_of(st.just(MANY), st.integers(0, 40)),
    separator=st.sampled_from([b"\n", RECORD_SEPARATOR]),
)
def test_no_line_is_lost_wherever_the_cut(content, cuts, max_record_bytes, separator):
    chunks = pieces(content, (cut for cut in cuts if cut < len(content)))
    found = reading(framed(chunks, framer=LineSplitter(max_record_bytes, separator)))
    assert found == reading(framed([content], framer=LineSplitter(max_record_bytes, separator)))
    at = 0
    for line in content.split(separator):
        inside = [one for one in found.records if at <= one.place.byte_offset <= at + len(line)]
        if len(line) > max_record_bytes:
            assert [one.text for one in inside] == [None]
        elif separator == RECORD_SEPARATOR and line.strip(b" \t\r\n\v\f\xef\xbb\xbf"):
            assert inside
        at += len(line) + 1
    if separator == b"\n" and max_record_bytes == MANY:  # then a record may have several lines
        left = bytearray(content)
        for one in reversed(found.records):
            start = one.place.byte_offset
            del left[start : start + len(as_bytes(one.text or ""))]
        assert not left.strip(b" \t\r\n\v\f\x1e\xef\xbb\xbf[],")


@settings(
    deadline=None, max_examples=examples(500), suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    records=st.lists(
        st.dictionaries(st.sampled_from(["a", "b"]), VALUES, min_size=1), min_size=2, max_size=8
    ),
    data=st.data(),
)
def test_objects_and_arrays_of_them_are_read_in_any_print(records, data):
    pieces_of: list[str] = []
    at = 0
    while at < len(records):
        n = data.draw(st.sampled_from([1, 1, 2, 3]))
        value = records[at : at + n] if n > 1 or data.draw(st.booleans()) else records[at]
        at += n
        pieces_of.append(json.dumps(value, indent=data.draw(st.sampled_from([None, 0, 2]))))
    between = data.draw(st.sampled_from(["\n", "\r\n", "\n\n", ",\n", ""]))
    content = between.join(pieces_of).encode()
    for way in ([content], [bytes([byte]) for byte in content]):
        found = list(framed(way, framer=LineSplitter(MANY)))
        assert [json.loads(one.text or "") for one in found] == records
        assert [one.place.line for one in found] == [
            content.count(b"\n", 0, one.place.byte_offset) + 1 for one in found
        ]


@settings(deadline=None)
@given(records=RECORDS, indent=st.sampled_from([None, 1]))
def test_the_records_of_a_valid_array_are_its_elements(records, indent):
    content = json.dumps(records, indent=indent, ensure_ascii=False).encode("utf-8", "surrogatepass")
    found = list(framed([content]))
    assert [record.place.record_index for record in found] == list(range(len(records)))
    for record, value in zip(found, records, strict=True):
        assert record.text is not None
        raw = as_bytes(record.text)
        assert json.loads(raw.decode("utf-8", "surrogatepass")) == value
        assert content[record.place.byte_offset :].startswith(raw)
        assert record.place.line == content[: record.place.byte_offset].count(b"\n") + 1


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('[1 2]', "line 1, column 4: expected a comma or the end of the array"),
        ('[1,\n]', "line 2, column 1: expected a value"),
        ('["é",\n"éé" x]', "line 2, column 6: expected a comma or the end of the array"),
        ('[1]\n\n x', "line 3, column 2: expected nothing after the end"),
        ('[1, {"a": [', "line 1, column 5: the file ends in the middle"),
        ('[1,', "line 1, column 4: the file ends in the middle"),
        ('{"a": "b"', "line 1, column 1: the file ends in the middle"),
        ('{"a" 1}', "line 1, column 6: expected a colon"),
        ('{"samples": [1] 2}', "line 1, column 17: expected a comma or the end of the object"),
        ('{"samples": [1], "samples": [2]}', "line 1, column 28: the key 'samples' comes twice"),
        ('{"samples": [1], 2}', "line 1, column 18: expected a key"),
        ('{"samples": [1], "x": [', "line 1, column 23: the file ends in the middle"),
        ("hello", "line 1, column 1: expected an array of records, or an object"),
    ],
)  # fmt: skip
def test_damage_is_named_with_its_place_wherever_the_cut(content, why):
    raw = content.encode()
    for cut in range(len(raw)):
        result = reading(framed(pieces(raw, [cut])))
        assert result.reason == "malformed_json"
        assert result.message.startswith(f"not valid JSON at {why}")


def test_records_come_before_the_document_ends():
    framer = DocumentFramer(MANY)
    chunk = b'{"text": "a"},' * 1000
    assert len(list(framer.feed(b"[" + chunk))) == 1000
    assert len(list(framer.feed(chunk + b'{"tex'))) == 1000
    assert [record.place for record in framer.feed(b't": 1},')] == [Place(2000, 1, 28_001)]


@pytest.mark.parametrize("step", [1, 1000, 20_000])
def test_a_binary_file_is_recognised_before_any_record(step):
    content = b'["a",' * 1000 + b"\0" + b'"b",' * 2000
    chunks = pieces(content, range(step, len(content), step))
    framer = RecordFramer(MANY, named_lines=False, recipes=[frozenset({"text"})])
    assert reading(framed(chunks, framer=framer)) == Reading(
        (), "binary", "the file is binary, not JSON text: save it as UTF-8 JSON"
    )


MEGABYTE = b"x" * (1 << 20)


def large_string() -> Iterator[bytes]:
    yield b'"'
    for _ in range(48):
        yield MEGABYTE
    yield b'"'


def large_array() -> Iterator[bytes]:
    yield b"["
    for _ in range(48):
        yield b'"\\"",[{"a":1}],' * 80_000
    yield b"1]"


@pytest.mark.parametrize("large", [large_string, pytest.param(large_array, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (b'[{"a": ', b"}, 2]", [None, "2"]),
        (b'{"samples": [{"a": ', b"}, 2]}", [None, "2"]),
        (b'{"skipped": ', b', "samples": [1, 2]}', ["1", "2"]),
        (b'{"samples": [1, 2], "skipped": ', b"}", ["1", "2"]),
        (b'{"a": ', b', "b": 1}', [None]),
        (b"{", b': 1, "b": 1}', [None]),
    ],
)
def test_what_is_too_large_is_not_held_in_memory(large, before, after, expected):
    tracemalloc.start()
    try:
        texts = [record.text for record in framed(joined(before, large(), after), 2 << 20)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert texts == expected
    assert peak < 16 << 20


def joined(before: bytes, large: Iterator[bytes], after: bytes) -> Iterator[bytes]:
    yield before
    yield from large
    yield after


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        b"[",
        b"[{",
        b"[a",
        b'["',
        b'"\\"',
        b'"",',
        b"{}{",
        b"[[[[]",
        b"[[[[]]]],",
        b'{"":',
        b'"":1,',
        b"\n",
        b"a,",
    ],
)
def test_no_input_takes_longer_than_its_length(unit):
    # what took the square of it would meet the timeout of a test
    for opening in (b"[", b"{", b'{"a":', b'{"samples":[', b'["'):
        content = opening + unit * (100_000 // len(unit))
        for step in (len(content), 997):
            chunks = pieces(content, range(step, len(content), step))
            reading(framed(chunks, 1 << 20))
        for named_lines in (True, False):
            framer = RecordFramer(1 << 20, named_lines=named_lines, recipes=[frozenset({"text"})])
            reading(framed(chunks, framer=framer))


@pytest.mark.slow
@pytest.mark.parametrize(
    "unit",
    [
        b"[\n",
        b"[{},\n",
        b'{"a":\n',
        b'{"a":[\n',
        b'[{"a":1,\n',
        b"{},\n",
        b"[1\n",
        b"{\n}\n]\n",
        b'{"a":[{},\n{"b":\n',
    ],
)
def test_no_lines_that_go_on_take_longer_than_their_length(unit):
    for opening in (b"[", b"{"):
        content = opening + unit * (100_000 // len(unit))
        for max_record_bytes in (1 << 20, 5000):
            reading(
                framed(pieces(content, range(997, len(content), 997)), framer=LineSplitter(max_record_bytes))
            )
