"""Whose a file in the inbox is, by its name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon.source.inputs import InputNames, is_input, is_unfinished
from daemon.source.scan import Scanner, count_waiting

INPUTS = [
    *("a.json", "a.jsonl", "a.ndjson", "a.json.gz", "a.jsonl.zst", "A.JSON", "a.JsonL.GZ", "a b.json"),
    *("x (copy).json", "x - Copy (2).jsonl", "x.sync-conflict-20260101-120000-ABCDEFG.json", "-x.json"),
    *("part-00000-c000.json", "tmpab12cd_e.json", "x.tmp.json", "partial.json", "download.json", "x~1.json"),
    *("a.json.jsonl", "a.2.b.jsonl.gz", "_x.json", "#x.json", "a.reason.json", "caf\udce9.json"),
    *("a.csv", "a.TSV", "a.csv.gz", "a.tsv.zst", "a.parquet", "A.Parquet", "a.json.csv"),
]
TEMPORARY = [
    *("x.jsonl.926A3cE2.partial", "x.jsonl.926a3ce2.partial", "x.jsonl.partial"),  # rclone
    *("x.json.crdownload", "Unconfirmed 12345.crdownload", "x.json.part", "x.json.download"),  # browsers
    *("x.json.opdownload", "x.json.PART"),
    *("x.jsonl.6eF1a2b3", "x.jsonl.gz.Ab12Cd34", "x.jsonl_.gstmp", "x.json.incomplete"),  # of clouds
    *("x.json.filepart", "x.json.aria2", "x.json.!ut", "x.json._COPYING_"),
    *("x.json~", "#x.json#", "x.json.swp", "x.json.bak", "x.json.orig", "x.json.lock"),  # editors
    *("x.json___jb_tmp___", "x.json.tmp", "x.json.temp"),
    *("x.parquet.926A3cE2", "x.csv.gz.Ab12Cd34", "x.parquet.part"),
    *("~$x.json", "~syncthing~x.jsonl", "~syncthing~x.jsonl.tmp"),
]
OTHERS = [
    *("4913", "sedAbC123", "Thumbs.db", "desktop.ini", "README", "notes.txt", "data.xlsx", "x.json.txt"),
    *("x.json.zip", "x.json.bz2", "x.gz", "json", "xjson", "x.json.", "x.jsonlines", "x.json.gz.gz"),
    *("model.safetensors", "data.parquet.gz", "csv", "x.json.1", "core", "x.json "),
]
HIDDEN = [
    *(".x.jsonl.AbCdEf", ".x.json.swp", "._x.json", ".DS_Store", ".#x.json", ".~lock.x.json#", ".json"),
    *(".syncthing.x.jsonl.tmp", ".unison.x.json.0a1b.unison.tmp", ".in.x.json.", ".azDownload-0-x.json"),
]


@pytest.mark.parametrize(
    ("owner", "names"),
    [("input", INPUTS), ("temporary", TEMPORARY), ("other", OTHERS), ("hidden", HIDDEN)],
)
def test_every_name_has_an_owner(owner, names):
    found = {name: InputNames().owner(name) for name in names}
    assert found == dict.fromkeys(names, owner)


def test_patterns_are_of_whole_names_and_win_over_suffixes():
    names = InputNames(["*.bak.json", "draft-??.jsonl", "[ab].json"])
    owners = {name: names.owner(name) for name in ("x.bak.json", "draft-01.jsonl", "a.json", "x.bak.txt")}
    assert owners == {
        "x.bak.json": "hidden",
        "draft-01.jsonl": "hidden",
        "a.json": "hidden",
        "x.bak.txt": "other",
    }
    for name in ("x.bak.json.gz", "draft-001.jsonl", "A.json", "my draft-01.jsonl"):
        assert names.owner(name) == "input", name


@pytest.mark.parametrize(
    ("size", "beside", "unfinished"),
    [
        (9, "x.json.aria2", True),
        (9, "x.json.lftp-pget-status", True),
        (9, "x.json.st", True),
        (0, "x.json.part", True),
        (0, "x.vkZQe1Tk.json.part", True),
        (0, "x.json.crdownload", True),
        (9, "x.json.part", False),  # of another try: this one is whole
        (0, "y.json.part", False),
    ],
)
def test_a_download_under_its_final_name_shows_by_what_lies_beside_it(tmp_path, size, beside, unfinished):
    assert is_unfinished("x.json", size, {beside}) is unfinished
    (tmp_path / "x.json").write_bytes(b"[" * size)
    (tmp_path / beside).touch()
    assert count_waiting(tmp_path).files == (0 if unfinished else 1)


def test_only_inputs_are_counted_as_waiting(tmp_path):
    for name in (*INPUTS, *TEMPORARY, *OTHERS, *HIDDEN):
        (tmp_path / name).write_text("12")
    (tmp_path / "folder.json").mkdir()
    load = count_waiting(tmp_path)
    assert (load.files, load.bytes) == (len(INPUTS), 2 * len(INPUTS))
    assert load.left == len(TEMPORARY) + len(OTHERS)
    assert count_waiting(tmp_path, InputNames(["*"])).files == 0
    assert all(is_input(name) for name in INPUTS)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def told(scanner: Scanner) -> list[tuple[str, str]]:
    with capture_logs() as logs:
        scanner.scan()
    return [(entry["file"], entry["reason"]) for entry in logs if entry["event"] == "inbox.left"]


def test_what_is_left_alone_is_told_once_and_not_while_it_grows(tmp_path):
    clock = Clock()
    scanner = Scanner(tmp_path, settle_seconds=5.0, clock=clock)
    growing = tmp_path / "x.jsonl.926A3cE2.partial"
    (tmp_path / "notes.txt").touch()
    growing.write_text("1")
    assert told(scanner) == []
    clock.now = 4.0
    growing.write_text("12")
    assert told(scanner) == []
    clock.now = 5.0
    ((name, reason),) = told(scanner)
    assert name == "notes.txt"
    assert "inputs end in .jsonl, .ndjson, .json, .csv or .tsv, optionally with .gz or .zst" in reason
    clock.now = 9.0
    ((name, reason),) = told(scanner)
    assert name == growing.name
    assert "a temporary name" in reason
    clock.now = 100.0
    growing.write_text("123")
    assert told(scanner) == []
    growing.unlink()
    assert told(scanner) == []
    growing.touch()  # another of its name
    assert told(scanner) == []
    clock.now = 105.0
    assert [name for name, _ in told(scanner)] == [growing.name]


def test_a_drain_tells_at_once(tmp_path):
    (tmp_path / "notes.txt").touch()
    scanner = Scanner(tmp_path, settle_seconds=5.0, clock=Clock())
    scanner.tells_at_once = True
    assert [name for name, _ in told(scanner)] == ["notes.txt"]


@pytest.mark.parametrize(("files", "more"), [(20, []), (21, [1]), (100, [80])])
def test_a_folder_full_of_others_files_is_told_in_a_few_lines(tmp_path, files, more):
    for number in range(files):
        (tmp_path / f"{number}.xlsx").touch()
    scanner = Scanner(tmp_path, settle_seconds=0.0, clock=Clock())
    with capture_logs() as logs:
        scanner.scan()
        scanner.scan()
    assert len(logs) == 20 + len(more)
    assert [entry["more_files"] for entry in logs if "more_files" in entry] == more


def subfolders_told(path: Path, names: InputNames | None = None) -> list[list[str]]:
    scanner = Scanner(path, settle_seconds=0.0, clock=Clock(), names=names)
    with capture_logs() as logs:
        scanner.scan()
        scanner.scan()
        (path / "later").mkdir()
        scanner.scan()
    return [sorted(entry["folders"]) for entry in logs if entry["event"] == "inbox.subfolders_ignored"]


def test_subfolders_are_named_in_one_warning(tmp_path):
    for name in ("b", "a.jsonl", "done", "failed", ".claimed", "lost+found", "caf\udce9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").touch()
    assert subfolders_told(tmp_path) == [["a.jsonl", "b", "caf\\xe9"], ["later"]]


def test_subfolders_that_are_known_or_ignored_are_not_named(tmp_path):
    for name in ("outbox", "old-1"):
        (tmp_path / name).mkdir()
    assert subfolders_told(tmp_path, InputNames(["old-*"], folders=["outbox"])) == [["later"]]


def test_a_link_with_an_inputs_name_is_odd_and_another_is_somebody_elses(tmp_path):
    (tmp_path / "a.json").symlink_to("nowhere")
    (tmp_path / "a.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    scanner = Scanner(tmp_path, settle_seconds=0.0, clock=Clock())
    with capture_logs() as logs:
        assert scanner.scan() == []
    assert sorted((entry["event"], entry["file"]) for entry in logs) == [
        ("inbox.ignored", "a.json"),
        ("inbox.left", "a.txt"),
        ("inbox.left", "pipe"),
    ]
