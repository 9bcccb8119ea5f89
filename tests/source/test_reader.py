from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.errors import FileError
from daemon.recipes import CONTRAST_RECIPE, PLAIN_RECIPE, Recipe
from daemon.records import KeptPart, Part, Reject
from daemon.source import content as source_module
from tests.support.effort import examples
from tests.support.sources import LIMITS, parts_of

GOOD = {"text": "fine"}


async def read(tmp_path: Path, name: str, content: bytes | str, **options: object) -> list[Part]:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return await parts_of(path, **options)


async def only_reject(tmp_path: Path, line: bytes | str, **options: object) -> Reject:
    """The reject that a line makes between two good ones."""
    raw = line.encode() if isinstance(line, str) else line
    good = json.dumps(GOOD).encode()
    (part,) = await read(tmp_path, "f.jsonl", good + b"\n" + raw + b"\n" + good, **options)
    assert [sample.record_index for sample in part.samples] == [0, 2]
    (reject,) = part.rejects
    assert (reject.record_index, reject.line, reject.byte_offset) == (1, 2, len(good) + 1)
    return reject


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "malformed_json"),
        ('{"text": "a"} "b"', "malformed_json"),
        ('{"text": "a"} {"text": "b"', "malformed_json"),
        ('{"text": "tab\there"}', "malformed_json"),
        ('"just a string"', "not_an_object"),
        ("[1, 2]", "not_an_object"),
        ("null", "not_an_object"),
        (b'{"text": "caf\xe9"}', "invalid_utf8"),
        (b'{"text": "\xed\xa0\x80"}', "invalid_utf8"),
        (r'{"text": "\ud83d"}', "lone_surrogate"),
        (r'{"text": "fine", "note": ["\udc00"]}', "lone_surrogate"),
        (r'{"text": "fine", "note": {"\udc00": 1}}', "lone_surrogate"),
        ('{"text": "a", "x": NaN}', "not_finite"),
        ('{"text": "a", "x": -Infinity}', "not_finite"),
        ('{"text": "a", "x": 1e999}', "not_finite"),
        ('{"text": "a", "x": ' + "9" * 5000 + "}", "not_finite"),
        ('{"text": "a", "complexity": 1' + "0" * 400 + "}", "not_finite"),
        ('{"text": "a", "text": "b"}', "duplicate_key"),
        ('{"text": "a", "x": {"k": 1, "k": 1}}', "duplicate_key"),
        ('{"label": 1}', "missing_field"),
        ('{"text": null}', "bad_field"),
        ('{"text": ["a"]}', "bad_field"),
        ('{"text": "a", "x": ' + "[" * 9 + "]" * 9 + "}", "nesting_too_deep"),
        ('{"text": "' + "a" * 10_000 + '"}', "record_too_large"),
    ],
)
async def test_a_bad_line_is_one_reject_with_its_place_and_reason(tmp_path, line, reason):
    reject = await only_reject(tmp_path, line)
    assert reject.reason == reason
    assert reject.message.startswith("line 2: the record ")
    assert "\n" not in reject.message
    assert "just a string" not in reject.message


@pytest.mark.parametrize(("name", "around"), [("f.jsonl", "{}"), ("f.json", "[{}]")])
async def test_a_record_may_have_exactly_the_bytes_of_the_limit(tmp_path, name, around):
    record = '{"text": "caf\u00e9"}'
    size = len(record.encode())
    for limit, reasons in ((size, []), (size - 1, ["record_too_large"])):
        limits = dataclasses.replace(LIMITS, max_record_bytes=limit)
        good = '{"text": ""}'
        content = around.format(f"{good},{record}" if name == "f.json" else f"{good}\n{record}")
        (part,) = await read(tmp_path, name, content, limits=limits)
        assert [reject.reason for reject in part.rejects] == reasons


async def test_a_part_ends_with_the_record_that_fills_it_exactly(tmp_path):
    line = json.dumps(GOOD)
    limits = dataclasses.replace(LIMITS, part_bytes=2 * len(line))
    parts = await read(tmp_path, "f.jsonl", "\n".join([line] * 5), limits=limits)
    assert [part.extent.records for part in parts] == [2, 2, 1]


