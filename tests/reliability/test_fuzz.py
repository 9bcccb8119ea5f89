"""Generated hostile input: every record becomes a row or a reject, every file ends in one of two folders.

`LENSD_FUZZ_RECORDS` and `LENSD_FUZZ_FILES` say how much of it, `LENSD_FUZZ_SEED` which; a failure names the
seed of the file or folder that failed. Knows the input formats and none of the reader's insides.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gzip
import hashlib
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import zstandard

from daemon.config import InboxSection
from daemon.errors import FileError
from daemon.recipes import BUILT_IN_RECIPES
from daemon.records import Part, Reject, Sample
from daemon.rejects import REJECT_REASONS
from daemon.source.reader import part_blocks
from tests.reliability.daemons import Job
from tests.reliability.ledger import Dropped, drop, failed_files, is_input, violations
from tests.support import sources
from tests.support.sources import parts_of, unclaimed

N_RECORDS = int(os.environ.get("LENSD_FUZZ_RECORDS", "3000"))
N_FILES = int(os.environ.get("LENSD_FUZZ_FILES", "200"))
SEED = int(os.environ.get("LENSD_FUZZ_SEED", "0"))
FILES_A_RUN = 100
LIMITS = dataclasses.replace(
    sources.LIMITS,
    max_record_bytes=20_000,
    max_nesting=32,
    max_decompressed_bytes=18 << 20,
    max_compression_ratio=500,
    part_records=7,
)
FLAGS = {
    f"inbox.{name}": value
    for name, value in dataclasses.asdict(LIMITS).items()
    if name in InboxSection.model_fields
}
FILE_REASONS = {
    "binary",
    "compression_bomb",
    "corrupt_compression",
    "decompressed_too_large",
    "empty",
    "malformed_json",
    "no_recipe",
    "no_usable_record",
    "unsupported_encoding",
    "unsupported_layout",
    "zstd_dictionary",
    "zstd_window_too_large",
}
MAX_TEXT_TOKENS = 64
JOINT = re.compile(rb"\}[ \t\r\x1e,\xef\xbb\xbf]*\{")  # where one line may hold several records
GOES_ON = re.compile(rb"^[\]}:,]|[\[{:,]$")  # a line that may lie within a value
# These reject records too.
OF_LATER_STAGES = {
    *("text_too_long", "empty_text", "unknown_token"),
    *("out_of_memory", "worker_died", "not_finite_activation"),
    *("no_chat_template", "chat_refused", "roles_unclear", "no_token_counts"),
}
OF_OTHER_FORMATS = {"malformed_csv"}
FLAGS["batching.max_text_tokens"] = MAX_TEXT_TOKENS
BOMB = gzip.compress(b" " * (17 << 20))
LARGE = gzip.compress(b'["' + b"".join(b"%d%4000d" % (n**5, n) for n in range(5000)))  # ratio below 500

NASTY = (
    *'\ufeff\u2028\x85\x7f\u202e\x00\\"\uffff\U0001f600\U0010ffffё中{]\n\r\t ',
    *("\x1b[2J", "e\u0301", "{prompt}", "%s", "<|endoftext|>", "</s>"),
)
ODD_VALUES = (None, True, 0, -1, 1.5, 10**30, 1e308, 5e-324, -0.0, [], {}, ["a"], {"a": [1]})
PATCHES = (b"", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\xff", b"\0", b"\xc3", b"\x1f", b"a")
NAMES = (
    *(b"", b" ", b"two\nlines", b"\r\n", b"\x01\x1b[2J", b"caf\xe9\xff", b"\xed\xa0\x80", b"\xe2\x80\xae"),
    *rb"""-rf -- a.. ~ %s%n{0} $(touch`id`) '"\ C:\ nul. *?[a] done x.tmp. a.json. a.reason.json""".split(),
    *(b"n" * 255, "é".encode() * 127, b"\xff" * 255, "\U0001f47b".encode() * 20),
)
OTHER_ENDS = (b"%d", b"%d.xlsx", b"%d.json.txt", b"%d.json.bz2", b"%d.jsonl.gz.gz", b"%d.reason.json")
NOT_TAKEN_UP = (b".%d.json", b"..%d.json", b"%d.json.tmp", b"%d.json~", b"%d.json.part")  # whole names


