"""What the README tells people to type works as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import duckdb
import polars as pl
import pytest

from daemon.cli import parser
from daemon.config import Config, load_config
from daemon.service import serve
from tests import tiny

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A folder whose outbox/ holds several outputs."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "inbox").mkdir()
    for number in range(3):
        tiny.write_json(folder / "inbox" / f"{number}.json", tiny.contrast_records(4 + number))
    (folder / "lensd.toml").write_text(tiny.make_tiny(folder).toml())
    settings = {"inbox.path": folder / "inbox", "outbox.path": folder / "outbox", "inbox.settle_seconds": 0}
    serve(load_config(folder / "lensd.toml", {}, {**settings, "http.enabled": False}), once=True)
    return folder


@pytest.mark.parametrize("arguments", commands("lensd"), ids=" ".join)
def test_every_command_is_one_that_lensd_understands(arguments):
    assert callable(parser().parse_args(arguments).command)


def test_every_make_target_exists():
    targets = [arguments[0] for arguments in commands("make")]
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_query_aggregates_over_every_output(outputs, monkeypatch):
    monkeypatch.chdir(outputs)
    (query,) = blocks("sql")
    rows = dict(duckdb.sql(query).fetchall())
    assert set(rows) == {"entity", "logical"}
    assert all(-1 <= value <= 1 for value in rows.values())


def test_the_polars_line_gives_the_same(outputs, monkeypatch):
    monkeypatch.chdir(outputs)
    (line,) = blocks("python")
    frame = eval(line, {"pl": pl})
    (query,) = blocks("sql")
    assert dict(frame.iter_rows()) == pytest.approx(dict(duckdb.sql(query).fetchall()))


def test_the_configuration_shown_is_valid_and_shows_the_defaults():
    (text,) = blocks("toml")
    shown = Config.model_validate(tomllib.loads(text))
    default = load_config(None, {})
    for section in ("model", "analysis", "batching", "inbox", "outbox", "http", "log"):
        assert getattr(shown, section) == getattr(default, section), section
    assert shown.recipe is not None
    assert shown.recipe.text_names == ("ask", "right", "wrong")
