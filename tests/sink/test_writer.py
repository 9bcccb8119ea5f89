from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon.recipes import CHAT_RECIPE, PLAIN_RECIPE, PREFERENCE_RECIPE
from daemon.records import FinishedPart, Reject, ResultRows, TokenizedPart, UnitTotals
from daemon.sink import parts as parts_module
from daemon.sink import writer as writer_module
from daemon.sink.parts import stored_extents
from daemon.sink.schema import features_schema, metrics_schema, texts_schema
from daemon.sink.tables import stored_parts
from tests.support.handmade import (
    CONTRAST_RECIPE,
    INFO,
    expected_features,
    expected_metrics,
    expected_texts,
    finish,
    finished_from,
    make_block,
    make_file,
    make_part,
    open_writer,
    store,
)


def parts_of_a_file() -> list[TokenizedPart]:
    """16 records in three parts; records 5 and 6 are rejects."""
    return [
        make_part(0, 0, 5),
        make_part(1, 5, 7, rejected=(5, 6)),
        make_part(2, 12, 4, last=True),
    ]


def write(staging: Path, parts: list[FinishedPart], **options: object) -> UnitTotals:
    writer = open_writer(staging, **options)
    for part in parts:
        assert not writer.complete
        store(writer, part)
    return writer.write()


def rows_of(path: Path) -> list[dict[str, object]]:
    return pq.read_table(path).to_pylist()


def samples_of(parts: list[TokenizedPart]):
    return [sample for part in parts for sample in part.part.samples]


def test_every_column_reads_back_as_the_blocks_said(tmp_path):
    parts = parts_of_a_file()
    totals = write(tmp_path / "unit", [finish(part) for part in parts])
    samples = samples_of(parts)
    assert rows_of(tmp_path / "unit/metrics.parquet") == expected_metrics(samples)
    assert rows_of(tmp_path / "unit/features.parquet") == expected_features(samples)
    assert rows_of(tmp_path / "unit/texts.parquet") == expected_texts(samples)
    assert (totals.records, totals.rows, totals.rejects) == (16, 14, 2)


def test_a_recipe_without_contrast_has_no_contrast_columns(tmp_path):
    part = make_part(0, 0, 3, last=True, recipe=PLAIN_RECIPE)
    write(tmp_path / "unit", [finish(part)], recipe=PLAIN_RECIPE)
    rows = rows_of(tmp_path / "unit/metrics.parquet")
    assert rows == expected_metrics(part.part.samples, PLAIN_RECIPE)
    assert "l3_text_gini" in rows[0]
    assert not [name for name in rows[0] if name.endswith("_diff")]


@pytest.mark.parametrize("recipe", [PLAIN_RECIPE, CHAT_RECIPE, PREFERENCE_RECIPE], ids=lambda one: one.name)
def test_texts_of_conversations_have_roles(tmp_path, recipe):
    part = make_part(0, 0, 80, last=True, recipe=recipe)
    write(tmp_path / "unit", [finish(part)], recipe=recipe)
    assert rows_of(tmp_path / "unit/texts.parquet") == expected_texts(part.part.samples, recipe)
    names = pq.read_schema(tmp_path / "unit/texts.parquet").names
    assert ("token_roles" in names) == recipe.chats


def test_without_texts_no_file_holds_any(tmp_path):
    parts = [finish(part) for part in parts_of_a_file()]
    totals = write(tmp_path / "unit", parts, texts=False)
    assert [file.name for file in totals.files] == ["metrics.parquet", "features.parquet", "rejects.jsonl"]
    assert {path.name for path in (tmp_path / "unit").iterdir()} == {file.name for file in totals.files}
    kept = open_writer(tmp_path / "again", texts=False)
    store(kept, parts[0])
    assert [part_texts(path) for path in sorted((tmp_path / "again.parts").iterdir())] == [None]
    with pytest.raises(AssertionError, match="0 texts of 5 samples"):
        bare = [without_texts(part) for part in parts_of_a_file()]
        write(tmp_path / "bare", [finish(part) for part in bare])


