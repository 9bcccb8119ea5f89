from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.errors import MachineError
from daemon.fs import durable
from daemon.pause import FoldersLost
from daemon.records import UnitTotals
from daemon.sink.jsontext import to_json_lines
from daemon.sink.manifest import manifest
from daemon.sink.outbox import Outbox, Publication, Staged, complete, output_folder_name, seal
from daemon.source.formats import without_suffix
from tests.support.handmade import (
    CONTRAST_RECIPE,
    INFO,
    UNIT,
    finish,
    make_file,
    make_part,
    open_writer,
    store,
)

CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture
def outbox(tmp_path) -> Iterator[Outbox]:
    outbox = Outbox(tmp_path / "outbox")
    outbox.path.mkdir()
    outbox.open()
    yield outbox
    outbox.close()


def stage(outbox: Outbox, name: str = "a.jsonl", unit: str = UNIT) -> tuple[Staged, UnitTotals]:
    """A finished unit of 5 records, one of them rejected."""
    writer = open_writer(outbox.staging(unit))
    store(writer, finish(make_part(0, 0, 5, rejected=(2,), last=True)))
    totals = writer.write()
    staged = Staged(make_file(name, unit), writer.staging, content_for(totals, name))
    complete(staged)
    return staged, totals


def content_for(totals: UnitTotals, name: str = "a.jsonl") -> dict[str, object]:
    return manifest(
        file=make_file(name),
        recipe=CONTRAST_RECIPE,
        info=INFO,
        totals=totals,
        settings={"outbox": {"path": "out\udcff"}},
        seconds=1.23456789,
        created=CREATED,
    )


def publish_one(outbox: Outbox, name: str = "a.jsonl") -> Publication:
    staged, _ = stage(outbox, name)
    seal(staged)
    outbox.publish([staged])
    assert staged.publication is not None
    return staged.publication


def visible(outbox: Outbox) -> set[str]:
    return {path.name for path in outbox.path.iterdir() if not path.name.startswith(".")}


def test_a_published_folder_says_what_it_holds(outbox):
    published = publish_one(outbox)
    assert published == Publication(outbox.path / f"a-{UNIT}", fresh=True)
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
        "engine": "packed",
        "weights_sha256": None,
        "settings_sha256": "7" * 64,
        "revision": None,
        "bits": "",
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
        "texts.parquet": 12,
        "rejects.jsonl": 1,
    }


def test_the_manifest_describes_each_sae(outbox):
    _, totals = stage(outbox)
    first, second = json.loads(to_json_lines(content_for(totals)))["saes"]
    x = [0, 1, 3, 4]  # record 2 is a reject
    variance = sum(value**2 for value in x) - sum(x) ** 2 / 4
    assert first == {
        "name": "l3",
        "hook": "blocks.3.hook_resid_post",
        "hook_out": "blocks.3.hook_resid_post",
        "layer": 3,
        "source": "sae-3",
        "architecture": "jumprelu",
        "d_in": 4,
        "d_sae": 64,
        "d_out": 4,
        "weights_sha256": "5" * 64,
        "settings_sha256": "8" * 64,
        "prepend_bos": True,
        "revision": None,
        "neuronpedia_id": None,
        "fvu": pytest.approx(4 * 0.5 / variance),
        "mean_l0": 6.0,
        "card": {"mean_l0": None, "fvu": None},
        "far_from_card": None,
    }
    assert second["layer"] == 5


def test_records_must_be_rows_and_rejects(outbox):
    staged, _ = stage(outbox)
    staged.manifest["records"] = 6
    with pytest.raises(AssertionError, match="rows"):
        complete(staged)
    assert outbox.published(UNIT) is None


def test_the_same_unit_is_published_once_under_whatever_name(outbox):
    first = publish_one(outbox, "a.jsonl")
    kept = (first.folder / "manifest.json").read_bytes()
    assert publish_one(outbox, "a.jsonl") == Publication(first.folder, fresh=False)
    assert publish_one(outbox, "b.jsonl") == Publication(first.folder, fresh=False)
    assert (first.folder / "manifest.json").read_bytes() == kept
    assert visible(outbox) == {first.folder.name}
    assert [path.name for path in outbox.lease.folder.iterdir()] == [".lock"]


