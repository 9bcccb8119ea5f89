from __future__ import annotations

import errno
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from handmade import CONTRAST_RECIPE, INFO, UNIT, finish, make_part, make_source, open_writer
from hypothesis import given
from hypothesis import strategies as st

from daemon import durable
from daemon.errors import MachineError
from daemon.output import commit
from daemon.output.commit import (
    Publication,
    clear_staging,
    find_published,
    output_folder_name,
    publish,
    staging_folder,
)
from daemon.output.manifest import manifest
from daemon.output.totals import UnitTotals

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def outbox(tmp_path) -> Path:
    (tmp_path / "outbox").mkdir()
    return tmp_path / "outbox"


def stage(outbox: Path) -> tuple[Path, UnitTotals]:
    """A finished unit of 5 records, one of them rejected."""
    staging = staging_folder(outbox, UNIT)
    writer = open_writer(staging)
    writer.write_part(finish(make_part(0, 0, 5, rejected=(2,), last=True)))
    return staging, writer.finish()


def content_for(totals: UnitTotals, name: str = "a.jsonl") -> dict[str, object]:
    return manifest(
        source=make_source(name),
        recipe=CONTRAST_RECIPE,
        info=INFO,
        totals=totals,
        settings={"outbox": {"path": "out\udcff"}},
        seconds=1.23456789,
        created=CREATED,
    )


def publish_one(outbox: Path, name: str = "a.jsonl") -> Publication:
    staging, totals = stage(outbox)
    return publish(staging, outbox, make_source(name), content_for(totals, name))