def part_texts(path: Path) -> pa.Table | None:
    return parts_module.read_part(path.parent, int(path.name)).texts


def without_texts(part: TokenizedPart) -> TokenizedPart:
    samples = tuple(dataclasses.replace(sample, stored=()) for sample in part.samples)
    return dataclasses.replace(part, samples=samples)


def test_parts_weigh_what_their_texts_do():
    part = finish(make_part(0, 0, 3))
    bare = dataclasses.replace(part, part=without_texts(part.part))
    texts = [text for sample in part.part.samples for text in sample.stored]
    known = [text.starts for text in texts if text.starts is not None]
    expected = sum(len(text.content) for text in texts) + 12 * sum(map(len, known))
    assert part.nbytes - bare.nbytes == expected > 0


def shared_batches(parts: list[TokenizedPart]) -> list[FinishedPart]:
    """Two batches, each with samples of every part, in reverse order."""
    pieces: dict[int, list[ResultRows]] = {part.part.number: [] for part in parts}
    for remainder in (1, 0):
        chosen = [
            (part, row)
            for part in reversed(parts)
            for row in reversed(range(len(part.samples)))
            if row % 2 == remainder
        ]
        block = make_block([part.part.samples[row] for part, row in chosen])
        for part in parts:
            mine = [i for i, (owner, _) in enumerate(chosen) if owner is part]
            rows = [chosen[i][1] for i in mine]
            pieces[part.part.number].append(ResultRows(block, np.array(mine), np.array(rows), row_bytes=0))
    return [finished_from(part, pieces[part.part.number]) for part in parts]


def test_files_are_byte_identical_however_batches_were_formed(tmp_path):
    parts = parts_of_a_file()
    plain = write(tmp_path / "plain", [finish(part) for part in parts])
    one_by_one = [finish(part, [[row] for row in range(len(part.samples))][::-1]) for part in parts]
    single = write(tmp_path / "single", [one_by_one[i] for i in (2, 0, 1)])
    shared = write(tmp_path / "shared", shared_batches(parts)[::-1])
    assert plain.files == single.files == shared.files


def test_row_groups_gather_small_parts(tmp_path, monkeypatch):
    parts = [finish(part) for part in parts_of_a_file()]
    write(tmp_path / "gathered", parts)
    monkeypatch.setattr(writer_module, "METRICS_GROUP_BYTES", 1)
    write(tmp_path / "eager", parts)
    metadata = [pq.read_metadata(tmp_path / name / "metrics.parquet") for name in ("gathered", "eager")]
    assert [file.num_row_groups for file in metadata] == [1, 3]
    assert rows_of(tmp_path / "gathered/metrics.parquet") == rows_of(tmp_path / "eager/metrics.parquet")


def test_rejects_come_in_record_order_and_only_then_is_there_a_file(tmp_path):
    parts = [make_part(0, 0, 4, rejected=(0, 3)), make_part(1, 4, 3, rejected=(5,), last=True)]
    write(tmp_path / "unit", [finish(parts[1]), finish(parts[0])])
    lines = (tmp_path / "unit/rejects.jsonl").read_text(encoding="utf-8").splitlines()
    rejects = [reject for part in parts for reject in part.part.rejects]
    assert [json.loads(line) for line in lines] == [
        {
            "record_index": reject.record_index,
            "id": reject.sample_id,
            "line": reject.line,
            "byte_offset": reject.byte_offset,
            "row_group": reject.row_group,
            "reason": reject.reason,
            "message": reject.message,
        }
        for reject in rejects
    ]
    names = ["record_index", "id", "line", "byte_offset", "row_group", "reason", "message"]
    assert list(json.loads(lines[0])) == names

    write(tmp_path / "clean", [finish(make_part(0, 0, 2, last=True))])
    assert not (tmp_path / "clean/rejects.jsonl").exists()