def test_of_two_processes_the_first_to_publish_a_unit_wins(outbox):
    rival = Outbox(outbox.path)
    rival.open()
    ours, _ = stage(outbox, "a.jsonl")
    theirs, _ = stage(rival, "b.jsonl")
    seal(ours)
    seal(theirs)
    rival.publish([theirs])
    outbox.publish([ours])
    assert theirs.publication == Publication(outbox.path / f"b-{UNIT}", fresh=True)
    assert ours.publication == Publication(outbox.path / f"b-{UNIT}", fresh=False)
    assert visible(outbox) == {f"b-{UNIT}"}
    rival.close()


def test_several_units_share_the_sync_of_the_outbox(outbox):
    units = [stage(outbox, f"{number}.jsonl", f"{number:012x}")[0] for number in range(3)]
    with traced() as operations:
        for unit in units:
            seal(unit)
        outbox.publish(units)
    assert operations.count(("fsync_folder", "outbox")) == 1
    assert visible(outbox) == {f"{number}-{number:012x}" for number in range(3)}


def test_among_others_only_what_is_published_already_is_dropped(outbox):
    publish_one(outbox)
    (outbox.path / ".units" / f"{1:012x}").symlink_to("of a process that died before the rename")
    units = [stage(outbox, "again.jsonl")[0]]
    units += [stage(outbox, f"{number}.jsonl", f"{number:012x}")[0] for number in range(3)]
    for unit in units:
        seal(unit)
    outbox.publish(units)
    assert [unit.publication.fresh for unit in units] == [False, True, True, True]
    assert visible(outbox) == {f"a-{UNIT}", *(f"{number}-{number:012x}" for number in range(3))}
    for unit in units:
        assert outbox.published(unit.file.unit) == unit.publication.folder


def test_publishing_again_after_an_interruption_changes_nothing(outbox):
    units = [stage(outbox, f"{number}.jsonl", f"{number:012x}")[0] for number in range(2)]
    for unit in units:
        seal(unit)
    with traced(fail_at=("rename", units[1].folder.name)), pytest.raises(OSError, match="disk gone"):
        outbox.publish(units)
    assert [unit.publication is None for unit in units] == [False, True]
    outbox.publish(units)
    assert [unit.publication.fresh for unit in units] == [True, True]


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_under_the_final_name_stops_publication(outbox, kind):
    staged, _ = stage(outbox)
    target = outbox.path / f"a-{UNIT}"
    if kind == "folder":
        target.mkdir()
        (target / "notes.txt").touch()
    else:
        target.touch()
    seal(staged)
    with pytest.raises(MachineError, match="move it away"):
        outbox.publish([staged])
    assert (staged.folder / "metrics.parquet").exists()
    assert outbox.published(UNIT) is None


def test_an_empty_folder_under_the_final_name_is_taken_over(outbox):
    (outbox.path / f"a-{UNIT}").mkdir()
    assert publish_one(outbox).fresh
    assert outbox.published(UNIT) == outbox.path / f"a-{UNIT}"


@contextlib.contextmanager
def traced(fail_at: tuple[str, str] | None = None) -> Iterator[list[tuple[str, str]]]:
    """Every durable operation and the name of what it acts on; the disk fails at `fail_at`."""
    operations: list[tuple[str, str]] = []

    def observe(operation: durable.Operation) -> None:
        operations.append((operation.name, operation.path.name))
        if operations[-1] == fail_at:
            raise OSError(errno.EIO, "disk gone")

    with durable.watch_operations(observe):
        yield operations


def test_everything_is_on_disk_before_the_rename_and_the_outbox_after(outbox):
    with traced() as operations:
        folder = publish_one(outbox).folder
    renamed = operations.index(("rename", UNIT))
    before = [("fsync_file", path.name) for path in folder.iterdir()] + [("fsync_folder", UNIT)]
    assert set(before) <= set(operations[:renamed])
    assert all(operations.index(("fsync_folder", UNIT)) > operations.index(sync) for sync in before[:-1])
    assert operations[renamed + 1 :] == [("fsync_folder", "outbox")]


def test_a_failing_disk_leaves_nothing_visible_and_is_not_asked_again(outbox):
    with traced() as operations:
        publish_one(outbox)
    shutil.rmtree(outbox.path / f"a-{UNIT}")
    syncs = {operation for operation in operations if operation[0].startswith("fsync")}
    for sync in syncs - {("fsync_folder", "outbox")}:
        with traced(fail_at=sync) as tried, pytest.raises(MachineError, match="fsync failed"):
            publish_one(outbox)
        assert tried.count(sync) == 1
        assert visible(outbox) == set()
        assert outbox.published(UNIT) is None