def words(rng: Random) -> str:
    """A short text, now and then an odd or an empty one."""
    return "".join(
        rng.choice(NASTY) if rng.random() < 0.3 else "word "[: rng.randint(1, 5)]
        for _ in range(rng.randint(0, 12))
    )


def fields(rng: Random) -> dict[str, object]:
    record: dict[str, object] = {"prompt": words(rng), "fact": words(rng), "hallucination": words(rng)}
    if rng.random() < 0.3:
        record = {"text": words(rng)}
    for name in ("id", "domain", "complexity", "", "sample_id", words(rng)):
        if rng.random() < 0.2:
            record[name] = rng.choice([words(rng), *ODD_VALUES])
    return record


def conversation(rng: Random) -> list[object]:
    """Messages, some of them odd."""
    return [
        {
            "role": rng.choice(["user", "assistant", words(rng)]),
            "content": rng.choice([words(rng), *ODD_VALUES]),
        }
        for _ in range(rng.randint(0, 2))
    ]


def good(rng: Random) -> bytes:
    return json.dumps(fields(rng), ensure_ascii=rng.random() < 0.5).encode()


def with_field(value: bytes) -> bytes:
    return b'{"prompt": "a", "fact": "b", "hallucination": "c", "x": ' + value + b"}"


def mutated(rng: Random) -> bytes:
    raw = bytearray(good(rng))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw) + 1)
        raw[at : at + rng.randint(0, 3)] = rng.choice(PATCHES)
    return bytes(raw)


def random_bytes(rng: Random) -> bytes:
    return rng.randbytes(rng.randint(0, 60))


def deep(rng: Random) -> bytes:
    depth = rng.choice([3, 31, 32, 33, 500, 999, 5000])
    opening, inside, closing = rng.choice([(b"[", b"", b"]"), (b'{"a":', b"1", b"}")])
    return with_field(opening * depth + inside + closing * (depth - rng.choice([0, 0, 1])))


def number(rng: Random) -> bytes:
    digits = b"9" * rng.choice([1, 20, 308, 400, 4300, 4301, 15_000])
    powers = [b"1e" + digits[:9], b"1E-" + digits[:9]]
    value = rng.choice([digits, b"-" + digits, b"0." + digits, *powers, *b"-0 01 +1 1. .5 0x1".split()])
    name = rng.choice([b'"text"', b'"text": "a", "complexity"', b'"text": "a", "id"', b'"text": "a", ""'])
    return b"{" + name + b": " + value + b"}"


def surrogate(rng: Random) -> bytes:
    escapes = rb"\ud800 \udc00 \udfff\ud800 \ud83d\ude00 \uD8 \u".split()
    value = rng.choice([*escapes, b"\xed\xa0\x80", b"\xf5\x80\x80\x80"])
    return rng.choice([b'{"text": "%s"}', b'{"text": "a", "%s": 1}', with_field(b'["%s"]')]) % value


def constant(rng: Random) -> bytes:
    return with_field(rng.choice(b"NaN -Infinity Infinity [[NaN]] nan undefined None True".split()))


def twice(rng: Random) -> bytes:
    key = rng.choice([b"text", b"", b"k" * 500, rb"te\u0078t"])
    return b'{"text": "a", "%s": 1, "%s": 2}' % (key, key)


def lacking(rng: Random) -> bytes:
    record = fields(rng)
    for name in rng.sample(sorted(record), rng.randint(1, len(record))):
        if rng.random() < 0.5:
            del record[name]
        else:
            record[name] = rng.choice(ODD_VALUES)
    return json.dumps(record).encode()