def test_a_reject_with_a_lone_surrogate_is_still_valid_utf8():
    line = writer_module.reject_line(Reject(0, "a\ud83dz", None, 0, "lone_surrogate", "bad \udcff"))
    entry = json.loads(line.decode("utf-8"))
    assert (entry["id"], entry["message"]) == (r"a\ud83dz", r"bad \udcff")


def test_a_file_of_rejects_alone_has_both_schemas_and_no_rows(tmp_path):
    totals = write(tmp_path / "unit", [finish(make_part(0, 0, 2, rejected=(0, 1), last=True))])
    metrics = pq.read_table(tmp_path / "unit/metrics.parquet")
    features = pq.read_table(tmp_path / "unit/features.parquet")
    assert metrics.schema.equals(metrics_schema(INFO.names, CONTRAST_RECIPE))
    assert features.schema.equals(features_schema("float32"))
    assert (len(metrics), len(features), totals.rejects) == (0, 0, 2)
    assert totals.layers[0].fvu() is None
    assert totals.layers[0].mean_l0() is None


def test_a_file_is_rejected_whole_where_no_part_of_any_attempt_has_a_row(tmp_path):
    rejected = [make_part(0, 0, 5, rejected=range(5)), make_part(1, 5, 2, rejected=(5, 6), last=True)]
    good = make_part(0, 0, 5, rejected=range(4))
    for first, expected in ((rejected[0], 7), (good, None)):
        folder = tmp_path / str(expected)
        earlier = open_writer(folder / "unit")
        store(earlier, finish(first))
        for writer in (earlier, open_writer(folder / "unit")):
            if writer is not earlier:
                writer.keep_part(first.part.file, first.part.extent, last=False)
            store(writer, finish(rejected[1]))
            summary = writer.rejected_whole()
            assert (summary and summary.records) == expected
            assert writer.has_rows == (writer is earlier and first is good)


def test_a_file_without_records_can_be_finished(tmp_path):
    totals = write(tmp_path / "unit", [finish(make_part(0, 0, 0, last=True))])
    assert (totals.records, totals.rows, totals.rejects) == (0, 0, 0)


def test_float16_values_keep_what_fits_and_saturate(tmp_path):
    part = make_part(0, 0, 3, last=True)
    block = make_block(part.part.samples, dtype=np.float64)
    largest = int(block.features.values.argmax())
    block.features.values[largest] = 1e6
    finished = finished_from(part, [ResultRows(block, np.arange(3), np.arange(3), row_bytes=0)])
    write(tmp_path / "unit", [finished], values="float16")
    table = pq.read_table(tmp_path / "unit/features.parquet")
    assert table.schema.field("values").type == pa.list_(pa.float16())
    stored = [value for row in table["values"].to_pylist() for value in row]
    expected = [value for row in expected_features(part.part.samples) for value in row["values"]]
    assert stored.count(65504.0) == 1
    assert sum(a != b for a, b in zip(stored, expected, strict=True)) == 1


def test_totals_add_up_over_parts(tmp_path):
    ticks = iter(range(100))
    parts = parts_of_a_file()
    totals = write(tmp_path / "unit", [finish(part) for part in parts], clock=lambda: float(next(ticks)))
    x = np.array([sample.record_index for sample in samples_of(parts)], float)
    assert totals.layers[1].rows == 14
    assert totals.layers[1].mean_l0() == 6.0
    assert totals.layers[1].fvu() == pytest.approx(14 * 0.5 / (14 * x.var()))
    assert (totals.seconds.read, totals.seconds.forward) == (0.75, 3.0)
    assert (totals.seconds.write, totals.seconds.commit) == (3.0, 1.0)  # one tick per call