def test_a_failed_sync_of_the_outbox_is_no_success(outbox):
    with traced(fail_at=("fsync_folder", "outbox")), pytest.raises(MachineError, match="fsync failed"):
        publish_one(outbox)


def test_only_a_folder_with_a_manifest_counts_as_published(outbox):
    folder = publish_one(outbox).folder
    assert outbox.published(UNIT) == folder
    (folder / "manifest.json").unlink()
    assert outbox.published(UNIT) is None
    shutil.rmtree(folder)
    assert outbox.published(UNIT) is None
    assert publish_one(outbox, "b.jsonl").fresh
    assert outbox.published("f" * 12) is None


def copy_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target)


def copied_by(*command: str) -> Callable[[Path, Path], None]:
    def copy(source: Path, target: Path) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"no {command[0]} on this machine")
        line = " ".join(command).format(source=shlex.quote(str(source)), target=shlex.quote(str(target)))
        subprocess.run(["sh", "-ec", line], check=True)

    return copy


COPIES = {
    "cp": copied_by("cp", "-rL", "{source} {target}"),
    "rsync": copied_by("rsync", "-aL", "{source}/ {target}"),
    "tar": copied_by(
        "tar", "-chf {target}.tar -C {source} . && mkdir {target} && tar -xf {target}.tar -C {target}"
    ),
    "zip": copied_by("zip", "-qr {target}.zip {source} && mkdir {target}"),
    "copytree": copy_tree,
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_whoever_follows_links_copies_an_outbox_and_the_copy_is_one(outbox, tmp_path, copy):
    names = [publish_one(outbox).folder.name]
    staged, _ = stage(outbox, "b.jsonl", "0" * 12)
    seal(staged)
    outbox.publish([staged])
    shutil.rmtree(outbox.path / f"b-{'0' * 12}")  # moved away by its user: no entry may fail for that
    target = tmp_path / "copy"
    copy(outbox.path, target)
    if not list(target.iterdir()):
        return  # an archive
    assert sorted(path.name for path in target.iterdir() if not path.name.startswith(".")) == names
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    published = sum(path.stat().st_size for path in (target / names[0]).iterdir())
    assert size < 1.1 * published
    copied = Outbox(target)
    copied.open()
    assert copied.published(UNIT) == target / names[0]
    copied.close()


def test_an_index_of_links_becomes_one_of_files(tmp_path):
    first = Outbox(tmp_path)
    first.open()
    folder = publish_one(first).folder
    first.close()
    index = tmp_path / ".units"
    (index / UNIT).unlink()
    (index / UNIT).symlink_to(folder.name)  # as versions before did
    (index / ("0" * 12)).symlink_to(f"gone-{'0' * 12}")
    assert first.published(UNIT) == folder
    again = Outbox(tmp_path)
    again.open()
    assert {path.name: path.read_text() for path in index.iterdir()} == {UNIT: f"{folder.name}\n"}
    assert not (index / UNIT).is_symlink()
    assert again.published(UNIT) == folder
    again.close()


@pytest.mark.parametrize(
    "content",
    ["", "a", f"a-{UNIT}"[:-3], f"a-{UNIT}", f"../elsewhere/a-{UNIT}\n", f"a-{'0' * 12}\n", "\n", "x" * 9999],
)
def test_an_entry_that_a_crash_cut_or_somebody_wrote_is_not_believed_and_mended(outbox, content):
    folder = publish_one(outbox).folder
    elsewhere = outbox.path.parent / "elsewhere" / folder.name
    shutil.copytree(folder, elsewhere)
    entry = outbox.path / ".units" / UNIT
    entry.write_text(content)
    assert outbox.published(UNIT) is None
    assert publish_one(outbox, "a.jsonl") == Publication(folder, fresh=False)
    assert visible(outbox) == {folder.name}
    entry.write_text(content)
    Outbox(outbox.path).open()
    assert entry.read_text() == f"{folder.name}\n"


def test_an_index_that_was_cleared_away_is_made_again(outbox):
    folder = publish_one(outbox).folder
    shutil.rmtree(outbox.path / ".units")
    assert outbox.published(UNIT) is None
    assert publish_one(outbox, "b.jsonl") == Publication(folder, fresh=False)
    assert visible(outbox) == {folder.name}


def test_results_put_there_by_hand_are_known_from_the_next_start_on(tmp_path):
    folder = tmp_path / f"a-{UNIT}"
    folder.mkdir()
    (tmp_path / f"b-{'0' * 12}").mkdir()
    (folder / "manifest.json").touch()
    outbox = Outbox(tmp_path)
    outbox.open()
    assert outbox.published(UNIT) == folder
    assert outbox.published("0" * 12) is None
    outbox.close()


def abandoned(outbox: Outbox) -> Path:
    """The lease of a process that was killed while it worked on a unit and on a large file."""
    dead = Outbox(outbox.path)
    dead.open()
    stage(dead)
    dead.parts(UNIT).mkdir()
    (dead.parts(UNIT) / "000000").touch()
    os.close(dead.lease._lock)  # what the kernel does when a process ends
    return dead.lease.folder


def test_half_made_results_of_a_dead_process_are_removed_and_its_parts_kept(outbox):
    lease = abandoned(outbox)
    assert outbox.sweep() == 1
    assert sorted(path.name for path in lease.iterdir()) == [".lock", f"{UNIT}.parts"]
    parts = outbox.adopt_parts(UNIT)
    assert [path.name for path in parts.iterdir()] == ["000000"]
    assert outbox.sweep() == 0
    assert not lease.exists()


def test_parts_that_nobody_needs_any_more_are_removed(outbox):
    lease = abandoned(outbox)
    publish_one(outbox)
    outbox.sweep()
    assert not lease.exists()


def test_of_two_dead_processes_parts_of_a_unit_the_first_are_adopted(outbox):
    leases = sorted((abandoned(outbox), abandoned(outbox)))
    assert [path.name for path in outbox.adopt_parts(UNIT).iterdir()] == ["000000"]
    assert [(lease / f"{UNIT}.parts").exists() for lease in leases] == [False, True]


def test_an_orderly_stop_keeps_the_parts_of_unfinished_units_and_nothing_else(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.open()
    stage(outbox)
    outbox.parts("0" * 12).mkdir()
    (outbox.parts("0" * 12) / "000000").touch()
    lease = outbox.lease.folder
    outbox.close()
    assert [path.name for path in lease.iterdir() if path.name != ".lock"] == ["0" * 12 + ".parts"]
    outbox.close()  # safe to repeat


def test_a_lease_that_somebody_removed_is_lost_and_an_outbox_that_is_away_is_not(outbox):
    outbox.check_lost()
    aside = outbox.path.rename(outbox.path.with_name("away"))
    outbox.check_lost()
    aside.rename(outbox.path)
    shutil.rmtree(outbox.lease.folder)
    with pytest.raises(FoldersLost, match="disappeared"):
        outbox.check_lost()


def test_a_living_process_keeps_its_own(outbox):
    other = Outbox(outbox.path)
    other.open()
    staged, _ = stage(other)
    assert outbox.sweep() == 0
    assert outbox.adopt_parts(UNIT) == outbox.parts(UNIT)
    seal(staged)
    other.publish([staged])
    other.close()
    assert visible(outbox) == {f"a-{UNIT}"}


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
    assert output_folder_name(without_suffix(name), UNIT) == f"{stem}-{UNIT}"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🧪" * 62 + ".jsonl", "." * 255])
def test_long_names_are_cut_to_fit(tmp_path, name):
    folder = output_folder_name(without_suffix(name), UNIT)
    assert len(folder.encode()) <= 255
    assert folder.endswith(f"-{UNIT}")
    (tmp_path / folder).mkdir()


@given(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_any_file_name_gives_a_visible_folder_name_in_utf8(raw):
    folder = output_folder_name(without_suffix(os.fsdecode(raw)), UNIT)
    assert 0 < len(folder.encode("utf-8")) <= 255
    assert not folder.startswith(".")
    assert "/" not in folder
    assert folder.endswith(f"-{UNIT}")


def test_a_name_that_is_not_utf8_is_readable_in_the_manifest(outbox):
    published = publish_one(outbox, os.fsdecode(b"caf\xe9.jsonl"))
    assert published.folder.name == f"caf_-{UNIT}"
    content = json.loads((published.folder / "manifest.json").read_bytes().decode("utf-8"))
    assert content["input"]["name"] == r"caf\xe9.jsonl"
