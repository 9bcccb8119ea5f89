"""Dropped files are read by their content, whatever their name says; others are refused with a remedy."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pandas as pd
import pytest

from daemon.errors import FileError
from daemon.recipes import CONTRAST_RECIPE, Recipe
from daemon.records import Part
from tests.support.sources import LIMITS, parts_of

BOM = b"\xef\xbb\xbf"
RECORDS = [
    {"text": "one", "id": "a", "tags": [{"k": 1}, {"k": 2}]},
    {"text": "two } { ü", "meta": {"x": [1, {"y": "}{"}]}},
    {"text": "three\nlines", "id": 3},
]
TEXTS = [(record["text"],) for record in RECORDS]
PLAIN = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
PRETTY = [json.dumps(record, indent=2) for record in RECORDS]
NAMES = ["f.json", "f.jsonl", "f.ndjson"]

READ = {
    "JSON Lines": "\n".join(PLAIN),
    "JSON Lines, a newline at the end": "\n".join(PLAIN) + "\n",
    "JSON Lines, CRLF": "\r\n".join(PLAIN) + "\r\n",
    "JSON Lines, CR": "\r".join(PLAIN) + "\r",
    "JSON Lines, blank lines": "\n\n \n".join(["", *PLAIN, ""]),
    "JSON Lines, a comma after each": ",\n".join(PLAIN) + ",\n",
    "JSON Lines, a comma between": ",\r\n".join(PLAIN),
    "JSON Lines, a mark before each line": "\ufeff" + "\n\ufeff".join(PLAIN),
    "files joined, each with a mark and no newline": "\ufeff" + "\ufeff".join(PLAIN),
    "a file without a last newline joined to another": PLAIN[0] + "\n" + PLAIN[1] + PLAIN[2] + "\n",
    "the same with a mark": "\ufeff" + PLAIN[0] + "\n" + PLAIN[1] + "\ufeff" + PLAIN[2] + "\n",
    "an array on one line": "[" + ", ".join(PLAIN) + "]",
    "an array, one record a line": "[\n" + ",\n".join(PLAIN) + "\n]\n",
    "an array, one record a line, brackets beside": "[" + ",\n".join(PLAIN) + "]",
    "an array, commas first": "[" + "\n,".join(PLAIN) + "\n]",
    "a pretty array": json.dumps(RECORDS, indent=2),
    "a pretty array with tabs": json.dumps(RECORDS, indent="\t"),
    "a pretty array with a mark": "\ufeff" + json.dumps(RECORDS, indent=1),
    "arrays joined": json.dumps(RECORDS[:2]) + "\n" + json.dumps(RECORDS[2:]) + "\n",
    "pretty arrays joined": json.dumps(RECORDS[:2], indent=2) + json.dumps(RECORDS[2:], indent=2),
    "arrays joined, each with a mark": "\ufeff[" + PLAIN[0] + "]\n\ufeff[" + PLAIN[1] + "," + PLAIN[2] + "]",
    "an array of one record a line, which is empty at first": "[]\n[" + ",".join(PLAIN) + "]",
    "a stream of pretty values, as of jq": "\n".join(PRETTY) + "\n",
    "a stream of pretty values, a mark before each": "\ufeff" + "\n\ufeff".join(PRETTY),
    "a stream of pretty values with commas": ",\n".join(PRETTY),
    "values joined": "".join(PLAIN),
    "values joined by spaces": " ".join(PLAIN),
    "pretty values joined": "".join(PRETTY),
    "a value on a line, then pretty ones": "\n".join([PLAIN[0], *PRETTY[1:]]),
    "a sequence of RFC 7464": "".join(f"\x1e{line}\n" for line in PLAIN),
    "a sequence of pretty values, as of jq --seq": "".join(f"\x1e{value}\n" for value in PRETTY),
    "an object with data": json.dumps({"data": RECORDS}),
    "an object with rows on lines": '{"n": 3, "rows": [\n' + ",\n".join(PLAIN) + '\n], "next": null}',
    "a pretty object with records": json.dumps({"version": "1", "records": RECORDS, "total": 3}, indent=4),
    "an object with samples and another list": json.dumps({"tags": [{"a": 1}], "samples": RECORDS}),
    "an object with another list of objects": json.dumps({"features": [{"name": "text"}], "rows": RECORDS}),
    "objects with data joined": "\n".join(json.dumps({"data": [one]}, indent=1) for one in RECORDS),
}  # fmt: skip


async def read(tmp_path: Path, name: str, content: bytes | str, **options: object) -> list[Part]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return await parts_of(path, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", READ.values(), ids=READ)
async def test_records_are_read_whatever_the_name_says(tmp_path, content, name):
    if content.startswith("[]") and name != "f.json":
        pytest.skip("a first line that is an array of nothing is a line of a file that is named so")
    (part,) = await read(tmp_path, name, content)
    assert [sample.texts for sample in part.samples] == TEXTS
    assert part.rejects == ()
    raw = content.encode()
    for sample in part.samples:
        assert json.JSONDecoder().raw_decode(raw[sample.byte_offset :].decode())[0]["text"] == sample.texts[0]
        assert sample.line == raw.count(b"\n", 0, sample.byte_offset) + 1


FRAME = pd.DataFrame({"prompt": ["a", "b"], "fact": ["c", "d"], "hallucination": ["e", "f"], "n": [1, 2]})


def of_pandas(**options: object) -> str:
    written = io.StringIO()
    FRAME.to_json(written, **options)
    return written.getvalue()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{"orient": "records"}, {"orient": "table"}, {"orient": "records", "lines": True}], ids=str
)
@pytest.mark.parametrize("indent", [0, 2])
async def test_what_pandas_writes_as_records_is_read(tmp_path, name, options, indent):
    content = of_pandas(**options, indent=0 if "lines" in options else indent)
    (part,) = await read(tmp_path, name, content)
    assert [sample.texts for sample in part.samples] == [("a", "a c", "a e"), ("b", "b d", "b f")]
    assert part.recipe == CONTRAST_RECIPE


REFUSED = {
    "columns": (of_pandas(), "column-oriented"),
    "pretty columns": (of_pandas(indent=2), "column-oriented"),
    "columns as lists": (json.dumps(FRAME.to_dict("list")), "column-oriented"),
    "index": (of_pandas(orient="index"), "orient='index'"),
    "split": (of_pandas(orient="split"), "orient='split'"),
    "pretty split": (of_pandas(orient="split", indent=2), "orient='split'"),
    "values": (of_pandas(orient="values"), "orient='values'"),
}  # fmt: skip


@pytest.mark.parametrize("recipe", [None, Recipe((("q", "{prompt}"),), None)], ids=["built in", "own"])
@pytest.mark.parametrize(("content", "cause"), REFUSED.values(), ids=REFUSED)
async def test_a_table_that_is_not_written_as_records_is_named_with_the_remedy(
    tmp_path, content, cause, recipe
):
    for name in ["f.json", "f.jsonl"]:
        if name == "f.jsonl" and cause == "orient='values'":
            continue  # a line that is an array is one bad record
        with pytest.raises(FileError, match="orient='records'") as caught:
            await read(tmp_path, name, content, recipe=recipe)
        assert caught.value.reason == "unsupported_layout"
        assert cause in str(caught.value)
        assert "\n" not in str(caught.value)


async def test_a_table_larger_than_any_record_is_named_all_the_same(tmp_path):
    columns = {"text": {str(n): "word" for n in range(2000)}}
    for content in (
        json.dumps(columns),
        json.dumps(columns, indent=1),
        json.dumps({"text": ["word"] * 9000}),
    ):
        for name in NAMES:
            with pytest.raises(FileError, match=r"column-oriented.*orient='records'"):
                await read(tmp_path, name, content)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("indent", [None, 2])
async def test_a_list_larger_than_any_record_is_read_from_its_object(tmp_path, name, indent):
    records = [{"text": f"{number} " * 20} for number in range(1000)]
    for content in (
        {"info": {"n": 1}, "data": records},
        {"data": records, "info": {"n": 1}, "other": [{"a": 1}]},
        {"padding": ["x"] * 9000, "data": records},
        {"notes": [{"a": 1}], "samples": records},
    ):
        if "padding" in content and indent is None and name != "f.json":
            continue  # so a line of JSON Lines would begin that is too large
        parts = await read(tmp_path, name, json.dumps(content, indent=indent))
        texts = [sample.texts for part in parts for sample in part.samples]
        assert texts == [(record["text"],) for record in records]
        assert not any(part.rejects for part in parts)


@pytest.mark.parametrize("n", [1, 1000])
async def test_two_lists_that_may_be_the_records_are_named(tmp_path, n):
    content = {"train": [{"text": "a"}] * n, "test": [{"text": "b"}] * n}
    with pytest.raises(FileError, match=r"'train' and 'test'.*keep .* or name it samples"):
        await read(tmp_path, "f.json", json.dumps(content))


async def test_an_object_with_the_fields_of_a_record_is_one_whatever_lists_it_has(tmp_path):
    for content in (RECORDS[0], {"spans": [{"text": "x"}], "text": "one"}):
        for indent in (None, 2):
            for name in NAMES:
                (part,) = await read(tmp_path, name, json.dumps(content, indent=indent))
                assert [sample.texts for sample in part.samples] == [("one",)]


FIVE = [{"text": f"r{n}", "tags": [{"k": n}, [n]], "m": {"x": {}, "y": []}} for n in range(5)]
R = [json.dumps(record) for record in FIVE]
P = [json.dumps(record, indent=2) for record in FIVE]
JOINED = {
    "an array, then lines": f"[{R[0]}, {R[1]}]\n{R[2]}\n{R[3]}\n{R[4]}\n",
    "lines, then an array": f"{R[0]}\n{R[1]}\n[{R[2]},{R[3]}, {R[4]}]",
    "lines, then an array, no newline between": f"{R[0]}\n{R[1]}[{R[2]},{R[3]}, {R[4]}]\n",
    "lines, an array, a line, no newlines between": f"{R[0]}\n{R[1]}\n{R[2]}[{R[3]}]{R[4]}\n",
    "lines, then a pretty array": f"{R[0]}\n{R[1]}\n" + json.dumps(FIVE[2:], indent=2),
    "lines, then an array of one record a line": f"{R[0]}\n{R[1]}\n[\n{R[2]},\n{R[3]},\n{R[4]}\n]\n",
    "lines, then pretty objects": f"{R[0]}\n{R[1]}\n{R[2]}\n{P[3]}\n{P[4]}\n",
    "lines, then pretty objects, no newlines between": f"{R[0]}\n{R[1]}{P[2]}{P[3]}{R[4]}\n",
    "lines, then pretty objects with commas": f"{R[0]},\n{R[1]},\n{P[2]},\n{P[3]},\n{R[4]}",
    "lines and one pretty object": f"{R[0]}{R[1]}\n{R[2]}\n{R[3]}\n{P[4]}",
    "four on a line and a pretty object": "".join(R[:4]) + "\n" + P[4] + "\n",
    "a pretty object among lines": f"{R[0]}\n{R[1]}\n{P[2]}\n{R[3]}\n{R[4]}\n",
    "a pretty array, then lines": json.dumps(FIVE[:1], indent=0) + "\n" + "\n".join(R[1:]),
    "an array of lines, then lines": f"[\n{R[0]}\n]\n" + "\n".join(R[1:]),
    "pretty objects, then lines": "\n".join(P[:2] + R[2:]),
    "pretty objects, then an array": "\n".join([*P[:2], json.dumps(FIVE[2:])]),
    "a pretty array, then pretty objects": "\n".join([json.dumps(FIVE[:3], indent=1), *P[3:]]),
    "marks and CRLF": f"\ufeff{R[0]}\r\n{R[1]}\r\n\ufeff[{R[2]}]\r\n\ufeff"
    + "\r\n".join("\n".join(P[3:]).split("\n")),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", JOINED.values(), ids=JOINED)
async def test_what_was_joined_is_read_whatever_the_print_of_each(tmp_path, content, name):
    (part,) = await read(tmp_path, name, content)
    assert [sample.texts for sample in part.samples] == [(record["text"],) for record in FIVE]
    assert (part.rejects, part.extent.records) == ((), 5)
    raw = content.encode()
    for sample in part.samples:
        found, _ = json.JSONDecoder().raw_decode(raw[sample.byte_offset :].decode())
        assert found == FIVE[sample.record_index]
        assert sample.line == raw.count(b"\n", 0, sample.byte_offset) + 1


async def test_a_broken_line_before_pretty_objects_costs_itself(tmp_path):
    for broken in [
        '{"text": "a',
        '{"text": "a"',
        '{"text": "a",',
        '{"text": [{"a": 1},',
        "[",
        "{oops",
        '{"a":',
    ]:
        for rest in ([P[2], P[3], R[4]], [R[2], R[3], R[4]], [f"[{R[2]}, {R[3]}]", R[4]]):
            content = "\n".join([R[0], R[1], broken, *rest])
            (part,) = await read(tmp_path, "f.jsonl", content)
            assert [sample.texts[0] for sample in part.samples] == ["r0", "r1", "r2", "r3", "r4"], content
            assert [(reject.record_index, reject.line) for reject in part.rejects] == [(2, 3)]


async def test_a_printed_array_larger_than_any_record_gives_all_its_records(tmp_path):
    records = [{"text": f"{n} " * 50, "spans": [{"k": n}]} for n in range(300)]
    for indent in (0, 2):
        content = "\n".join([*R, json.dumps(records, indent=indent), *R])
        parts = await read(tmp_path, "f.jsonl", content)
        texts = [sample.texts[0] for part in parts for sample in part.samples]
        assert texts == [record["text"] for record in [*FIVE, *records, *FIVE]]


async def test_lines_that_are_arrays_of_values_are_rejects(tmp_path):
    content = "\n".join([R[0], R[1], '["a", 1]', '["b", {"text": "c"}]', "[]", R[2]])
    (part,) = await read(tmp_path, "f.jsonl", content)
    assert [(reject.record_index, reject.reason) for reject in part.rejects] == [
        (n, "not_an_object") for n in (2, 3, 4)
    ]


GOOD = b'{"text": "good"}'
BROKEN_FIRST = [
    b"{oops",
    b'{"text": "a"',
    b'{"text": "a",',
    b'{"text": [{"a": 1}, ',
    b'"text": "a"}',
    b"oops",
    b'"',
    b"[",
    b'["a", {',
    b'[{"text": tru}, {',
    b'{"text": "a"}}',
    b"}",
    b"null",
    b"[1, 2]",
    b"{" * 100,
    b'{"text": "' + b"x" * 30_000,
    b'{"text": "' + b"x" * 30_000 + b'"}',
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", BROKEN_FIRST)
@pytest.mark.parametrize("n", [3, 3000])
async def test_json_lines_whose_first_line_is_broken_lose_that_line_alone(tmp_path, name, broken, n):
    if len(broken) > 10_000 and (n == 3 or name == "f.json"):
        pytest.skip("nothing that is looked at says that these are lines")
    parts = await read(tmp_path, name, b"\n".join([broken, *[GOOD] * n]))
    assert sum(len(part.samples) for part in parts) == n
    (reject,) = parts[0].rejects
    assert (reject.record_index, reject.line, reject.byte_offset) == (0, 1, 0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("broken", BROKEN_FIRST)
async def test_json_lines_whose_second_line_is_broken_lose_that_line_alone(tmp_path, name, broken):
    (part,) = await read(tmp_path, name, b"\n".join([GOOD, broken, GOOD, GOOD]))
    assert [sample.record_index for sample in part.samples] == [0, 2, 3]
    (reject,) = part.rejects
    assert (reject.record_index, reject.line, reject.byte_offset) == (1, 2, len(GOOD) + 1)


BAD = {
    "malformed_json": b'{"text": tru}',
    "bad_field": b'{"text": ["a"]}',
    "not_finite": b'{"text": "a", "x": NaN}',
    "invalid_utf8": b'{"text": "caf\xe9"}',
    "not_an_object": b"null",
    "record_too_large": b'{"text": "' + b"x" * 20_000 + b'"}',
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "joint", [b"\n", b"", b",\n", b"\n\xef\xbb\xbf"], ids=["lines", "none", "comma", "mark"]
)
@pytest.mark.parametrize("reason", BAD)
async def test_a_bad_record_of_a_stream_costs_itself(tmp_path, name, joint, reason):
    pretty = b'{\n  "text": "good"\n}'
    bad = BAD[reason].replace(b": ", b":\n") if joint else BAD[reason]
    if reason == "not_an_object" and joint != b"\n":
        pytest.skip("only a newline ends it")
    content = joint.join([pretty, pretty, bad, pretty])
    (part,) = await read(tmp_path, name, content)
    assert [sample.record_index for sample in part.samples] == [0, 1, 3]
    (reject,) = part.rejects
    assert reject.reason == reason
    assert content[reject.byte_offset :].startswith(bad)
    assert reject.line == content.count(b"\n", 0, reject.byte_offset) + 1


async def test_a_damaged_record_of_a_sequence_costs_itself(tmp_path):
    content = b'\x1e{"text": "a"}\n\x1e{"text": "b\n\x1e{\n"text": "c"}\n\x1e\n\x1e{"text": "d"}\n'
    (part,) = await read(tmp_path, "f.json", content)
    assert [(sample.texts, sample.line) for sample in part.samples] == [(("a",), 1), (("c",), 3), (("d",), 6)]
    assert [(reject.reason, reject.line) for reject in part.rejects] == [("malformed_json", 2)]


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b'{\n"text": "a"\n}\n{\n"text": "b', "line 4, column 1: the file ends in the middle"),
        (b'[{"text": "a"}]\n\xef\xbb\xbf\xef\xbb\xbf[{"text": "b"},', "line 2, column 16: the file ends"),
        (b'\xef\xbb\xbf[{"text": "a"}] tail', "line 1, column 17: expected nothing after the end"),
        (b'{\n"text": "a"\n}\n]', "line 4, column 1: expected nothing after the end"),
        (b'{\n"text": "a"\n}\n\xef\xbb{', "line 4, column 1: expected an array"),
    ],
)
async def test_damage_to_the_frame_of_a_stream_is_named_with_its_place(tmp_path, content, where):
    with pytest.raises(FileError, match=where) as caught:
        await read(tmp_path, "f.json", content)
    assert caught.value.reason == "malformed_json"


@pytest.mark.parametrize("name", NAMES)
async def test_a_latex_text_is_no_end_of_a_record(tmp_path, name):
    lines = [json.dumps({"text": r"\frac{a}{b} }\n{" * n}) for n in range(1, 5)]
    (part,) = await read(tmp_path, name, "\n".join(lines))
    assert [sample.texts for sample in part.samples] == [(r"\frac{a}{b} }\n{" * n,) for n in range(1, 5)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"label": 1}\n{"label": 2}', "no_recipe"),
        (b"[1, 2]\n[3, 4]", "no_usable_record"),
        (b'{"text": ["a"]}\n{"text": null}\n{"text": 1, "text": 2}\n{"text": {}}', "no_usable_record"),
    ],
)
async def test_a_file_without_a_usable_record_says_the_most_frequent_reason(tmp_path, content, expected):
    for recipe in (None, Recipe((("t", "{text}"),), None)):
        with pytest.raises(FileError) as caught:
            await read(tmp_path, "f.jsonl", content, recipe=recipe)
        assert caught.value.reason == (expected if recipe is None else "no_usable_record")
        assert "\n" not in str(caught.value)
    details = caught.value.details
    assert details["records"] == sum(entry["count"] for entry in details["rejects"])
    counts = [entry["count"] for entry in details["rejects"]]
    assert counts == sorted(counts, reverse=True)
    first = details["rejects"][0]
    assert f"{first['count']} {first['reason']}" in str(caught.value)
    assert str(caught.value).endswith(first["first_message"])


async def test_no_part_says_that_a_file_is_unusable_before_all_are_read(tmp_path):
    limits = dataclasses.replace(LIMITS, part_records=2)
    recipe = Recipe((("t", "{text}"),), None)
    parts = await read(
        tmp_path, "f.jsonl", b'[[1]]\n[[2]]\n[[3]]\n{"text": "a"}', recipe=recipe, limits=limits
    )
    assert [len(part.samples) for part in parts] == [0, 1]
    stored = {0: parts[0].extent}
    again = await read(
        tmp_path, "f.jsonl", b"[[1]]\n[[2]]\n[[3]]\n[[4]]", recipe=recipe, limits=limits, stored=stored
    )
    assert [part.extent.records for part in again] == [2, 2]
