"""What the page of a report says of its samples: cautions, methods, groups, and what it leaves out."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from daemon.findings import cautions, sentences, tables
from daemon.findings import page as pages
from daemon.findings.page import page
from daemon.findings.results import Estimate, Report, Verdict
from tests.support import reports
from tests.support.outline import Outline, words


@pytest.fixture(scope="module")
def report() -> Report:
    return reports.contrast(width=60, details=2, examples=2)


@pytest.fixture(scope="module")
def small(report: Report) -> Report:
    """The same report with few figures, which take most of the time."""
    return replace(report, columns=report.columns[:1], shapes=report.shapes[:2], probes=report.probes[:2])


def test_equal_length_that_no_pair_has_is_extrapolation(small: Report) -> None:
    one = small.columns[0]
    holds = replace(one.difference, verdict="holds", n_matched=0, matched=None)
    report = replace(
        small, n_matched=0, length_range=(3, 6), columns=(replace(one, difference=holds, group=None),)
    )
    said = words(page(report))
    assert "by extrapolation of a regression alone, since no pair is of equal length" in said
    assert "No pair is of equal length: hall has 3 to 6 tokens more than fact." in said
    assert re.search(r"1 holds? by extrapolation", said)
    outline = Outline(page(report))
    labels = {text for name, at, text in outline_texts(outline) if name == "td" and "holds" in at.split()}
    assert labels == {"holds, extrapolated"}


def outline_texts(outline: Outline) -> list[tuple[str, str, str]]:
    return [
        (name, attributes.get("class") or "", " ".join("".join(text).split()))
        for name, attributes, text in outline.elements
    ]


@pytest.mark.parametrize(
    ("n_matched", "lengths", "said"),
    [
        (0, (-6, -3), "No pair is of equal length: hall has 3 to 6 tokens fewer than fact."),
        (0, (2, 2), "No pair is of equal length: hall has 2 tokens more than fact."),
        (0, (-1, 2), "hall has from 1 token fewer to 2 tokens more than fact."),
        (7, (0, 5), "Only 7 pairs of 1,130 are of equal length"),
        (0, None, "No pair is of equal length. What"),
    ],
)
def test_lengths_that_hardly_meet_are_a_caution(
    report: Report, n_matched: int, lengths: tuple[int, int] | None, said: str
) -> None:
    (caution,) = cautions.cautions(replace(report, n_matched=n_matched, length_range=lengths))
    assert said in caution


def test_enough_pairs_of_equal_length_need_no_caution(report: Report) -> None:
    assert not list(cautions.cautions(report))
    assert not list(cautions.cautions(reports.groups()))


def test_groups_that_are_too_small_are_named(small: Report) -> None:
    report = replace(
        reports.prevalences(), group_column="domain", group_names=("a", "b"), small_groups=("a", "b")
    )
    said = words(page(report))
    assert "the groups of domain have too few samples, inside or outside: a and b." in said
    report = replace(reports.groups(), small_groups=tuple(f"g{n}" for n in range(15)))
    assert "g11 and 3 more" in words(page(report))


def test_pairs_that_are_alike_are_not_said_to_be_few(small: Report) -> None:
    assert small.features is not None
    same = replace(
        small.features,
        tested=np.zeros_like(small.features.tested),
        verdict=np.full_like(small.features.verdict, "few"),
    )
    one = small.columns[0]
    alike = replace(one.difference, raw=Estimate(0, 0, 0), deviation=0.0, p=None, q=None, verdict="few")
    said = words(page(replace(small, features=same, columns=(replace(one, difference=alike),))))
    assert "No feature differs between fact and hall in enough pairs to be tested" in said
    assert "1 was equal in all pairs" in said
    assert "no difference" in said


def test_verdicts_are_one_sentence() -> None:
    counts = Counter[Verdict]({"holds": 1, "controls": 3, "none": 1, "few": 2})
    assert sentences.counted_verdicts(counts, ": entropy (+1)", constant=1) == (
        "1 holds: entropy (+1); 3 were lost to controls, 1 was not found to differ, 1 was equal in all pairs"
        " and 1 had too few samples to test"
    )
    assert sentences.counted_verdicts(Counter[Verdict]({"holds": 2})) == "2 hold"


def test_method_names_the_tests_that_were_used(small: Report) -> None:
    assert small.n_clusters < small.n_pairs
    said = words(page(small))
    assert "neither is exact" in said
    assert "exact McNemar" not in said
    said = words(page(replace(small, n_clusters=small.n_pairs)))
    assert "Firing: exact McNemar test" in said
    assert "neither is exact" not in said


def test_method_of_groups_speaks_of_groups() -> None:
    said = words(page(reports.groups()))
    for of_pairs in ("The matched column", "was not recorded", "McNemar", "whatever its truth"):
        assert of_pairs not in said


@pytest.mark.parametrize(
    ("samples", "said"), [(60, "Not judged: 60 samples are too few"), (500, "No dictionary is far from")]
)
def test_health_says_what_was_judged(report: Report, samples: int, said: str) -> None:
    healthy = tuple(replace(one, warnings=()) for one in report.run.dictionaries)
    run = replace(report.run, samples=samples, dictionaries=healthy)
    assert sentences.health(run).startswith(said)
    blank = replace(run, samples=500, dictionaries=(replace(healthy[0], card_l0=None, card_fvu=None),))
    assert sentences.health(blank).startswith("Not judged: no dictionary has a card")


def test_page_leaves_out_examples_that_do_not_fit(small: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports.contrast(width=60, details=30, examples=4)
    report = replace(report, columns=(), shapes=(), probes=())
    whole = page(report)
    assert 'class="left-out"' not in whole
    limit = len(whole.encode()) * 2 // 3
    monkeypatch.setattr(pages, "MOST_BYTES", limit)
    cut = page(report)
    assert limit * 0.8 < len(cut.encode()) <= limit
    shown = cut.count('class="card"')
    assert 0 < shown < 30
    assert f"{30 - shown} features of 30 are left out here" in words(cut)
    assert f"--features {shown}" in words(cut)
    Outline(cut)


def test_names_break_at_their_underscores() -> None:
    assert pages.column_name("a_<b>_c") == "a_<wbr>&lt;b&gt;_<wbr>c"


def test_of_many_columns_those_found_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    report = reports.groups()
    columns = report.grouped_columns
    assert tables.first_found(columns, len(columns)) == list(columns)
    kept = tables.first_found(columns, 4)
    assert len(kept) == 4
    order = [(tables.VERDICT_ORDER[one.verdict], 2 if one.q is None else one.q) for one in columns]
    assert sorted(order)[:4] == sorted(order[columns.index(one)] for one in kept)
    assert [columns.index(one) for one in kept] == sorted(columns.index(one) for one in kept)
    monkeypatch.setattr(tables, "SHOWN_GROUP_COLUMNS", 4)
    assert f"4 of {len(columns)}, those found first, then by q" in words(page(report))


def test_largest_page_is_bounded(report: Report) -> None:
    names = tuple(f"group {n}" for n in range(30))
    one = next(one for one in report.columns if one.sae is not None)
    dictionaries = tuple(replace(report.run.dictionaries[0], name=f"d{n}") for n in range(25))
    many = tuple(
        replace(one, column=f"{sae.name}_metric_{n}", sae=sae.name, group=group)
        for group in (None, *names)
        for sae in dictionaries
        for n in range(11)
    )
    report = replace(
        report,
        run=replace(report.run, dictionaries=dictionaries),
        columns=many,
        group_names=names,
        group_column="domain",
        shapes=report.shapes[:1] * 2000,
    )
    made = page(report)
    assert "40 are shown: those found first, then by q." in words(made)
    assert "the first 500 of 2,000 rows" in words(made)
    assert len(made.encode()) <= pages.MOST_BYTES


def test_two_groups_are_named(report: Report) -> None:
    groups = reports.groups()
    one = replace(groups.grouped[0], group="north")
    column = replace(groups.grouped_columns[0], group="north")
    two = replace(groups, group_names=("north", "south"), grouped=(one,), grouped_columns=(column,))
    assert sentences.others(two) == "south"
    assert "between north and south (domain)" in sentences.findings(two)[0]
    assert "One group against the other, south ." in words(page(two))
    assert sentences.others(groups) == "all others"
    assert "between one of 5 groups and all others (domain)" in sentences.findings(groups)[0]
