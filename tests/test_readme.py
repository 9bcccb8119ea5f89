"""The README's commands and queries work as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from glob import glob
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from daemon.analysis.columns import CONTRAST_METRICS, LAYER_COLUMNS, LOG_PROB_COLUMNS, analysis_columns
from daemon.arguments import parser
from daemon.cli import COMMANDS
from daemon.config import Config, load_config
from daemon.model.catalog import read_catalog
from daemon.recipes import BUILT_IN_RECIPES, Recipe
from daemon.service import serve
from daemon.source.formats import FORMATS
from tests.support import tiny
from tests.support.spark import ask, needs_spark

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def inline(start: str) -> str:
    """The one expression between backticks that starts so."""
    (line,) = re.findall(rf"`({re.escape(start)}[^`]*)`", README)
    return line


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(f"{program} ")]


KINDS = {
    "contrast": tiny.contrast_records(5),
    "text": [{"text": f"text {i}", "domain": "entity"} for i in range(3)],
    "rejected": [{"prompt": "p", "fact": 1, "hallucination": "h", "domain": "logical"}],
}
MIXES = {  # what lies in the outbox, by names that sort in this order
    "alike": ["contrast", "contrast", "contrast"],
    "texts first": ["text", "contrast", "contrast"],
    "texts last": ["contrast", "contrast", "text"],
    "texts between": ["rejected", "contrast", "text", "contrast", "text"],
}


@pytest.fixture(scope="module")
def mixes(tmp_path_factory) -> Path:
    """Folders, named as in MIXES, whose outbox/ each holds outputs of several recipes."""
    root = tmp_path_factory.mktemp("readme")
    (root / "lensd.toml").write_text(tiny.make_tiny(root).toml())
    for mix, kinds in MIXES.items():
        folder = root / mix
        (folder / "inbox").mkdir(parents=True)
        for number, kind in enumerate(kinds):
            records = [record | {"id": f"{number}-{i}"} for i, record in enumerate(KINDS[kind])]
            tiny.write_json(folder / "inbox" / f"{number}.json", records)
        settings = {f"{box}.path": folder / box for box in ("inbox", "outbox")}
        settings |= {"inbox.settle_seconds": 0, "http.enabled": False}
        serve(load_config(root / "lensd.toml", {}, settings), once=True)
        assert len(list(folder.glob("outbox/*/metrics.parquet"))) == len(kinds)
    return root


@pytest.fixture(params=MIXES)
def outputs(request, mixes, monkeypatch) -> Path:
    monkeypatch.chdir(mixes / request.param)
    return mixes / request.param


def means(outputs: Path) -> dict[str, float]:
    """The mean of stability_diff by domain, row by row over the files."""
    found: dict[str, list[float]] = {}
    for path in outputs.glob("outbox/*/metrics.parquet"):
        for row in pq.read_table(path).to_pylist():
            if row.get("stability_diff") is not None:
                found.setdefault(row["domain"], []).append(row["stability_diff"])
    assert set(found) == {"entity", "logical"}
    return {domain: float(np.mean(values)) for domain, values in found.items()}


@pytest.mark.parametrize("arguments", commands("lensd"), ids=" ".join)
def test_every_command_is_one_that_lensd_understands(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for argument in arguments:
        if argument.endswith(".json"):
            (tmp_path / argument).touch()
    assert parser().parse_args(arguments).command in COMMANDS


def test_every_make_target_exists():
    targets = [arguments[0] for arguments in commands("make")]
    assert targets[:2] == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_query_aggregates_over_every_output(outputs):
    (query,) = blocks("sql")
    assert dict(duckdb.sql(query).fetchall()) == pytest.approx(means(outputs))


def test_the_polars_lines_give_the_same(outputs):
    (lines,) = blocks("python")
    assert dict(eval(lines, {"pl": pl}).iter_rows()) == pytest.approx(means(outputs))


def test_the_pandas_line_gives_the_same(outputs):
    frame = eval(inline("pd.concat("), {"pd": pd, "glob": glob})
    assert frame.groupby("domain")["stability_diff"].mean().to_dict() == pytest.approx(means(outputs))


@needs_spark
@pytest.mark.slow
def test_the_spark_line_gives_the_same(mixes):
    line = f"{inline('spark.read')}.groupBy('domain').avg('stability_diff')"
    answers = ask(*[line.replace("outbox/", f"{mix}/outbox/") for mix in MIXES], cwd=mixes)
    for mix, answer in zip(MIXES, answers, strict=True):
        found = {row["domain"]: row["avg(stability_diff)"] for row in answer["rows"]}
        assert found == pytest.approx(means(mixes / mix)), mix


def test_the_configuration_shown_is_valid_and_shows_the_defaults():
    (text,) = blocks("toml")
    shown = Config.model_validate(tomllib.loads(text))
    default = load_config(None, {})
    for section in ("model", "analysis", "batching", "executor", "inbox", "outbox", "http", "log"):
        assert getattr(shown, section) == getattr(default, section), section
    assert shown.recipe is not None
    assert shown.recipes[0].text_names == ("ask", "right", "wrong")


def test_the_table_of_columns_is_what_is_registered():
    assert columns_table() in README


def columns_table() -> str:
    """The README's table of the analysis columns."""
    rows = ["| column | type | unit | meaning |", "|---|---|---|---|"]
    (tokens,) = analysis_columns([], Recipe(templates=(("{text}", "{text}"),), contrast=None))
    meaning = tokens.description.format(text="the text")
    rows.append(f"| `{tokens.name}` | {tokens.kind} | {tokens.unit} | {meaning} |")
    for column in LOG_PROB_COLUMNS:
        names = f"`{column.name}_{{text}}`, `_diff`"
        meaning = f"{column.meaning}; `_diff` is hall - fact; only with `analysis.log_probs`"
        rows.append(f"| {names} | float | {column.unit} | {meaning} |")
    for column in LAYER_COLUMNS:
        kind = "string" if column.kind == "class" else column.kind
        meaning = column.meaning.replace("|", r"\|")
        rows.append(f"| `l{{L}}_{{text}}_{column.name}` | {kind} | {column.unit} | {meaning} |")
    for metric in CONTRAST_METRICS:
        ends = ["_std", "_diff"] if metric.deviation else ["_diff"]
        names = ", ".join([f"`{metric.name}_{{text}}`", *(f"`{end}`" for end in ends)])
        difference = "hall - fact" if metric.sign > 0 else "fact - hall"
        meaning = metric.meaning.format(text="the text")
        rows.append(f"| {names} | float | {metric.unit} | {meaning}; `_diff` is {difference} |")
    return "\n".join(rows) + "\n"