async def test_depth_without_end_costs_one_record_in_an_array_too(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (part,) = await read(
        tmp_path,
        "f.json",
        f'[{{"text": "a"}}, {{"text": "b", "x": {deep}}}, {{"text": "c"}}]',
        limits=dataclasses.replace(LIMITS, max_record_bytes=1 << 20),
    )
    assert [sample.texts for sample in part.samples] == [("a",), ("c",)]
    assert [reject.reason for reject in part.rejects] == ["nesting_too_deep"]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("f.json", b"", "empty"),
        ("f.json", b" \n ", "empty"),
        ("f.json", b"[]", "empty"),
        ("f.jsonl", b"\n\n", "empty"),
        ("f.json", b'{"samples": []}', "empty"),
        ("f.json", b'[{"text": "a"}, {"text": "b', "malformed_json"),
        ("f.json", b'[{"text": "a"} {"text": "b"}]', "malformed_json"),
        ("f.json", b'[{"text": "a"}] tail', "malformed_json"),
        ("f.json", b'[{"text": "a"},]', "malformed_json"),
        ("f.json", b'{"text": "a"', "malformed_json"),
        ("f.json", b'{"samples": [{"text": "a"}], "x"', "malformed_json"),
        ("f.json", b"hello", "malformed_json"),
        ("f.json", bytes(range(256)), "binary"),
        ("f.jsonl", b"\x89PNG\x00\x00", "binary"),
        ("f.txt", b"a,b", "unsupported_format"),
        ("f", b"a,b", "unsupported_format"),
        ("f.json.gz", b"not gzip", "corrupt_compression"),
        ("f.jsonl.zst", b"not zstd", "corrupt_compression"),
        ("f.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "corrupt_compression"),
        ("f.jsonl", b'{"label": 1}', "no_recipe"),
        ("f.jsonl", b"{oops\n{oops", "no_usable_record"),
    ],
)
async def test_an_unusable_file_says_why(tmp_path, name, content, reason):
    with pytest.raises(FileError) as caught:
        await read(tmp_path, name, content)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)


async def test_structural_damage_names_line_and_column(tmp_path):
    with pytest.raises(FileError, match="line 3, column 1: expected a comma or the end of the array"):
        await read(tmp_path, "f.json", '[{"text": "a"},\n {"text": "b"}\n{"text": "c"}]')


@pytest.mark.parametrize("name", ["f.json", "f.jsonl"])
async def test_no_file_is_too_large_only_its_records_are(tmp_path, name):
    records = [json.dumps({"text": "x" * n}) for n in (9_000, 11_000, 9_000)] * 200
    content = "\n".join(records) if name == "f.jsonl" else f"[{','.join(records)}]"
    parts = await read(tmp_path, name, content)
    assert [part.extent.records for part in parts] == [100] * 6
    assert {reject.reason for part in parts for reject in part.rejects} == {"record_too_large"}
    rejected = [reject.record_index for part in parts for reject in part.rejects]
    assert rejected == list(range(1, 600, 3))


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '{"samples": [{"text": "a"}, {"text": "b"}]}',
        '{"version": [1, {"samples": []}], "samples": [{"text": "a"}, {"text": "b"}], "by": "x"}',
        '\ufeff[{"text": "a"},\r\n{"text": "b"}]\r\n',
    ],
)
async def test_arrays_and_samples_objects_hold_records(tmp_path, content):
    (part,) = await read(tmp_path, "f.JSON", content)
    assert [sample.texts for sample in part.samples] == [("a",), ("b",)]
    raw = content.encode()
    for sample in part.samples:
        record = raw[sample.byte_offset :]
        assert record.startswith(b'{"text": "' + sample.texts[0].encode())
        assert sample.line == raw[: sample.byte_offset].count(b"\n") + 1


async def test_one_object_is_one_record(tmp_path):
    (part,) = await read(tmp_path, "f.json", ' {"text": "a", "nested": {"samples": [1]}}')
    assert [sample.texts for sample in part.samples] == [("a",)]
    assert part.samples[0].byte_offset == 1


@pytest.mark.parametrize("samples", [[{"text": "a"}, {"text": "b"}], [], [1], "x"])
@pytest.mark.parametrize("first", [True, False])
async def test_samples_is_a_field_of_a_record_like_any_other(tmp_path, samples, first):
    own = {"samples": samples, "text": "own"} if first else {"text": "own", "samples": samples}
    line = json.dumps(own)
    wrapper = json.dumps({"samples": [GOOD]}, indent=1)
    contents = [line, line + "\n" + line, f"[{line}]", json.dumps(own, indent=1)]
    if not first:
        contents.append(wrapper + "\n" + json.dumps(own, indent=1) if samples else line)
    for content in contents:
        (part,) = await read(tmp_path, "f.json", content)
        of_own = [sample for sample in part.samples if sample.texts != ("fine",)]
        assert of_own
        for sample in of_own:
            assert (sample.texts, json.loads(sample.extra)) == (("own",), {"samples": samples})
        assert part.rejects == ()


async def test_a_record_larger_than_what_is_looked_at_keeps_its_samples(tmp_path):
    own = {"text": "own", "samples": [{"text": "x" * 100}] * 85}
    (part,) = await read(tmp_path, "f.json", json.dumps(own))
    assert [sample.texts for sample in part.samples] == [("own",)]


async def test_fields_go_where_they_belong(tmp_path):
    record = {"id": 7, "domain": "x", "complexity": 3, "text": "t", "label": True, "ключ": {"a": None}}
    (part,) = await read(
        tmp_path, "f.json", json.dumps([record, {"text": 5, "domain": 2, "complexity": "hard"}])
    )
    first, second = part.samples
    assert (first.sample_id, first.domain, first.complexity) == ("7", "x", 3.0)
    assert first.extra == '{"label": true, "ключ": {"a": null}}'
    assert (second.sample_id, second.domain, second.complexity) == ("1", "2", None)
    assert second.extra == '{"complexity": "hard"}'
    assert second.texts == ("5",)