def test_a_published_folder_says_what_it_holds(outbox):
    published = publish_one(outbox)
    assert published == Publication(outbox / f"a-{UNIT}", fresh=True)
    text = (published.folder / "manifest.json").read_text(encoding="utf-8")
    content = json.loads(text)
    assert text.startswith('{\n  "unit"')
    assert content["input"] == {"name": "a.jsonl", "sha256": "c" * 64, "bytes": 99}
    assert (content["records"], content["rows"], content["rejects"]) == (5, 4, 1)
    assert (content["unit"], content["seconds"]) == (UNIT, 1.234568)
    assert content["created"] == "2026-01-02T03:04:05+00:00"
    assert content["stage_seconds"]["forward"] == 1.0
    assert set(content["stage_seconds"]) >= {"read", "tokenize", "queue", "pack", "sae", "analysis"}
    assert content["model"] == {
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "d_model": 4,
        "n_layers": 8,
        "dtype": "float32",
        "device": "cpu",
        "weights_sha256": None,
    }
    assert content["recipe"]["texts"]["fact"] == "{prompt} {fact}"
    assert content["recipe"]["contrast"] == {"reference": "prompt", "positive": "fact", "negative": "hall"}
    assert content["config"] == {"outbox": {"path": r"out\udcff"}}
    assert {"lensd", "python", "torch", "transformer-lens", "pyarrow"} <= set(content["versions"])
    names = {path.name for path in published.folder.iterdir()}
    assert names == {file["name"] for file in content["files"]} | {"manifest.json"}
    for file in content["files"]:
        written = (published.folder / file["name"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(written), hashlib.sha256(written).hexdigest())
    assert {file["name"]: file["rows"] for file in content["files"]} == {
        "metrics.parquet": 4,
        "features.parquet": 24,
        "rejects.jsonl": 1,
    }


def test_the_manifest_describes_each_sae(outbox):
    _, totals = stage(outbox)
    first, second = content_for(totals)["saes"]
    x = [0, 1, 3, 4]  # record 2 is a reject
    variance = sum(value**2 for value in x) - sum(x) ** 2 / 4
    assert first == {
        "hook": "blocks.3.hook_resid_post",
        "layer": 3,
        "source": "sae-3",
        "architecture": "jumprelu",
        "d_in": 4,
        "d_sae": 64,
        "weights_sha256": "5" * 64,
        "fvu": pytest.approx(4 * 0.5 / variance),
        "mean_l0": 6.0,
    }
    assert second["layer"] == 5


def test_records_must_be_rows_and_rejects(outbox):
    staging, totals = stage(outbox)
    with pytest.raises(AssertionError, match="rows"):
        publish(staging, outbox, make_source(), content_for(totals) | {"records": 6})
    assert find_published(outbox, UNIT) is None


def test_the_same_unit_is_published_once_under_whatever_name(outbox):
    first = publish_one(outbox, "a.jsonl")
    kept = (first.folder / "manifest.json").read_bytes()
    assert publish_one(outbox, "a.jsonl") == Publication(first.folder, fresh=False)
    assert publish_one(outbox, "b.jsonl") == Publication(first.folder, fresh=False)
    assert (first.folder / "manifest.json").read_bytes() == kept
    assert {path.name for path in outbox.iterdir()} == {first.folder.name, ".staging"}
    assert list((outbox / ".staging").iterdir()) == []


def test_a_rival_that_publishes_at_the_last_moment_wins(outbox, monkeypatch):
    staging, totals = stage(outbox)
    target = outbox / f"a-{UNIT}"

    def rename_after_rival(source: Path, destination: Path) -> None:
        destination.mkdir()
        (destination / "manifest.json").write_text("{}")
        durable.rename(source, destination)

    monkeypatch.setattr(commit, "rename", rename_after_rival)
    assert publish(staging, outbox, make_source("a.jsonl"), content_for(totals)) == Publication(target, False)
    assert (target / "manifest.json").read_text() == "{}"
    assert not staging.exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_under_the_final_name_stops_publication(outbox, kind):
    staging, totals = stage(outbox)
    target = outbox / f"a-{UNIT}"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").touch()
    else:
        target.touch()
    with pytest.raises(MachineError, match="move it away"):
        publish(staging, outbox, make_source("a.jsonl"), content_for(totals))
    assert (staging / "metrics.parquet").exists()
    assert find_published(outbox, UNIT) is None


def test_an_empty_folder_under_the_final_name_is_taken_over(outbox):
    (outbox / f"a-{UNIT}").mkdir()
    assert publish_one(outbox).fresh
    assert find_published(outbox, UNIT) == outbox / f"a-{UNIT}"


STEPS = [
    "manifest.json",
    "features.parquet",
    "manifest.json",
    "metrics.parquet",
    "rejects.jsonl",
    UNIT,
    "rename",
    "outbox",
]


def trace(monkeypatch, fail_at: int | None = None) -> list[str]:
    """Record every durable step by the name it touches; the disk fails at step `fail_at`."""
    steps: list[str] = []

    def step(name: str) -> None:
        steps.append(name)
        if len(steps) - 1 == fail_at:
            raise OSError(errno.EIO, "disk gone")

    fsync, rename = durable.os.fsync, durable.os.rename

    def traced_fsync(descriptor: int) -> None:
        step(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def traced_rename(source: Path, target: Path) -> None:
        step("rename")
        rename(source, target)

    monkeypatch.setattr(durable.os, "fsync", traced_fsync)
    monkeypatch.setattr(durable.os, "rename", traced_rename)
    return steps


def test_everything_is_on_disk_before_the_rename_and_the_outbox_after(outbox, monkeypatch):
    steps = trace(monkeypatch)
    publish_one(outbox)
    assert steps == STEPS


@pytest.mark.parametrize("step", range(STEPS.index("rename") + 1))
def test_a_crash_before_the_rename_leaves_nothing_visible(outbox, monkeypatch, step):
    steps = trace(monkeypatch, fail_at=step)
    with pytest.raises((MachineError, OSError)):
        publish_one(outbox)
    assert len(steps) == step + 1  # nothing is tried again
    assert [path.name for path in outbox.iterdir()] == [".staging"]
    assert find_published(outbox, UNIT) is None
    assert clear_staging(outbox) == 1
    assert list((outbox / ".staging").iterdir()) == []


def test_a_failed_sync_of_the_outbox_is_no_success(outbox, monkeypatch):
    trace(monkeypatch, fail_at=STEPS.index("outbox"))
    with pytest.raises(MachineError, match="fsync failed"):
        publish_one(outbox)


def test_only_a_folder_with_a_manifest_counts_as_published(outbox):
    folder = outbox / f"a-{UNIT}"
    folder.mkdir()
    (outbox / f".hidden-{UNIT}").mkdir()
    (outbox / f".hidden-{UNIT}" / "manifest.json").touch()
    assert find_published(outbox, UNIT) is None
    (folder / "manifest.json").touch()
    assert find_published(outbox, UNIT) == folder
    assert find_published(outbox, "f" * 12) is None


def test_clearing_an_outbox_without_staging_removes_nothing(outbox):
    assert clear_staging(outbox) == 0
    published = publish_one(outbox)
    assert clear_staging(outbox) == 0
    assert published.folder.is_dir()


@pytest.mark.parametrize(
    "name, stem",
    [
        ("a.jsonl", "a"),
        ("a.JSONL.GZ", "a"),
        ("a.json.zst", "a"),
        ("a.b.ndjson", "a.b"),
        ("a.tar.gz", "a.tar.gz"),
        ("json", "json"),
        (".jsonl", "input"),
        ("...", "input"),
        ("..a.json", "a"),
        ("ünï 🧪.json", "ünï 🧪"),
        ("caf\udce9.json", "caf_"),
        ("x[1]*?.json", "x_1___"),
        ("a=b\\c\nd.json", "a_b_c_d"),
    ],
)
def test_folder_names(name, stem):
    assert output_folder_name(name, UNIT) == f"{stem}-{UNIT}"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🧪" * 62 + ".jsonl", "." * 255])
def test_long_names_are_cut_to_fit(outbox, name):
    folder = output_folder_name(name, UNIT)
    assert len(folder.encode()) <= 255
    assert folder.endswith(f"-{UNIT}")
    (outbox / folder).mkdir()


@given(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_any_file_name_gives_a_visible_folder_name_in_utf8(raw):
    folder = output_folder_name(os.fsdecode(raw), UNIT)
    assert 0 < len(folder.encode("utf-8")) <= 255
    assert not folder.startswith(".")
    assert "/" not in folder
    assert folder.endswith(f"-{UNIT}")


def test_a_name_that_is_not_utf8_is_readable_in_the_manifest(outbox):
    published = publish_one(outbox, os.fsdecode(b"caf\xe9.jsonl"))
    assert published.folder.name == f"caf_-{UNIT}"
    content = json.loads((published.folder / "manifest.json").read_bytes().decode("utf-8"))
    assert content["input"]["name"] == r"caf\xe9.jsonl"
