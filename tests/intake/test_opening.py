"""The first look into claimed files: each by itself, whatever is wrong with another."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from daemon.intake.opening import SMALL_BYTES, OpenedFile, Opener
from daemon.records import Claim, Part
from tests.sources import LIMITS, NO_IDENTITY

DESCRIPTORS = Path("/proc/self/fd")  # of this process
LINE = json.dumps({"text": "fine"}) + "\n"


def nothing_published(units: Sequence[str]) -> list[Path | None]:
    return [None] * len(units)


def opener(
    published: Callable[[Sequence[str]], list[Path | None]] = nothing_published, results_key: str = "key"
) -> Opener:
    return Opener(recipe=None, limits=LIMITS, results_key=results_key, published=published, clock=lambda: 7.0)


def claim_of(folder: Path, name: str, content: bytes | None = LINE.encode(), attempt: int = 1) -> Claim:
    """A claim of a file that was written just now, or is gone."""
    if content is not None:
        (folder / name).write_bytes(content)
    return Claim(name, str(folder / name), attempt, NO_IDENTITY)


def texts(file: OpenedFile) -> list[tuple[str, ...]]:
    assert file.parts is not None
    return [sample.texts for part in file.parts if isinstance(part, Part) for sample in part.samples]


@pytest.mark.parametrize(
    ("size", "held"), [(SMALL_BYTES - 1, True), (SMALL_BYTES, True), (SMALL_BYTES + 1, False)]
)
def test_a_small_file_is_held_with_its_parts_and_a_larger_one_is_a_stream(tmp_path, size, held):
    content = LINE.encode().ljust(size)
    (file,) = opener().open_all([claim_of(tmp_path, "f.jsonl", content)])
    with file.stream as stream:
        assert stream.read() == content
    assert file.error is None
    assert (file.known_source.size, file.known_source.opened_at) == (size, 7.0)
    assert file.known_source.sha256 == hashlib.sha256(content).hexdigest()
    assert (file.parts is not None) == held
    if held:
        assert texts(file) == [("fine",)]
    file.close()


def test_a_compressed_file_is_a_stream_however_small(tmp_path):
    content = gzip.compress(LINE.encode())
    (file,) = opener().open_all([claim_of(tmp_path, "f.jsonl.gz", content)])
    with file.stream as stream:
        assert stream.read() == content
    assert (file.error, file.parts) == (None, None)


def test_a_file_that_is_gone_or_unusable_costs_itself_alone(tmp_path):
    asked: list[int] = []

    def none_of(units: Sequence[str]) -> list[Path | None]:
        asked.append(len(units))
        return nothing_published(units)

    gone, good, empty, other, last = opener(none_of).open_all(
        [
            claim_of(tmp_path, "gone.jsonl", None),
            claim_of(tmp_path, "good.jsonl"),
            claim_of(tmp_path, "empty.jsonl", b""),
            claim_of(tmp_path, "other.csv"),
            claim_of(tmp_path, "last.jsonl"),
        ]
    )
    assert asked == [3]
    reasons = [file.error and file.error.reason for file in (gone, empty, other)]
    assert reasons == ["vanished", "empty", "unsupported_format"]
    assert (gone.source, other.source) == (None, None)
    assert [file.error for file in (good, last)] == [None, None]
    assert texts(good) == texts(last) == [("fine",)]


def test_of_files_whose_results_are_there_no_record_is_read(tmp_path):
    there = tmp_path / "results"
    first, second = opener(lambda units: [None, there]).open_all(
        [claim_of(tmp_path, "new.jsonl"), claim_of(tmp_path, "known.jsonl", b"{oops")]
    )
    assert (first.published, texts(first)) == (None, [("fine",)])
    assert (second.published, second.parts, second.error) == (there, None, None)


def test_what_an_earlier_attempt_stored_of_a_file_is_asked_for_before_it_is_read(tmp_path):
    first, again = opener().open_all(
        [claim_of(tmp_path, "first.jsonl"), claim_of(tmp_path, "again.jsonl", attempt=2)]
    )
    assert texts(first) == [("fine",)]
    assert (again.parts, again.error, again.stream.read()) == (None, None, LINE.encode())


def test_a_unit_is_content_under_settings_read_as_a_format(tmp_path):
    claims = [claim_of(tmp_path, name) for name in ("a.jsonl", "b.NDJSON", "a.json")]
    claims.append(claim_of(tmp_path, "c.jsonl", LINE.encode() * 2))
    lines, lines_too, document, other = (file.known_source.unit for file in opener().open_all(claims))
    (with_other_settings,) = opener(results_key="other").open_all(claims[:1])
    assert lines == lines_too
    assert len({lines, document, other, with_other_settings.known_source.unit}) == 4
    assert len(lines) == 12  # as folders are named by it, for the next version too


def test_where_the_machine_refuses_nothing_stays_open(tmp_path):
    def refuse(units: Sequence[str]) -> list[Path | None]:
        raise OSError(errno.EMFILE, "too many open files")

    claims = [claim_of(tmp_path, "f.jsonl.gz", gzip.compress(b"[]")), claim_of(tmp_path, "gone.jsonl", None)]
    before = len(list(DESCRIPTORS.iterdir()))
    with pytest.raises(OSError, match="too many") as caught:
        opener(refuse).open_all(claims)
    assert len(list(DESCRIPTORS.iterdir())) == before, "while the error still holds what was opened"
    assert caught.value.errno == errno.EMFILE