def test_every_column_has_its_definition():
    page = (ROOT / "daemon/README.md").read_text(encoding="utf-8")
    table = page.split("| column | is |\n|---|---|\n")[1].split("\n\n")[0]
    defined = [name for row in table.splitlines() for name in re.findall(r"`([^`]*)`", row.split("|")[1])]
    names = [f"{column.name}_{{text}}" for column in LOG_PROB_COLUMNS]
    names += [column.name for column in LAYER_COLUMNS]
    for metric in CONTRAST_METRICS:
        names += [f"{metric.name}_t", *(["_std"] if metric.deviation else [])]
    assert sorted(defined) == sorted(["n_tokens_{text}", *names])


def test_the_first_table_says_what_goes_in():
    rows = {row.split("|")[1].strip(): row for row in README.splitlines() if row.startswith("| ")}
    plain = {suffix for kind in FORMATS for suffix in kind.suffixes if suffix.count(".") == 1}
    assert set(re.findall(r"`(\.\w+)`", rows["files"])) == plain | {".gz", ".zst"}
    for recipe in BUILT_IN_RECIPES:
        assert recipe.fields <= set(re.findall(r"`(\w+)`", rows["records with"])), recipe
    catalog = read_catalog()
    runs = sum(entry.runs != "no" for entry in catalog)
    assert f"{runs:,} of the {len(catalog):,} that SAELens names" in rows["dictionaries"]