def large(rng: Random) -> bytes:
    length = rng.choice([19_930, 19_980, 20_000, 20_001, 60_000])
    inside = rng.choice([b'"' + b"x" * length + b'"', b'"' + b'\\"' * (length // 2), b"[1," * (length // 3)])
    return rng.choice([with_field(inside), inside, b"9" * length, b" " * length])


def control(rng: Random) -> bytes:
    raw = bytes(rng.choice(b"\x01\x08\t\v\f\r\x1b\x1f\x7f") for _ in range(3))
    return rng.choice([with_field(b'"' + raw + b'"'), raw + good(rng) + raw, raw])


def scalar(rng: Random) -> bytes:
    odd = b'null true "text" 12 [] {} [{"text":"a"}] { ] " tru , :'.split()
    return rng.choice([*odd, b"", b"\xef\xbb\xbf" + good(rng)])


KINDS = (mutated, random_bytes, deep, number, surrogate, constant, twice, lacking, large, control, scalar)


def records(rng: Random, n: int) -> list[bytes]:
    """Some of them good, the first one mostly; now and then they are conversations."""
    if rng.random() < 0.1:
        return [json.dumps({"messages": conversation(rng)}).encode() for _ in range(n)]
    return [(good if rng.random() < (0.4 if i else 0.8) else rng.choice(KINDS))(rng) for i in range(n)]


def lines_of(rng: Random, raw: list[bytes]) -> bytes:
    newlines = rng.choice([[b"\n"], [b"\n"], [b"\r\n"], [b"\n", b"\r\n", b"\n\n", b"\n \t\n", b"\r"]])
    lines = b"".join(record + rng.choice(newlines) for record in raw)
    return lines if rng.random() < 0.5 else lines.rstrip(b"\r\n")


def array_of(rng: Random, raw: list[bytes]) -> bytes:
    """Mostly sound: a record that would damage the frame is in only now and then."""
    if rng.random() < 0.8:
        raw = [record for record in raw if sound(record)] or [good(rng)]
    array = (
        b"[" + rng.choice([b",", b", ", b"\r\n,\n", b",\n\t"]).join(raw) + rng.choice([b"]", b"]\n", b" ]"])
    )
    if rng.random() < 0.6:
        return array
    before = rng.choice([b"", b'"n": [1, "]"], ', b'"sample": {"samples": []}, "\\q": 1, '])
    after = rng.choice([b"", b', "z": "}"', b', "samples": [3]'])
    return b"{" + before + rng.choice([b'"samples": ', rb'"s\u0061mples":']) + array.strip() + after + b"}"


def value_of(record: bytes) -> object:
    """The value of a record, where it is valid JSON that can be written again; None for any other."""
    try:
        value = json.loads(record)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value


def stream_of(rng: Random, raw: list[bytes]) -> bytes:
    """Values one after the other, each printed in some way, as of `jq`, or as a sequence of RFC 7464."""
    indent = rng.choice([None, 0, 2])
    values = [value_of(record) for record in raw]
    printed = [
        record if value is None else json.dumps(value, indent=indent, ensure_ascii=False).encode()
        for record, value in zip(raw, values, strict=True)
    ]
    before = rng.choice([b"", b"", b"\x1e", b"\xef\xbb\xbf"])
    return b"".join(before + record + rng.choice([b"\n", b"", b",\n", b"\r\n"]) for record in printed)


def table_of(rng: Random, raw: list[bytes]) -> bytes:
    """Records as pandas and others write them, in an object or by their columns."""
    rows = [value for value in map(value_of, raw) if isinstance(value, dict)] or [fields(rng)]
    columns = {name: {str(number): row.get(name) for number, row in enumerate(rows)} for name in rows[0]}
    table: object = rng.choice(
        [
            {"schema": {"fields": []}, "data": rows},
            {"a": [{"b": 1}], rng.choice(["data", "samples"]): rows},
            {"data": rows, "test": rows},
            columns,
            {str(number): row for number, row in enumerate(rows)},
            {"columns": [*rows[0]], "index": [0], "data": [[*row.values()] for row in rows]},
            [[*row.values()] for row in rows],
        ]
    )
    return json.dumps(table, indent=rng.choice([None, 1])).encode()


def sound(record: bytes) -> bool:
    """Whether it is one JSON value, as `json` reads it, whatever it holds."""
    try:
        json.loads(record.decode("utf-8", "surrogateescape"), strict=False, parse_int=len)
    except (ValueError, RecursionError):
        return False
    return True


def damaged(rng: Random, content: bytes) -> bytes:
    match rng.randrange(9):
        case 0:
            return content[: rng.randrange(len(content) + 1)]
        case 1:
            return rng.choice([b"\xef\xbb\xbf", b"\xff\xfe", b" \n", b"\0"]) + content
        case 2:
            return content + rng.choice([b"tail", b"\0", content, b"]", b"\xef\xbb\xbf"])
        case 3:
            return content.decode("utf-8", "replace").encode("utf-16")
        case 4:
            return rng.randbytes(rng.randint(0, 300))
        case 5:
            at = rng.randrange(len(content) + 1)
            return content[:at] + rng.randbytes(2) + content[at + rng.randint(0, 4) :]
    return content


def squeezed(rng: Random, content: bytes) -> tuple[bytes, str]:
    """Content as it may be compressed, truly or not, and the suffix that says so."""
    suffix = rng.choice(["", "", "", ".gz", ".zst", ".GZ", ".Zst"])
    if not suffix:
        return content, suffix
    pack = gzip.compress if suffix.lower() == ".gz" else zstandard.compress
    half = rng.randrange(len(content) + 1)
    match rng.randrange(8):
        case 0:
            return pack(content)[: -rng.randint(1, 30)], suffix
        case 1:
            packed = bytearray(pack(content))
            packed[rng.randrange(len(packed))] ^= 1 << rng.randrange(8)
            return bytes(packed), suffix
        case 2:
            return pack(content[:half]) + pack(b"") + pack(content[half:]), suffix
        case 3:
            return pack(content) + rng.choice([b"\0" * 9, b"junk", pack(content)[:9]]), suffix
        case 4 if suffix == ".gz":
            return rng.choice([BOMB, LARGE]) + rng.randbytes(4), suffix
        case 5:
            return content, suffix
        case 6:
            return pack(content), rng.choice(["", ".gz", ".zst"])
        case 7 if rng.random() < 0.3:
            return pack(pack(content)), suffix
    return pack(content), suffix


@dataclass(frozen=True, slots=True)
class Hostile:
    """One generated file."""

    suffix: str  # of a name that says what it claims to hold
    content: bytes
    plain: bool  # is not compressed, nor named so
    lines: int | None  # records that it holds beyond doubt; None: not known


def hostile_file(rng: Random, max_records: int) -> Hostile:
    raw = records(rng, rng.randint(1, max_records))
    write = rng.choices([lines_of, array_of, stream_of, table_of], [5, 4, 2, 1])[0]
    content = write(rng, raw)
    if rng.random() < 0.25:
        content = damaged(rng, content)
    packed, compression = squeezed(rng, content)
    named_lines = (write is lines_of) == (rng.random() < 0.8)
    form = rng.choice([".jsonl", ".ndjson", ".JSONL"] if named_lines else [".json", ".JSON"])
    plain = packed == content and not compression
    return Hostile(form + compression, packed, plain, certain_lines(content) if plain else None)


def certain_lines(content: bytes) -> int | None:
    """How many records a content holds that is JSON Lines beyond doubt.

    Its first two lines are objects, and at no newline may a value go on.
    """
    blank = b" \t\r\n\v\f\xef\xbb\xbf"  # and what a byte-order mark is made of
    lines = [
        line for line in content.split(b"\n") if line.strip(blank) or len(line) > LIMITS.max_record_bytes
    ]
    if len(lines) < 2 or any(JOINT.search(line) for line in lines) or not content.startswith(b"{"):
        return None
    if any(GOES_ON.search(line) for line in map(bytes.strip, lines)):
        return None
    whole = all(sound(line) and line.lstrip().startswith(b"{") for line in lines[:2])
    return len(lines) if whole else None


def name_of(rng: Random, serial: int, suffix: str) -> bytes:
    """A hostile file name of at most 255 bytes, unlike any other."""
    end = f"{serial}{suffix}".encode()
    if rng.random() < 0.03:
        return rng.choice(NOT_TAKEN_UP) % serial
    if rng.random() < 0.06:
        end = rng.choice(OTHER_ENDS) % serial
    return rng.choice(NAMES)[: 255 - len(end)] + end


def read(path: Path, *, whole: bool) -> list[Part]:
    """A file's parts, from its whole content or from a stream of it. Raises FileError."""
    if not whole:
        return asyncio.run(parts_of(path, limits=LIMITS))
    blocks = part_blocks(
        io.BytesIO(path.read_bytes()), unclaimed(path), recipes=BUILT_IN_RECIPES, limits=LIMITS
    )
    return [part for parts in blocks for part in parts]


def outcome_of(path: Path, *, whole: bool) -> list[Sample | Reject] | tuple[str, str]:
    """Each record as what it became, or the reason and message of a file that fails."""
    try:
        parts = read(path, whole=whole)
    except FileError as error:
        return error.reason, str(error)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    assert [part.extent.number for part in parts] == list(range(len(parts)))
    entries: list[Sample | Reject] = []
    for part in parts:
        inside = sorted((*part.samples, *part.rejects), key=lambda entry: entry.record_index)
        assert (part.extent.first_record, part.extent.records) == (len(entries), len(inside))
        assert part.extent.byte_offset == inside[0].byte_offset
        entries += inside
    return entries


def usable(entry: Sample | Reject) -> bool:
    """Whether a record comes to a row: each of its texts has a token, one for each byte, and not too many.

    The model has no chat template.
    """
    texts = () if isinstance(entry, Reject) else entry.texts
    sizes = [len(text.encode()) if isinstance(text, str) else 0 for text in texts] or [0]
    return min(sizes) > 0 and max(sizes) < MAX_TEXT_TOKENS


def check_entries(entries: list[Sample | Reject], content: bytes | None) -> None:
    assert [entry.record_index for entry in entries] == list(range(len(entries)))
    places = [entry.byte_offset for entry in entries]
    assert places == sorted(set(places))
    for entry in entries:
        if content is not None:
            assert entry.line == content.count(b"\n", 0, entry.byte_offset) + 1
        if isinstance(entry, Reject):
            assert entry.reason in REJECT_REASONS
            assert entry.message.isprintable()
            assert len(entry.message) < 300
        else:
            entry_text = json.dumps(dataclasses.asdict(entry), ensure_ascii=False)
            entry_text.encode()


def test_every_generated_record_is_a_sample_or_a_reject(tmp_path, record_property):
    reasons: Counter[str] = Counter()
    seen = serial = 0
    while seen < N_RECORDS:
        seed = f"{SEED}.record.{serial}"
        serial += 1
        file = hostile_file(Random(seed), 40)
        path = tmp_path / f"f{file.suffix}"
        path.write_bytes(file.content)
        try:
            outcome = outcome_of(path, whole=False)
            if file.plain:
                assert outcome == outcome_of(path, whole=True)
            if isinstance(outcome, tuple):
                reason, message = outcome
                assert reason in FILE_REASONS
                assert message.isprintable()
                reasons[f"file: {reason}"] += 1
                seen += 1
                continue
            check_entries(outcome, file.content if file.plain else None)
            assert file.lines in (None, len(outcome))
        except Exception as error:
            error.add_note(f"seed {seed!r}, {file.suffix}, {file.content[:500]!r}")
            raise
        seen += len(outcome)
        reasons.update(entry.reason if isinstance(entry, Reject) else "sample" for entry in outcome)
        path.unlink()
    record_property("outcomes", reasons.most_common())
    if N_RECORDS >= 3000:
        assert {*REJECT_REASONS} - OF_LATER_STAGES - OF_OTHER_FORMATS <= reasons.keys()
        assert reasons["sample"] > 0.2 * reasons.total()


@pytest.mark.timeout(120 + N_FILES)
@pytest.mark.parametrize("run", range(-(-N_FILES // FILES_A_RUN)))
def test_every_generated_file_ends_with_results_or_a_reason(daemons, tmp_path, run):
    seed = f"{SEED}.run.{run}"
    rng = Random(seed)
    inbox, outbox, log = tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log"
    inbox.mkdir()
    dropped: dict[str, Dropped] = {}
    contents: set[str] = set()
    for serial in range(min(FILES_A_RUN, N_FILES - run * FILES_A_RUN)):
        file = hostile_file(rng, 6)
        name = os.fsdecode(name_of(rng, serial, file.suffix))
        sha256 = hashlib.sha256(file.content).hexdigest()
        if sha256 in contents:  # of one content, two names could say different things
            continue
        contents.add(sha256)
        entry = drop(inbox, name, file.content, None)
        if not is_input(name):
            continue
        outcome = outcome_of(inbox / name, whole=False)
        fails = isinstance(outcome, tuple) or not any(map(usable, outcome))
        dropped[name] = entry if fails else Dropped(len(outcome), entry.sha256)
    left_alone = {path.name for path in inbox.iterdir()} - dropped.keys()

    code = daemons.run(Job(inbox, outbox, log, flags=FLAGS))

    where = f"seed {seed!r}, see {tmp_path}"
    assert code in (0, 1), where
    wrong = violations(inbox, outbox, dropped)
    assert not wrong, "\n".join([where, *wrong])
    assert {path.name for path in inbox.iterdir() if path.is_file()} == left_alone, where
    failures, _ = failed_files(inbox / "failed")
    assert {failure.reason for failure in failures} <= FILE_REASONS, where
    for path in outbox.glob("*/rejects.jsonl"):
        assert {json.loads(line)["reason"] for line in path.read_bytes().splitlines()} <= {*REJECT_REASONS}, (
            where
        )
