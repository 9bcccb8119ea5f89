"""Accounts for every file that was dropped: what delivery promises, checked on folders after a drain.

Reads what users read, folders, manifests and Parquet, and shares no code with the daemon, so that a mistake
there is not repeated here. Knows nothing about how the daemon was run or stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

REASON_SUFFIX = ".reason.json"
INPUT = re.compile(r".*\.(json|jsonl|ndjson)(\.(gz|zst))?", re.IGNORECASE | re.DOTALL)  # of names taken up
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"


@dataclass(frozen=True, slots=True)
class Dropped:
    """One file as a user dropped it."""

    records: int | None  # None: the file as a whole must fail
    sha256: str  # of its bytes


@dataclass(frozen=True, slots=True)
class Published:
    """The facts that one published folder states about itself."""

    folder: str
    unit: str
    sha256: str  # of the input
    records: int


@dataclass(frozen=True, slots=True)
class Failure:
    """One reason in `failed/`."""

    name: str  # of the input
    reason: str
    sha256: str | None  # of the file beside it; None where there is no file


def drop(inbox: Path, name: str, content: bytes, records: int | None) -> Dropped:
    """Put a file into an inbox, and say what is to become of it."""
    (inbox / name).write_bytes(content)
    return Dropped(records, hashlib.sha256(content).hexdigest())


def violations(
    inbox: Path, outbox: Path, dropped: dict[str, Dropped], *, may_exhaust: bool = False
) -> list[str]:
    """The violations once `dropped` (by name) was drained, in words; empty where all is sound.

    Sources are expected in `done/` and `failed/` (`on_success = "move"`). With `may_exhaust` a good file may
    also have failed because its attempts were used up; one that vanished always may.
    """
    results, found = published(outbox, dropped)
    found += wrong_index(outbox, results)
    failures, wrong = failed_files(inbox / "failed")
    found += wrong
    found += miscounted(inbox / "done", failures, results, dropped, may_exhaust=may_exhaust)
    found += leftovers(inbox, outbox)
    return found


def published(outbox: Path, dropped: dict[str, Dropped]) -> tuple[list[Published], list[str]]:
    """Every published folder, and what is wrong with them. Holds at any moment, also before a drain."""
    results: list[Published] = []
    found: list[str] = []
    for path in sorted(outbox.iterdir()):
        if path.name.startswith("."):
            continue
        try:
            manifest = json.loads((path / MANIFEST).read_bytes())
            result = Published(path.name, manifest["unit"], manifest["input"]["sha256"], manifest["records"])
            found += wrong_folder(path, manifest)
        except (OSError, ValueError, KeyError, TypeError) as error:  # pyarrow's errors are of these
            found.append(f"{path.name}: not readable as results: {type(error).__name__}: {error}")
        else:
            results.append(result)
    records = {file.sha256: file.records for file in dropped.values()}
    for result in results:
        if result.sha256 not in records:
            found.append(f"{result.folder}: made from a content that was never dropped")
        elif records[result.sha256] != result.records:
            found.append(f"{result.folder}: {result.records} records, {records[result.sha256]} were dropped")
    found += [f"unit {unit}: {n} folders" for unit, n in Counter(r.unit for r in results).items() if n > 1]
    return results, found


def wrong_folder(folder: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The violations within one published folder; raises where it can't be read."""
    name = folder.name
    if not name.endswith(f"-{manifest['unit']}"):
        yield f"{name}: holds unit {manifest['unit']}"
    rows, rejects, records = manifest["rows"], manifest["rejects"], manifest["records"]
    if rows + rejects != records:
        yield f"{name}: {rows} rows + {rejects} rejects != {records} records"
    listed = {file["name"]: file for file in manifest["files"]}
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    if there != listed.keys():
        yield f"{name}: holds {sorted(there)}, its manifest lists {sorted(listed)}"
    for file in listed.values():
        yield from wrong_file(folder / file["name"], file)
    metrics = pq.ParquetFile(folder / "metrics.parquet").read(columns=["record_index"])["record_index"]
    rejected = [record["record_index"] for record in json_lines(folder / REJECTS)]
    if (len(metrics), len(rejected)) != (rows, rejects):
        yield f"{name}: {len(metrics)} rows and {len(rejected)} rejects, not {rows} and {rejects}"
    if sorted(metrics.to_pylist() + rejected) != list(range(records)):
        yield f"{name}: record_index over rows and rejects is not each of 0..{records - 1} once"
    features = pq.ParquetFile(folder / "features.parquet").read(columns=["record_index"])["record_index"]
    if set(pc.unique(features).to_pylist()) != set(metrics.to_pylist()):
        yield f"{name}: features.parquet is not about the records of metrics.parquet"
    texts = pq.ParquetFile(folder / "texts.parquet").read(columns=["record_index"])["record_index"]
    if pc.unique(texts).to_pylist() != metrics.to_pylist():
        yield f"{name}: texts.parquet is not about the records of metrics.parquet"


