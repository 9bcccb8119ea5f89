"""Chooses which figures a report has, and what is drawn in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from daemon.findings import plots, tables
from daemon.findings.drawing import PALETTE, drawn_alike
from daemon.findings.plots import Series
from daemon.findings.results import ColumnFinding, Estimate, Report, ShapeShares

DEVIATIONS = "standard deviations of the paired difference"
SHORT_DEVIATIONS = "standard deviations"
DRAWN_GROUPS = len(PALETTE)  # more than this can't be told apart by colour
DRAWN_SHAPES = 40  # rows of stacked bars of one dictionary


@dataclass(frozen=True, slots=True)
class Figures:
    """Every figure of one report; empty where there is nothing to draw."""

    found: Markup | None
    columns: Markup | None
    layers: tuple[Markup, ...]
    columns_by_group: tuple[Markup, ...]
    layers_by_group: tuple[Markup, ...]
    shapes: tuple[Markup, ...]
    shape_classes: tuple[str, ...]
    probes: Markup | None
    drawn_groups: tuple[str, ...]
    has_matched: bool


def draw(report: Report) -> Figures:
    everywhere = [one for one in report.columns if one.group is None]
    own = [one for one in everywhere if one.sae is None]
    groups = compared_groups(report)[:DRAWN_GROUPS]
    has_matched = any(one.difference.matched is not None for one in report.columns)
    kinds = ("raw", "adjusted", "matched") if has_matched else ("raw", "adjusted")
    classes = classes_of(report.shapes)
    known = [one for one in report.probes if one.accuracy is not None]
    with drawn_alike():
        return Figures(
            found=found(report),
            columns=plots.forest(
                "columns",
                "Columns of the contrast",
                [one.column for one in own],
                controlled(own, kinds),
                unit=DEVIATIONS,
                width=plots.WIDE,
            )
            if drawable(own)
            else None,
            layers=tuple(layers(report, everywhere, kinds)),
            columns_by_group=tuple(by_group(report, own)) if report.group_names else (),
            layers_by_group=tuple(layers_by_group(report, groups)),
            shapes=tuple(shapes(report.shapes, classes)),
            shape_classes=classes,
            probes=plots.probes("probes", known) if known else None,
            drawn_groups=groups,
            has_matched=has_matched,
        )


def compared_groups(report: Report) -> tuple[str, ...]:
    """Return the groups that have pairs enough to be compared."""
    compared = {one.group for one in report.columns}
    return tuple(group for group in report.group_names if group in compared)


def drawable(findings: Iterable[ColumnFinding]) -> bool:
    return any(one is not None for finding in findings for one in tables.in_deviations(finding.difference))


def found(report: Report) -> Markup | None:
    features = report.features
    if features is None or not features.tested.any():
        return None
    dictionaries = [one.name for one in report.run.dictionaries]
    return plots.how_many_found(
        "found",
        dictionaries,
        tables.per_dictionary(features, len(dictionaries), ("holds", "controls")),
        tables.per_dictionary(features, len(dictionaries), ("holds",)),
        report.swapped,
    )


def controlled(findings: Sequence[ColumnFinding | None], kinds: Sequence[str]) -> list[Series]:
    """Return the raw, adjusted and matched differences as series, one estimate for each finding."""
    triples = [
        tables.in_deviations(one.difference) if one is not None else (None, None, None) for one in findings
    ]
    looks = {"raw": (0, "o", True), "adjusted": (1, "s", False), "matched": (2, "D", True)}
    return [
        Series(
            kind, kind, looks[kind][1], tuple(one[looks[kind][0]] for one in triples), hollow=looks[kind][2]
        )
        for kind in kinds
    ]


def per_metric(findings: Iterable[ColumnFinding]) -> dict[str, dict[str, ColumnFinding]]:
    """Return the dictionaries' columns by metric and dictionary."""
    metrics: dict[str, dict[str, ColumnFinding]] = {}
    for one in findings:
        if one.sae is not None:
            metrics.setdefault(tables.metric(one), {})[one.sae] = one
    return metrics


def layers(report: Report, everywhere: Sequence[ColumnFinding], kinds: Sequence[str]) -> Iterable[Markup]:
    names = [one.name for one in report.run.dictionaries]
    for number, (metric, of) in enumerate(per_metric(everywhere).items()):
        if drawable(of.values()):
            series = controlled([of.get(name) for name in names], kinds)
            yield plots.over_layers(f"layers{number}", metric, names, series, unit=SHORT_DEVIATIONS)


def by_group(report: Report, own: Sequence[ColumnFinding]) -> Iterable[Markup]:
    """Draw each column of the contrast over all pairs and in each group."""
    shown = compared_groups(report)[:40]
    for number, column in enumerate(own):
        of = {one.group: one for one in report.columns if one.column == column.column and one.sae is None}
        rows = [column, *(of.get(group) for group in shown)]
        if drawable(one for one in rows if one is not None):
            yield plots.forest(
                f"groups{number}",
                column.column,
                ["all", *shown],
                controlled(rows, ("raw", "adjusted")),
                unit=SHORT_DEVIATIONS,
                width=plots.PANEL,
            )


def layers_by_group(report: Report, groups: Sequence[str]) -> Iterable[Markup]:
    """Draw each metric over the dictionaries, one series for each group, at equal length."""
    names = [one.name for one in report.run.dictionaries]
    grouped = {group: per_metric(one for one in report.columns if one.group == group) for group in groups}
    metrics = dict.fromkeys(metric for of in grouped.values() for metric in of)
    for number, metric in enumerate(metrics):
        series = [
            Series(
                group,
                PALETTE[place],
                plots.MARKERS[place],
                tuple(at_equal_length(grouped[group].get(metric, {}).get(name)) for name in names),
            )
            for place, group in enumerate(groups)
        ]
        if any(one is not None for kind in series for one in kind.estimates):
            yield plots.over_layers(f"layersgroup{number}", metric, names, series, unit=SHORT_DEVIATIONS)


def at_equal_length(finding: ColumnFinding | None) -> Estimate | None:
    return tables.in_deviations(finding.difference)[1] if finding is not None else None


def classes_of(shares: Sequence[ShapeShares]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in shares for name, _ in one.classes))


def shapes(shares: Sequence[ShapeShares], classes: Sequence[str]) -> Iterable[Markup]:
    """Draw one figure for each dictionary, with a bar for each text, over all samples and in each group."""
    for number, sae in enumerate(dict.fromkeys(one.sae for one in shares)):
        rows = [one for one in shares if one.sae == sae]
        rows.sort(key=lambda one: one.group is not None)  # all first; else in the order that they come in
        rows = rows[:DRAWN_SHAPES]
        names = [f"{one.group or 'all'}, {one.text}" for one in rows]
        yield plots.shapes(f"shapes{number}", f"Shapes at {sae}", rows, classes, names)
