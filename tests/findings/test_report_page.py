"""The page of a report, as HTML: it is whole, says the report's numbers, and others' text stays text."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest

from daemon.findings import figures, tables
from daemon.findings import page as pages
from daemon.findings.page import page
from daemon.findings.results import Estimate, Report
from tests.support import reports
from tests.support.outline import Outline

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@pytest.fixture(scope="module")
def report() -> Report:
    return reports.contrast(width=60, details=2, examples=2)


@pytest.fixture(scope="module")
def small(report: Report) -> Report:
    """The same report with few figures, which take most of the time."""
    return replace(report, columns=report.columns[:1], shapes=report.shapes[:2], probes=report.probes[:2])


@pytest.fixture(scope="module")
def written(report: Report) -> str:
    return page(report)


def test_page_loads_nothing_and_runs_its_own_script_alone(written: str) -> None:
    outline = Outline(written)
    addresses = [
        value
        for _, attributes, _ in outline.elements
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href", "srcset", "action", "data")
    ]
    outside = [one for one in addresses if one and not one.startswith(("#", "data:,"))]
    assert all(one.startswith("https://www.neuronpedia.org/") for one in outside)
    assert {attributes.get("src") for attributes in outline.attributes("script")} == {None}
    assert not [
        name
        for _, attributes, _ in outline.elements
        for name in attributes
        if name == "style" or name.startswith("on")
    ]


def test_policy_names_the_hashes_of_what_is_within(written: str) -> None:
    (policy,) = [
        one["content"]
        for one in Outline(written).attributes("meta")
        if one.get("http-equiv") == "Content-Security-Policy"
    ]
    for kind in ("style", "script"):
        (within,) = re.findall(rf"<{kind}>(.*?)</{kind}>", written, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(within.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in str(policy)
    assert str(policy).startswith("default-src 'none';")


def test_page_is_the_same_each_time(small: Report) -> None:
    assert page(small) == page(small)


def test_ids_are_unique_and_every_reference_leads_somewhere(written: str) -> None:
    outline = Outline(written)
    ids = [attributes["id"] for _, attributes, _ in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [
        value[1:]
        for _, attributes, _ in outline.elements
        for name, value in attributes.items()
        if name == "href" and value and value.startswith("#")
    ]
    clips = re.findall(r"url\(#([^)]*)\)", written)
    assert targets and clips and set(targets) | set(clips) <= set(ids)


def test_first_screen_says_what_holds(report: Report, written: str) -> None:
    features = report.features
    assert features is not None
    found, holding = (
        np.isin(features.verdict, ("holds", "controls")).sum(),
        (features.verdict == "holds").sum(),
    )
    assert found > holding > 1
    lead = Outline(written).texts("p", **{"class": "lead"})
    assert lead == [
        f"{found} of {features.tested.sum()} tested features differ between fact and hall at a false"
        f" discovery rate of 5%; {holding} still do at equal length."
    ]
    assert report.swapped is not None
    assert f"{report.swapped.found.mean():.1f} are found on average (20 draws" in written
    assert "tells hall from fact in 71% (68 to 74) of held-out pairs" in written
    assert "in 80% (78 to 82): more than length tells" in written


def test_controls_are_named(small: Report) -> None:
    text = page(replace(small, controls=("tokens", "log-probability")))
    assert "still do at equal length and log-probability." in text
    assert "certainty" not in text
    assert "certainty" in page(small)


def test_page_says_when_nothing_is_found(small: Report) -> None:
    text = page(reports.nothing_found(small))
    assert small.features is not None
    assert f"None of {small.features.tested.sum()} tested features is found to differ" in text


def test_page_says_when_nothing_is_left_after_control(small: Report) -> None:
    features = small.features
    assert features is not None
    verdict = np.where(features.verdict == "holds", "controls", features.verdict)
    text = page(replace(small, features=replace(features, verdict=verdict)))
    assert "none still does at equal length." in text


def test_swapped_labels_that_find_much_are_a_warning(small: Report) -> None:
    assert small.swapped is not None
    text = page(replace(small, swapped=replace(small.swapped, found=np.full(10, 40))))
    assert "with distrust" in text


def test_ranked_table_has_what_holds_first_and_says_what_it_leaves_out(
    small: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.findings.tables.SHOWN_FEATURES", 30)
    features = small.features
    assert features is not None
    made = page(small)
    outline = Outline(made)
    rows = [attributes["data-find"] for attributes in outline.attributes("tr") if "data-find" in attributes]
    key = {"holds": 0, "controls": 1, "none": 2, "few": 3}
    expected = sorted(
        (key[str(features.verdict[i])], float(features.q[i]), int(features.sae[i]), int(features.feature[i]))
        for i in range(len(features.sae))
        if features.tested[i]
    )
    names = ("l7", "l15", "l22")
    assert [str(row).split()[:2] for row in rows] == [
        [names[sae], str(number)] for _, _, sae, number in expected[:30]
    ]
    assert f"the first 30 are shown and {len(expected) - 30} are not" in made


def test_ghosts_are_those_that_fire_on_the_negative_text_alone(report: Report, written: str) -> None:
    features = report.features
    assert features is not None
    ghosts = [
        i
        for i in range(len(features.sae))
        if features.rate_positive[i] == 0 and features.only_negative[i] >= 5
    ]
    assert ghosts
    number = f"{len(ghosts)} feature{'s fire' if len(ghosts) > 1 else ' fires'} on "
    assert number in written


def test_tokens_have_the_reports_activations(report: Report, written: str) -> None:
    expected = [
        (token.text, token.activation, token.is_peak)
        for detail in report.details
        for example in detail.examples
        for text in example.texts
        for token in text.tokens
        if token.activation
    ]
    marks = [
        ("".join(text), attributes["title"], "peak" in str(attributes["class"]))
        for tag, attributes, text in Outline(written).elements
        if tag == "mark" and "title" in attributes
    ]
    assert [(text, is_peak) for text, _, is_peak in marks] == [
        (text, is_peak) for text, _, is_peak in expected
    ]
    for (_, title, _), (_, activation, _) in zip(marks, expected, strict=True):
        assert float(str(title).split(",")[0]) == pytest.approx(activation, rel=0.006)


def test_number_that_is_not_there_is_a_dash(small: Report) -> None:
    column = small.columns[0]
    nothing = replace(column.difference, raw=None, p=None, q=None, adjusted=None, matched=None, d_z=None)
    text = page(replace(small, columns=(replace(column, difference=nothing),)))
    (cells,) = {row for row in Outline(text).texts("tr") if row.startswith(column.column) and "1,130" in row}
    assert cells.count(DASH) == 6
    assert "nan" not in re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL).lower().split()


def test_group_without_a_comparison_is_named_and_not_drawn(report: Report, small: Report) -> None:
    left_out, *compared = small.group_names
    columns = [
        one for one in report.columns if one.column == small.columns[0].column and one.group != left_out
    ]
    without = replace(small, columns=tuple(columns))
    assert f"With too few pairs to be compared: <bdi>{left_out}</bdi>." in page(without)
    assert figures.compared_groups(without) == tuple(compared)


def test_mean_of_zero_is_drawn_in_deviations(small: Report) -> None:
    difference = replace(small.columns[0].difference, raw=Estimate(0.0, -1.0, 1.0), d_z=0.0, deviation=2.0)
    assert tables.in_deviations(difference)[0] == Estimate(0.0, -0.5, 0.5)
    assert tables.in_deviations(replace(difference, deviation=0.0)) == (None, None, None)


def test_figures_keep_the_numbers_of_their_axes(written: str) -> None:
    """Geometry is rounded in the drawings; what stands at a tick must not be."""
    for drawing in re.findall(r'<svg class="figure".*?</svg>', written, re.DOTALL):
        ticks = [
            float(text.replace(MINUS, "-"))
            for text in re.findall(rf'text-anchor="(?:middle|end)"[^>]*>({MINUS}?[\d.]+)</text>', drawing)
        ]
        steps = np.unique(np.round(np.diff(ticks), 6))
        assert len(ticks) >= 3 and len(steps) == 1, ticks


@pytest.mark.parametrize("make", [reports.groups, reports.prevalences])
def test_samples_without_a_contrast_have_a_page(make: object) -> None:
    assert callable(make)
    report = make(width=40)
    outline = Outline(page(report))
    sections = [attributes["id"] for attributes in outline.attributes("section")]
    assert sections[0] == "result" and sections[-1] == "method"
    assert ("groups" if report.grouped else "prevalence") in sections
    assert "features" not in sections


def test_every_part_that_is_not_there_is_left_out(report: Report) -> None:
    bare = replace(
        report,
        columns=(),
        features=None,
        swapped=None,
        probes=(),
        shapes=(),
        details=(),
        mean_tokens=(),
        run=replace(report.run, dictionaries=(), reject_reasons=(), texts=(), rejects=0),
        notes=("The folders are empty.",),
    )
    outline = Outline(page(bare))
    assert [one["id"] for one in outline.attributes("section")] == ["result", "run", "method"]


HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</style></script><svg onload=alert(1)>",
    "\u202egnirts\u2066\x1b[31m\x00\x07",
    "{{ 7 * 7 }}{% for a in b %}",
    "$\\frac{1}{0}$ <b> & 'quoted'",
    "javascript:alert(1)",
    "\udcff\ud800 lone",
    "\u0645\u0631\u062d\u0628\u0627 \u4f60\u597d \U0001f600",
    "w" * 100_000,
)


def hostile(report: Report, text: str) -> Report:
    """The report with others' text wherever a report has others' text."""
    shown = report.details[0].examples[0].texts[0]
    token = replace(shown.tokens[1], text=text, activation=1.0)
    example = replace(
        report.details[0].examples[0],
        sample_id=text,
        folder=text,
        group=text,
        texts=(replace(shown, name=text, tokens=(token, replace(token, activation=None))),),
    )
    detail = replace(
        report.details[0],
        examples=(example,),
        promotes=((text, 1.0),),
        groups=((text, 0.1, 0.2, 9),),
        histogram=tuple((text, counts) for _, counts in report.details[0].histogram),
        link=text,
        words_missing="",
    )
    run = report.run
    dictionary = replace(run.dictionaries[0], name=text, hook=text, architecture=text, warnings=(text,))
    return replace(
        report,
        run=replace(
            run,
            title=text,
            folders=(text, text),
            reject_reasons=((text, 3),),
            model=text,
            texts=((text, text),),
            positive=text,
            negative=text,
            dictionaries=(dictionary, *run.dictionaries[1:]),
        ),
        group_column=text,
        group_names=(text,),
        columns=tuple(
            replace(one, column=text, group=text if one.group else None, unit=text, orientation=text)
            for one in report.columns[:1] + report.columns[5:6] + report.columns[14:15]
        ),
        probes=tuple(replace(one, name=f"features {text}", reason=text) for one in report.probes[:2]),
        shapes=tuple(replace(one, group=text, text=text) for one in report.shapes[:2]),
        details=(detail,),
        notes=(text,),
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_stays_text(report: Report, written: str, text: str) -> None:
    made = page(hostile(report, text))
    outline = Outline(made)
    assert len(outline.attributes("script")) == len(outline.attributes("style")) == 1
    assert not outline.attributes("img")
    assert not [name for _, attributes, _ in outline.elements for name in attributes if name.startswith("on")]
    assert not [one for one in outline.attributes("a") if str(one["href"]).startswith("javascript")]
    assert all(character.isprintable() or character in "\n\xa0" for character in made)
    made.encode()
    assert len(made) < len(written) * 1.5
    assert max(map(len, re.findall("w+", made))) <= pages.MOST_CHARACTERS