def wrong_file(path: Path, listed: dict[str, Any]) -> Iterator[str]:
    """The properties of one file that differ from its manifest."""
    content = path.read_bytes()
    is_table = path.suffix == ".parquet"
    rows = pq.ParquetFile(path).metadata.num_rows if is_table else content.count(b"\n")
    true = {"bytes": len(content), "rows": rows, "sha256": hashlib.sha256(content).hexdigest()}
    for key, value in true.items():
        if listed[key] != value:
            yield f"{path.parent.name}/{path.name}: {key} {value}, its manifest says {listed[key]}"


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def wrong_index(outbox: Path, results: list[Published]) -> Iterator[str]:
    """Units that a later duplicate would not find by the index, `.units/`, where there is one."""
    index = outbox / ".units"
    if not index.is_dir():
        return
    notes = {path.name: path.read_text() for path in index.iterdir() if not path.is_symlink()}
    for result in results:
        if notes.get(result.unit) != f"{result.folder}\n":
            yield f"{result.folder}: the index has {notes.get(result.unit)} for its unit"
    for path in index.iterdir():
        if path.is_symlink():
            yield f"{path.name}: a link, at which a copy that follows links fails"


def failed_files(folder: Path) -> tuple[list[Failure], list[str]]:
    """The failures in `failed/`, and the violations there: a file without its reason, or the reverse."""
    failures: list[Failure] = []
    found: list[str] = []
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    notes = {name for name in names if name.endswith(REASON_SUFFIX) and name + REASON_SUFFIX not in names}
    for note in sorted(notes):
        name = note.removesuffix(REASON_SUFFIX)
        try:
            content = json.loads((folder / note).read_bytes())
            failure = Failure(content["name"], content["reason"], None)
            noted = content.get("sha256")
        except (ValueError, KeyError, TypeError) as error:
            found.append(f"failed/{note}: not readable: {type(error).__name__}: {error}")
            continue
        if name in names:
            failure = Failure(failure.name, failure.reason, sha256_of(folder / name))
            if noted not in (None, failure.sha256):
                found.append(f"failed/{note}: its sha256 is not that of the file")
        elif failure.reason != "vanished":
            found.append(f"failed/{note}: its file is not there")
            continue
        failures.append(failure)
    found += [
        f"failed/{name}: no reason beside it" for name in names - notes if name + REASON_SUFFIX not in names
    ]
    return failures, found


def miscounted(
    done: Path,
    failures: list[Failure],
    results: list[Published],
    dropped: dict[str, Dropped],
    *,
    may_exhaust: bool,
) -> Iterator[str]:
    """Contents that did not end exactly once, or not where they belong."""
    excused = {"vanished"} | ({"attempts_exhausted"} if may_exhaust else set())
    retired = Counter(sha256_of(path) for path in done.iterdir()) if done.is_dir() else Counter[str]()
    failed: dict[str, list[str]] = defaultdict(list)  # content -> reasons
    for failure in failures:
        if failure.sha256 is not None:
            failed[failure.sha256].append(failure.reason)
        elif failure.name in dropped:
            failed[dropped[failure.name].sha256].append(failure.reason)
    folders = {result.sha256 for result in results}
    names: dict[str, list[str]] = defaultdict(list)
    for name, file in dropped.items():
        names[file.sha256].append(name)
    expected = {file.sha256: file for file in dropped.values()}
    for content, file in expected.items():
        who = ", ".join(names[content])
        counts = retired[content], len(failed[content])
        if sum(counts) != len(names[content]):
            yield f"{who}: dropped {len(names[content])} times, {counts[0]} in done/, {counts[1]} in failed/"
        if file.records is None and (retired[content] or content in folders):
            yield f"{who}: must fail, but was accepted"
        if file.records is not None and (reasons := set(failed[content]) - excused):
            yield f"{who}: failed though it is good: {', '.join(sorted(reasons))}"
        if retired[content] and content not in folders:
            yield f"{who}: in done/ without results"
        if content in folders and not retired[content]:
            yield f"{who}: published, but not in done/"
        if content in folders and failed[content]:
            yield f"{who}: published and in failed/"
    for content in (retired.keys() | failed.keys()) - expected.keys():
        yield f"done/ or failed/ holds a content that was never dropped, sha256 {content}"


def leftovers(inbox: Path, outbox: Path) -> Iterator[str]:
    """The files that a drain should have taken up or taken away."""
    for path in sorted(inbox.iterdir()):
        if is_input(path.name) and path.is_file() and not path.is_symlink():
            yield f"inbox/{path.name}: not taken up"
    for folder in (inbox / ".claimed", outbox / ".staging"):
        for path in sorted(folder.rglob("*")):
            if path.parent != folder or not is_lock(path):
                yield f"{folder.parent.name}/{path.relative_to(folder.parent)}: left over"
    for path in sorted(outbox.glob(".*")):
        if path.name not in (".staging", ".units") and not is_lock(path):
            yield f"outbox/{path.name}: left over"


def is_input(name: str) -> bool:
    """Whether the daemon is to take up a file of this name; it leaves every other to its owner."""
    return not name.startswith((".", "~$", "~syncthing~")) and INPUT.fullmatch(name) is not None


def is_lock(path: Path) -> bool:
    """A hidden empty file: locks between processes stay, since removing one that is held breaks it."""
    return path.name.startswith(".") and path.is_file() and not path.stat().st_size


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
