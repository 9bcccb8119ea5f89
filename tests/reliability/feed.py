"""Drops files of every kind into an inbox, remembers them, and counts every record again afterwards."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import zstandard

from daemon.fs import durable
from tests.reliability.handling import waiting
from tests.reliability.ledger import Dropped

PART_RECORDS = 16
NAMES_AGAIN = 0.1  # share of the files that are dropped under a name used before

Kind = Literal["single", "json", "jsonl", "parts", "gzip", "zstd", "bad_records", "duplicate", "unusable"]
KINDS: dict[Kind, int] = {
    "single": 4,
    "json": 4,
    "jsonl": 4,
    "parts": 3,
    "gzip": 1,
    "zstd": 1,
    "bad_records": 2,
    "duplicate": 1,
    "unusable": 1,
}


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a file; `records` is None where it must fail."""

    suffix: str
    raw: bytes
    records: int | None


class Feed:
    """Drops files into an inbox and remembers them in `dropped`. Same seed, same files."""

    def __init__(self, inbox: Path, rng: random.Random, kinds: dict[Kind, int] = KINDS) -> None:
        inbox.mkdir(parents=True, exist_ok=True)
        self.inbox = inbox
        self.dropped: dict[str, Dropped] = {}  # by a name of its own, whatever name it was dropped under
        self._rng = rng
        self._kinds = kinds
        self._recent: list[Content] = []

    @property
    def records(self) -> int:
        """In all different contents that can be used."""
        return sum({entry.sha256: entry.records or 0 for entry in self.dropped.values()}.values())

    def waiting(self) -> int:
        return len(waiting(self.inbox))

    def top_up(self, files: int) -> None:
        """Drop files until so many wait."""
        for _ in range(files - self.waiting()):
            self.drop()

    def drop(self, kind: Kind | None = None) -> str:
        """Let one more file appear, whole; its name. Now and then a name that is in use is used again."""
        if kind is None:
            (kind,) = self._rng.choices(list(self._kinds), list(self._kinds.values()))
        content = self._content(kind)
        again = self._rng.random() < NAMES_AGAIN
        return self.place(content, f"again{content.suffix}" if again else None)

    def place(self, content: Content, name: str | None = None) -> str:
        """Drop a file, under `name` where none waits under it."""
        serial = len(self.dropped)
        draft = self.inbox / ".draft"
        draft.write_bytes(content.raw)
        unique = f"{serial:06}{content.suffix}"
        if name is None or not durable.move_without_replacing(draft, self.inbox / name):
            name = unique
            draft.rename(self.inbox / name)
        self.dropped[unique] = Dropped(content.records, hashlib.sha256(content.raw).hexdigest())
        return name

    def _content(self, kind: Kind) -> Content:
        if kind == "duplicate" and self._recent:
            return self._rng.choice(self._recent)
        content = self._new_content(kind)
        if content.records is not None:
            self._recent = [*self._recent[-20:], content]
        return content

    def _new_content(self, kind: Kind) -> Content:
        rng, serial = self._rng, len(self.dropped)
        lines = [as_json(serial, number) for number in range(rng.randint(1, PART_RECORDS - 1))]
        if kind == "parts":
            lines = [as_json(serial, number) for number in range(rng.randint(2, 5) * PART_RECORDS + 1)]
            return Content(".jsonl", joined(lines), len(lines))
        if kind == "gzip":
            return Content(".jsonl.gz", gzip.compress(joined(lines), mtime=0), len(lines))
        if kind == "zstd":
            return Content(".jsonl.zst", zstandard.compress(joined(lines)), len(lines))
        if kind == "bad_records":
            lines = [as_json(serial, number) for number in range(3 * PART_RECORDS)]
            for number in rng.sample(range(1, len(lines)), 10):  # the first says which recipe it is
                lines[number] = rng.choice(['{"prompt": "only"}', "{oops", "[]"])
            return Content(".jsonl", joined(lines), len(lines))
        if kind == "unusable":
            whole = gzip.compress(joined([as_json(serial, number) for number in range(3 * PART_RECORDS)]))
            broken = [
                (".json", f"[{', '.join(lines)}".encode()),
                (".jsonl.gz", whole[:-20]),  # fails when some of it is read
                (".jsonl", b"\x89PNG\0" + f"picture {serial}".encode()),
            ]
            return Content(*rng.choice(broken), None)
        if kind == "single":
            return Content(".json", f"[{lines[0]}]".encode(), 1)
        if kind == "jsonl":
            return Content(".jsonl", joined(lines), len(lines))
        return Content(".json", f"[{', '.join(lines)}]".encode(), len(lines))


def as_json(serial: int, number: int) -> str:
    """One record, unlike every other."""
    return json.dumps(
        {
            "id": f"{serial}-{number}",
            "prompt": f"File {serial} says " + "once " * (number % 5) + f"that {number} is",
            "fact": str(number),
            "hallucination": str(number + 1 + serial % 3),
        }
    )


def joined(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


@dataclass(frozen=True, slots=True)
class Recount:
    """Records of different contents: wanted, found at least once, found again."""

    records: int
    lost: int
    duplicated: int


def recount(outbox: Path, dropped: dict[str, Dropped]) -> Recount:
    """Every record in the outbox, counted without believing any manifest's numbers."""
    wanted = {(d.sha256, index) for d in dropped.values() for index in range(d.records or 0)}
    found: Counter[tuple[str, int]] = Counter()
    for path in outbox.glob("[!.]*/manifest.json"):
        sha256 = json.loads(path.read_bytes())["input"]["sha256"]
        found.update((sha256, index) for index in record_indices(path.parent))
    return Recount(len(wanted), len(wanted - found.keys()), found.total() - len(found))


def record_indices(folder: Path) -> list[int]:
    """Of every row and every reject in a published folder."""
    indices: list[int] = pq.read_table(folder / "metrics.parquet", columns=["record_index"])[0].to_pylist()
    rejects = folder / "rejects.jsonl"
    if rejects.exists():
        indices += [json.loads(line)["record_index"] for line in rejects.read_bytes().splitlines()]
    return indices
