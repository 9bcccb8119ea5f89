"""Settings that change while the daemon runs: by SIGHUP or because their file changed."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from daemon.config import Config, load_config
from daemon.errors import ConfigError
from daemon.settings import AT_ONCE, AT_START, SettingsSource, changes, is_in
from tests.reliability.daemons import Daemons, Job
from tests.reliability.handling import events, running, wait_until
from tests.reliability.test_disk_full import get, url_of
from tests.support import tiny

FULL = "[outbox]\nmin_free_bytes = 1_000_000_000_000_000_000\n"
QUICK = "[inbox]\nrescan_seconds = 0.2\n"


def configured(text: str, folder: Path) -> Config:
    file = folder / "some.toml"
    file.write_text(text)
    return load_config(file, {}, {})


def replace(file: Path, text: str) -> None:
    """As an editor or a configuration manager does."""
    draft = file.with_name("draft")
    draft.write_text(text)
    draft.rename(file)


# What is read


def test_what_differs_is_told_by_its_key(tmp_path):
    before = configured("", tmp_path)
    assert changes(before, before) == []
    text = "[inbox]\nmax_attempts = 5\npath = 'in'\n[texts]\na = '{a}'\n[log]\nlevel = 'debug'\n"
    after = configured(text, tmp_path)
    assert changes(before, after) == ["texts", "inbox.path", "inbox.max_attempts", "log.level"]
    assert changes(after, configured("[texts]\na = '{b}'", tmp_path))[0] == "texts"


def test_every_key_that_is_named_is_a_setting():
    for key in (*AT_START, *AT_ONCE):
        section, _, field = key.partition(".")
        assert section in Config.model_fields, key
        assert not field or field in type(Config.model_fields[section].default).model_fields, key
    assert not [key for key in AT_START if is_in(key, AT_ONCE)]


def test_a_change_is_told_once_the_file_is_whole_and_until_it_is_read(tmp_path):
    file = tmp_path / "lensd.toml"
    file.write_text("")
    source = SettingsSource(lambda: load_config(file, {}, {}), file)
    assert not source.changed()
    replace(file, "[log]\nlevel = 'debug'\n")
    assert [source.changed(), source.changed(), source.changed()] == [False, True, True]
    assert source.read(load_config(None, {}, {})).log.level == "debug"
    assert not source.changed()


def test_a_file_that_is_away_for_a_moment_is_no_change(tmp_path):
    file = tmp_path / "lensd.toml"
    file.write_text("")
    source = SettingsSource(lambda: load_config(file, {}, {}), file)
    file.rename(tmp_path / "away")
    assert [source.changed(), source.changed()] == [False, False]
    (tmp_path / "away").rename(file)
    assert [source.changed(), source.changed()] == [False, False]


def test_without_a_file_nothing_changes():
    source = SettingsSource(lambda: load_config(None, {}, {}), None)
    assert [source.changed(), source.changed()] == [False, False]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[outbox]\nmin_free_bytes = -1\n", "outbox.min_free_bytes"),
        ("[inbox]\nmax_attemps = 3\n", "did you mean max_attempts"),
        ("[inbox", "not valid TOML"),
        ("a = " + "[" * 100_000, "nested too deeply"),
        ("\udcff", "can't be read"),
        (
            "[model]\ndtype = 'float64'\n[inbox]\nmax_attempts = 9\n",
            "model.dtype: can't change without a restart",
        ),
        ("[analysis]\npositions = 'all'\n", "analysis.positions: can't change without a restart"),
        ("[http]\naddress = '127.0.0.1:1'\n", "http.address: can't change without a restart"),
        ("[[sae]]\npath = 'elsewhere'\n", "sae: can't change without a restart"),
    ],
    ids=lambda value: value[:20].strip() if len(value) < 200 else "deep",
)
def test_what_is_bad_or_needs_a_restart_is_refused_with_its_key(tmp_path, text, said):
    file = tmp_path / "lensd.toml"
    source = SettingsSource(lambda: load_config(file, {}, {}), file)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=re.escape(said)):
        source.read(load_config(None, {}, {}))


# What a running daemon makes of it


@dataclass
class Place:
    """A running daemon that follows the file `settings`."""

    folder: Path
    pid: int
    url: str

    @property
    def settings(self) -> Path:
        return self.folder / "lensd.toml"

    def status(self) -> dict[str, Any]:
        return json.loads(get(f"{self.url}/status.json")[1])

    def alerts(self) -> dict[str, str]:
        return {alert["title"]: alert["detail"] for alert in self.status()["alerts"]}

    def reloads(self, outcome: str) -> float:
        metrics = get(f"{self.url}/metrics")[1]
        (value,) = re.findall(
            rf'^lensd_config_reloads_total\{{outcome="{outcome}"\}} (\S+)$', metrics, re.MULTILINE
        )
        return float(value)

    def until(self, condition: Any, what: str) -> None:
        wait_until(condition, what, self.pid)

    def drop(self, name: str, records: list[dict[str, object]]) -> None:
        tiny.write_json(self.folder / "draft.json", records)
        (self.folder / "draft.json").rename(self.folder / "inbox" / name)

    def published(self, stem: str) -> Path:
        self.until(lambda: list((self.folder / "outbox").glob(f"{stem}-*")), f"the results of {stem}")
        (folder,) = (self.folder / "outbox").glob(f"{stem}-*")
        return folder


def started(daemons: Daemons, folder: Path, **hook_args: str) -> Any:
    (folder / "inbox").mkdir()
    (folder / "lensd.toml").write_text(QUICK)
    job = Job(
        folder / "inbox",
        folder / "outbox",
        folder / "log",
        once=False,
        flags={"http.enabled": True, "http.address": "127.0.0.1:0"},
        hook="tests.support.settings_hooks:reloading",
        hook_args={"file": str(folder / "lensd.toml"), **hook_args},
    )
    return running(daemons, job)


@pytest.fixture
def place(daemons: Daemons, tmp_path: Path) -> Iterator[Place]:
    with started(daemons, tmp_path) as pid:
        place = Place(tmp_path, pid, url_of(tmp_path / "log", pid))
        place.until(lambda: get(f"{place.url}/readyz")[0] == 200, "readiness")
        yield place


def test_sighup_reads_them_again_though_no_file_changed(place):
    os.kill(place.pid, signal.SIGHUP)
    place.until(lambda: place.reloads("applied") == 1, "the reload")
    assert [line["changed"] for line in events(place.folder / "log", "settings.applied")] == [[]]
    assert place.reloads("rejected") == 0


def test_what_needs_no_other_pipeline_holds_at_once_and_can_go_back(place):
    replace(place.settings, QUICK + FULL)
    place.until(lambda: get(f"{place.url}/readyz")[0] == 503, "the new floor of free space")
    replace(place.settings, QUICK)
    place.until(lambda: get(f"{place.url}/readyz")[0] == 200, "the old one")
    applied = [line["changed"] for line in events(place.folder / "log", "settings.applied")]
    assert applied == 2 * [["outbox.min_free_bytes"]]


def test_a_changed_file_is_taken_up_without_being_told(place):
    replace(place.settings, QUICK + "[texts]\nonly = '{fact}'\n[outbox]\nvalues = 'float16'\ntexts = false\n")
    place.until(lambda: place.reloads("applied") == 1, "the reload")
    place.drop("study.json", tiny.contrast_records(3))
    folder = place.published("study")
    columns = pq.read_schema(folder / "metrics.parquet").names
    assert "n_tokens_only" in columns
    assert "n_tokens_prompt" not in columns
    assert not (folder / "texts.parquet").exists()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    assert manifest["rows"] == 3
    place.until(lambda: place.status()["totals"]["rows"] == 3, "the count, which follows the folder")


def test_texts_and_analysis_hold_for_what_is_taken_up_afterwards(place):
    place.drop("before.json", tiny.contrast_records(3))
    before = place.published("before")
    replace(place.settings, QUICK + "[batching]\nmax_text_tokens = 1\n[analysis]\nseed = 7\n")
    place.until(lambda: place.reloads("applied") == 1, "the reload")
    place.drop("after.json", tiny.contrast_records(3))
    failed = place.folder / "inbox/failed/after.json.reason.json"
    place.until(failed.exists, "the file that has failed")
    manifest = json.loads((before / "manifest.json").read_bytes())
    assert (manifest["rows"], manifest["rejects"]) == (3, 0)
    (rejects,) = json.loads(failed.read_bytes())["rejects"]
    assert (rejects["reason"], rejects["count"]) == ("text_too_long", 3)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (FULL + "[inbox]\nmax_attempts = 'many'\n", "inbox.max_attempts"),
        (FULL + "[model]\ndtype = 'float64'\n", "model.dtype: can't change without a restart"),
    ],
    ids=["invalid", "needs a restart"],
)
def test_a_bad_file_changes_nothing_is_counted_and_on_the_page_until_it_is_mended(place, bad, said):
    replace(place.settings, bad)
    place.until(lambda: place.reloads("rejected") == 1, "the refusal")
    assert said in place.alerts()["Settings refused"]
    assert "Settings refused" in get(place.url)[1]
    assert get(f"{place.url}/readyz")[0] == 200
    place.drop("study.json", tiny.contrast_records(3))
    place.published("study")
    (line,) = events(place.folder / "log", "settings.rejected")
    assert said in line["message"]
    replace(place.settings, QUICK)
    place.until(lambda: place.reloads("applied") == 1, "the reload")
    assert "Settings refused" not in place.alerts()
    assert place.reloads("rejected") == 1


def test_a_file_under_way_is_finished_as_it_was_begun(daemons, tmp_path):
    reached, go = tmp_path / "reached", tmp_path / "go"
    with started(daemons, tmp_path, reached=str(reached), go=str(go)) as pid:
        place = Place(tmp_path, pid, url_of(tmp_path / "log", pid))
        place.drop("first.json", tiny.contrast_records(3))
        place.until(reached.exists, "the first batch")
        replace(place.settings, QUICK + "[texts]\nonly = '{fact}'\n")
        place.until(lambda: place.reloads("applied") == 1, "the reload")
        place.drop("second.json", tiny.contrast_records(3))
        go.touch()
        schemas = [
            pq.read_schema(place.published(stem) / "metrics.parquet").names for stem in ("first", "second")
        ]
    assert "n_tokens_prompt" in schemas[0]
    assert "n_tokens_prompt" not in schemas[1]
    assert events(tmp_path / "log", "service.draining")[0]["signal"] == "SIGTERM"
