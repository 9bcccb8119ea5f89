"""A report says the same of folders in whichever order they are named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from daemon.findings.progress import ReportProgress
from daemon.findings.report import ReportOptions, make_report
from daemon.findings.results import Report
from daemon.findings.study import open_study
from daemon.recipes import CONTRAST_RECIPE, PLAIN_RECIPE
from tests.support.outboxes import make


def report_of(paths):
    with ReportProgress() as progress:
        return make_report(open_study(paths), ReportOptions(), progress)


@pytest.mark.parametrize("recipe", [CONTRAST_RECIPE, PLAIN_RECIPE])
def test_the_order_of_folders_changes_no_number(tmp_path, recipe):
    made = [
        make(tmp_path / f"{name}-{name * 12}", rows, seed=seed, recipe=recipe, first_record=50 * seed)
        for seed, (name, rows) in enumerate((("b", 60), ("a", 45)))
    ]
    for row in made[1].texts[: 3 * 30]:  # the others are texts of both folders
        row["content"] += "!"
    paths = [one.write() for one in made]
    reports = [report_of(order) for order in (paths, paths[::-1])]
    assert reports[0].run.folders == reports[1].run.folders[::-1]
    first, second = (numbers_of(one) for one in reports)
    assert len(first) > 1000
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-9, abs=1e-12, nan_ok=True)
        assert second[name] == value, name
    if recipe is CONTRAST_RECIPE:
        assert reports[0].probes == reports[1].probes  # to the last digit


def numbers_of(thing, name=""):
    """Every number and word of the statistics by its place in the report."""
    if isinstance(thing, Report):
        parts = ("columns", "features", "swapped", "grouped", "grouped_columns", "prevalence", "probes")
        return {k: v for part in parts for k, v in numbers_of(getattr(thing, part), part).items()}
    if dataclasses.is_dataclass(thing):
        fields = [field.name for field in dataclasses.fields(thing)]
        return {k: v for f in fields for k, v in numbers_of(getattr(thing, f), f"{name}.{f}").items()}
    if isinstance(thing, np.ndarray):
        thing = thing.tolist()
    if isinstance(thing, list | tuple):
        return {k: v for at, one in enumerate(thing) for k, v in numbers_of(one, f"{name}[{at}]").items()}
    return {name: thing}