def test_file_totals_are_those_of_the_bytes_on_disk(tmp_path):
    totals = write(tmp_path / "unit", [finish(part) for part in parts_of_a_file()])
    assert [(file.name, file.rows) for file in totals.files] == [
        ("metrics.parquet", 14),
        ("features.parquet", 84),
        ("texts.parquet", 42),
        ("rejects.jsonl", 2),
    ]
    for file in totals.files:
        content = (tmp_path / "unit" / file.name).read_bytes()
        assert (file.bytes, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert totals.bytes == sum(path.stat().st_size for path in (tmp_path / "unit").iterdir())


@pytest.mark.parametrize("batches", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2], [0]], []])
def test_a_part_whose_samples_are_not_covered_once_is_a_bug(tmp_path, batches):
    writer = open_writer(tmp_path / "unit")
    with pytest.raises(AssertionError, match="exactly once"):
        store(writer, finish(make_part(0, 0, 3), batches))
    writer.abandon()


def test_rows_that_do_not_pair_up_are_a_bug_even_where_their_numbers_do(tmp_path):
    finished = finish(make_part(0, 0, 4), [[0, 1], [2], [3]])
    longer, shorter, paired = finished.pieces
    moved = dataclasses.replace(longer, part_rows=longer.part_rows[:1])
    given = dataclasses.replace(shorter, part_rows=np.array([1, 2]))
    with pytest.raises(AssertionError, match="exactly once"):
        store(open_writer(tmp_path / "unit"), dataclasses.replace(finished, pieces=(moved, given, paired)))


@pytest.mark.parametrize("rows", [[0, 1, 3], [-1, 0, 1]])
def test_rows_that_are_not_of_the_part_are_a_bug(tmp_path, rows):
    finished = finish(make_part(0, 0, 3))
    (piece,) = finished.pieces
    moved = dataclasses.replace(piece, part_rows=np.array(rows))
    with pytest.raises(AssertionError, match="exactly once"):
        store(open_writer(tmp_path / "unit"), dataclasses.replace(finished, pieces=(moved,)))


def test_unexpected_parts_are_bugs(tmp_path):
    writer = open_writer(tmp_path / "unit")
    store(writer, finish(make_part(0, 0, 3)))
    store(writer, finish(make_part(2, 5, 1)))
    for number in (0, 2):
        with pytest.raises(AssertionError, match="not expected"):
            store(writer, finish(make_part(number, 0, 3)))
    with pytest.raises(AssertionError, match="not expected"):
        store(writer, finish(make_part(1, 3, 2, file=make_file(unit="f" * 12))))
    with pytest.raises(AssertionError, match="last part is missing"):
        writer.write()
    store(writer, finish(make_part(3, 6, 1, last=True)))
    assert not writer.complete
    with pytest.raises(AssertionError, match="part 1 is missing"):
        writer.write()
    with pytest.raises(AssertionError, match="not expected"):
        store(writer, finish(make_part(4, 7, 1)))


@pytest.mark.parametrize("first_record", [2, 4])
def test_a_lost_or_repeated_record_is_a_bug(tmp_path, first_record):
    writer = open_writer(tmp_path / "unit")
    store(writer, finish(make_part(0, 0, 3)))
    store(writer, finish(make_part(1, first_record, 3, last=True)))
    with pytest.raises(AssertionError, match="part 1 is missing or misplaced"):
        writer.write()


def test_a_record_that_is_neither_sample_nor_reject_is_a_bug(tmp_path):
    finished = finish(make_part(0, 0, 3, rejected=(1,), last=True))
    writer = open_writer(tmp_path / "unit")
    with pytest.raises(AssertionError, match="not the 3 records from 0 on"):
        store(writer, dataclasses.replace(finished, rejects=()))


def test_abandoning_keeps_the_parts(tmp_path):
    writer = open_writer(tmp_path / "unit")
    writer.abandon()
    for part in parts_of_a_file():
        store(writer, finish(part))
    writer.write()
    writer.abandon()
    writer.abandon()
    assert [path.name for path in tmp_path.iterdir()] == ["unit.parts"]