async def test_the_first_fitting_record_chooses_the_recipe_of_its_file(tmp_path):
    contrast = {"prompt": "p", "fact": "f", "hallucination": "h"}
    (part,) = await read(tmp_path, "f.json", json.dumps([{"x": 1}, contrast, GOOD]))
    assert part.recipe == CONTRAST_RECIPE
    assert part.samples[0].texts == ("p", "p f", "p h")
    assert [reject.reason for reject in part.rejects] == ["missing_field", "missing_field"]
    (part,) = await read(tmp_path, "g.json", json.dumps([{**contrast, **GOOD}]))
    assert part.recipe == CONTRAST_RECIPE


async def test_a_configured_recipe_is_used_as_it_is(tmp_path):
    recipe = Recipe((("q", "Q: {question}"),), None)
    (part,) = await read(tmp_path, "f.json", '[{"question": "why"}, {"text": "t"}]', recipe=recipe)
    assert part.samples[0].texts == ("Q: why",)
    assert [reject.reason for reject in part.rejects] == ["missing_field"]


async def test_parts_follow_each_other_and_only_the_last_is_marked(tmp_path):
    lines = "\n".join(json.dumps({"text": str(i)}) for i in range(250))
    parts = await read(tmp_path, "f.jsonl", lines)
    assert [part.number for part in parts] == [0, 1, 2]
    assert [part.last for part in parts] == [False, False, True]
    assert [sample.record_index for part in parts for sample in part.samples] == list(range(250))


async def test_stored_parts_are_counted_and_not_read_again(tmp_path):
    lines = "\n".join(json.dumps({"text": str(i)}) for i in range(250))
    first, second, third = await read(tmp_path, "f.jsonl", lines)
    stored = {part.extent.number: part.extent for part in (first, third)}
    kept, read_again, kept_last = await read(tmp_path, "f.jsonl", lines, stored=stored)
    assert (kept, kept_last) == tuple(
        KeptPart(part.file, part.extent, part.last, part.recipe) for part in (first, third)
    )
    assert (read_again.extent, read_again.samples) == (second.extent, second.samples)
    elsewhere = {1: dataclasses.replace(second.extent, byte_offset=1)}
    assert all(isinstance(part, Part) for part in await read(tmp_path, "f.jsonl", lines, stored=elsewhere))


RECORD = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}, ensure_ascii=False), st.text(max_size=20)).filter(
        lambda line: all(not "\ud800" <= char <= "\udfff" for char in line)
    ),
    st.sampled_from(['{"text": 1, "text": 2}', '{"other": 1}', "[3]", '{"text": NaN}', '"\\ud800"']),
)
PACK = {
    "f.jsonl": lambda raw: raw,
    "f.ndjson.gz": lambda raw: gzip.compress(raw[: len(raw) // 2]) + gzip.compress(raw[len(raw) // 2 :]),
    "f.jsonl.zst": lambda raw: (
        zstandard.compress(raw[: len(raw) // 2]) + zstandard.compress(raw[len(raw) // 2 :])
    ),
}


@settings(
    max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
@given(
    lines=st.lists(RECORD, min_size=1, max_size=12),
    ending=st.sampled_from(["\n", "\r\n", "\n\n"]),
    part_records=st.integers(1, 5),
    chunk=st.integers(1, 40),
)
async def test_every_way_to_store_records_reads_the_same(
    tmp_path, monkeypatch, lines, ending, part_records, chunk
):
    limits = dataclasses.replace(LIMITS, part_records=part_records)
    lines = [*lines, json.dumps(GOOD)]  # a file needs one that can be used
    raw = ending.join(lines).encode()
    contents = {name: pack(raw) for name, pack in PACK.items()}
    contents["f.json"] = ("[" + ",\n".join(lines) + "]").encode()
    contents["g.json.zst"] = zstandard.compress(('{"n": 1, "samples": [' + ", ".join(lines) + "]}").encode())
    monkeypatch.setattr(source_module, "CHUNK_BYTES", 16 * chunk)
    seen = []
    for name, content in contents.items():
        parts = await read(tmp_path, name, content, recipe=PLAIN_RECIPE, limits=limits)
        samples = [(s.record_index, s.sample_id, s.texts) for part in parts for s in part.samples]
        rejects = [(r.record_index, r.reason) for part in parts for r in part.rejects]
        assert len(samples) + len(rejects) == len(lines) == sum(part.extent.records for part in parts)
        assert all(part.extent.records <= part_records for part in parts)
        seen.append((samples, rejects))
        if name == "f.jsonl":
            for part in parts:
                for entry in (*part.samples, *part.rejects):
                    line = lines[entry.record_index].encode()
                    assert raw[entry.byte_offset :].startswith(line.lstrip())
    assert all(other == seen[0] for other in seen)