def test_a_file_of_one_part_has_no_part_file(tmp_path):
    write(tmp_path / "unit", [finish(make_part(0, 0, 2, last=True))])
    assert [path.name for path in tmp_path.iterdir()] == ["unit"]


def test_what_an_earlier_try_left_in_staging_is_replaced(tmp_path):
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit/leftover").touch()
    write(tmp_path / "unit", [finish(make_part(0, 0, 2, last=True))])
    assert sorted(path.name for path in (tmp_path / "unit").iterdir()) == [
        "features.parquet",
        "metrics.parquet",
        "texts.parquet",
    ]


@pytest.mark.parametrize("values", ["float32", "float16"])
def test_samples_of_several_files_in_one_batch_come_out_as_each_alone(values):
    """Made together or one by one; one file has no samples, and one has them in two batches."""
    sizes = [(2, ()), (67, ()), (3, (1,)), (2, (0, 1)), (4, ())]
    parts = [make_part(0, 0, n, rejected=rejected, last=True) for n, rejected in sizes]
    shared = [sample for part in parts for sample in part.part.samples]
    blocks = make_block(shared[:-1]), make_block(shared[-1:])
    blocks[0].features.values[:5] = 1e5  # clipped in float16
    schemas = metrics_schema(INFO.names, CONTRAST_RECIPE), features_schema(values), INFO
    texts = texts_schema(chats=False)
    finished, begin = [], 0
    for part in parts:
        n = len(part.samples)
        own = np.arange(n)
        pieces = [ResultRows(blocks[0], begin + own, own, row_bytes=0)] if n else []
        if part is parts[-1]:
            pieces = [
                ResultRows(blocks[1], np.array([0]), np.array([n - 1]), row_bytes=0),
                ResultRows(blocks[0], begin + own[:-1], own[:-1], row_bytes=0),
            ]
        begin += n
        finished.append(finished_from(part, pieces))
    together = stored_parts(finished, *schemas, texts)
    for part, tables in zip(finished, together, strict=True):
        (alone,) = stored_parts([part], *schemas, texts)
        assert tables.metrics.equals(alone.metrics)
        assert tables.features.equals(alone.features)
        assert tables.texts.equals(alone.texts)
        assert len(tables.texts) == 3 * len(tables.metrics)
        assert tables.clipped == alone.clipped
        assert len(tables.metrics) == len(part.part.samples)
    assert sum(tables.clipped for tables in together) == (5 if values == "float16" else 0)
    samples = [sample for part in parts for sample in part.part.samples if part is not parts[-1]]
    expected = expected_metrics(samples)
    rows = pa.concat_tables([tables.metrics for tables in together[:-1]]).to_pylist()
    assert [row["sample_id"] for row in rows] == [row["sample_id"] for row in expected]


def test_parts_of_an_earlier_attempt_are_the_same_as_new_ones(tmp_path):
    parts = [finish(part) for part in parts_of_a_file()]
    expected = write(tmp_path / "whole", parts)
    first = open_writer(tmp_path / "unit")
    store(first, parts[2])
    store(first, parts[0])

    again = open_writer(tmp_path / "unit")
    stored = stored_extents(again.parts)
    assert stored == {number: parts[number].part.part.extent for number in (0, 2)}
    again.keep_part(make_file(), stored[2], last=True)
    again.keep_part(make_file(), stored[0], last=False)
    assert [again.has(number) for number in range(3)] == [True, False, True]
    store(again, parts[1])
    totals = again.write()
    assert totals.files == expected.files
    assert totals.layers[0].fvu() == expected.layers[0].fvu()
    assert totals.seconds.forward == expected.seconds.forward


def test_a_part_file_of_another_version_is_not_used(tmp_path, monkeypatch):
    writer = open_writer(tmp_path / "unit")
    store(writer, finish(parts_of_a_file()[0]))
    monkeypatch.setattr(parts_module, "FORMAT", parts_module.FORMAT + 1)
    assert stored_extents(writer.parts) == {}
