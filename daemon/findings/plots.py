"""Draws the page's figures. Each function returns inline SVG with its text alternative."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from daemon.findings import numbers
from daemon.findings.drawing import COLOURS, PALETTE, label, svg
from daemon.findings.results import Estimate, ProbeResult, ShapeShares, SwapControl

DPI = 72
PANEL = 350  # units wide, of the small ones
WIDE = 700
FOUND = 480
TOP, BOTTOM, RIGHT = 24, 40, 14  # units around the axes
NICE: Any = {"steps": [1, 2, 2.5, 5, 10], "min_n_ticks": 3}  # of the ticks of an axis
MARKERS = "osD^vPX*"


@dataclass(frozen=True, slots=True)
class Series:
    """Estimates of one kind, one for each row; None where there is none."""

    name: str
    colour: str
    marker: str
    estimates: tuple[Estimate | None, ...]
    hollow: bool = False


def blank(width: int, height: float, left: float) -> tuple[Figure, Axes]:
    """Return an empty figure whose axes leave room for a title, for labels and for `left` units of names.

    The room is reckoned, not measured: measuring takes long, and is of another font than the reader's.
    """
    figure = Figure(figsize=(width / DPI, height / DPI))
    inner_width, inner_height = width - left - RIGHT, height - TOP - BOTTOM
    box = (left / width, BOTTOM / height, inner_width / width, inner_height / height)
    return figure, figure.add_axes(box)


def room(names: Iterable[str]) -> float:
    """Return the width that the longest of these labels takes."""
    return 12 + 6.4 * max((len(label(name)) for name in names), default=0)


def forest(
    name: str, title: str, rows: Sequence[str], series: Sequence[Series], *, unit: str, width: int
) -> Markup:
    """Draw one row for each name, with the estimates of each series below one another around 0."""
    step = 11 * len(series) + 10
    figure, axes = blank(width, step * len(rows) + 64, room(rows))
    axes.set_title(label(title), loc="left", fontweight="bold")
    axes.axvline(0, color=COLOURS["soft"], linewidth=0.8)
    for number, one in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * 0.72 / max(len(series), 1)
        _intervals(axes, one, [row + offset for row in range(len(rows))], horizontal=True)
    axes.set_yticks(range(len(rows)), [label(row) for row in rows])
    axes.set_ylim(len(rows) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(5, **NICE))
    axes.set_xlabel(label_of_unit(unit))
    return svg(figure, name, described(title, unit, rows, series))


def over_layers(
    name: str, title: str, layers: Sequence[str], series: Sequence[Series], *, unit: str
) -> Markup:
    """Draw estimates over the dictionaries, in the order of their layers."""
    figure, axes = blank(PANEL, 190, 62)
    axes.set_title(label(title), loc="left", fontweight="bold")
    axes.axhline(0, color=COLOURS["soft"], linewidth=0.8)
    for number, one in enumerate(series):
        offset = (number - (len(series) - 1) / 2) * min(0.12, 0.6 / max(len(series), 1))
        _intervals(axes, one, [place + offset for place in range(len(layers))], horizontal=False)
    axes.set_xticks(range(len(layers)), [label(layer) for layer in layers])
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.grid(axis="y")
    axes.yaxis.set_major_locator(MaxNLocator(4, **NICE))
    axes.set_ylabel(label_of_unit(unit))
    axes.set_xlabel("dictionary")
    return svg(figure, name, described(title, unit, layers, series))


def label_of_unit(unit: str) -> str:
    return unit if len(unit) < 60 else unit[:57] + "..."


def _intervals(axes: Axes, series: Series, places: Sequence[float], *, horizontal: bool) -> None:
    colour = COLOURS[series.colour]
    for place, one in zip(places, series.estimates, strict=True):
        if one is None:
            continue
        ends, sides, at = [one.low, one.high], [place, place], (one.value, place)
        if horizontal:
            axes.plot(ends, sides, color=colour, linewidth=1.6, solid_capstyle="butt")
        else:
            axes.plot(sides, ends, color=colour, linewidth=1.6, solid_capstyle="butt")
            at = (place, one.value)
        face = COLOURS["page"] if series.hollow else colour
        axes.plot(*at, series.marker, color=colour, markerfacecolor=face, markersize=5, markeredgewidth=1.4)


def described(title: str, unit: str, rows: Sequence[str], series: Sequence[Series]) -> str:
    """Return the numbers of a figure in words."""
    parts = []
    for row, name in enumerate(rows):
        values = [
            f"{label(one.name)} {value}, {interval}"
            for one in series
            for value, interval in [numbers.value_and_interval(one.estimates[row])]
            if interval
        ]
        parts.append(f"{label(name)}: {'; '.join(values) or 'not known'}.")
    return f"{label(title)}, in {unit}, with 95% intervals. {' '.join(parts)}"


def how_many_found(
    name: str,
    dictionaries: Sequence[str],
    found: Sequence[int],
    holding: Sequence[int],
    swapped: SwapControl | None,
) -> Markup:
    """Draw how many features are found, how many hold, and how many each draw with swapped labels finds."""
    title = "Features found"
    rows = [("found", found), ("still hold", holding)]
    figure, axes = blank(FOUND, 190 if swapped is not None else 140, room(["labels swapped"]))
    axes.set_title(label(title), loc="left", fontweight="bold")
    for row, (_, counts) in enumerate(rows):
        left = 0
        for number, one in enumerate(counts):
            colour = COLOURS[PALETTE[number % len(PALETTE)]]
            axes.barh(row, one, left=left, height=0.62, color=colour, edgecolor=COLOURS["page"], linewidth=1)
            left += one
        axes.annotate(
            numbers.count(sum(counts)), (left, row), (5, 0), textcoords="offset points", va="center", size=11
        )
    names = [title for title, _ in rows]
    words = [f"{title} {sum(counts)}" for title, counts in rows]
    if swapped is not None and len(swapped.found):
        names.append("labels swapped")
        words.append(f"with swapped labels {numbers.fixed(float(swapped.found.mean()), 1)} on average")
        spread = 2 + np.linspace(-0.28, 0.28, len(swapped.found))
        axes.plot(swapped.found, spread, "o", color=COLOURS["raw"], markersize=3.5, markerfacecolor="none")
        mean = float(swapped.found.mean())
        axes.annotate(
            f"mean {numbers.fixed(mean, 1)}",
            (int(swapped.found.max()), 2),
            (9, 0),
            textcoords="offset points",
            va="center",
            size=11,
        )
    most = max(sum(found), int(swapped.found.max()) if swapped is not None and len(swapped.found) else 0, 1)
    axes.set_xlim(-0.012 * most, most * 1.16)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, **NICE))
    axes.set_xlabel("features")
    by = [
        f"{label(one)}: {numbers.count(all_)} found, {numbers.count(held)} hold"
        for one, all_, held in zip(dictionaries, found, holding, strict=True)
    ]
    return svg(figure, name, f"{title}: {', '.join(words)}. {'. '.join(by)}.")


def probes(name: str, results: Sequence[ProbeResult]) -> Markup:
    """Draw how many held-out pairs each probe tells rightly, with the line of chance."""
    title = "Held-out pairs told rightly"
    figure, axes = blank(WIDE, 34 * len(results) + 64, room(one.name for one in results))
    axes.set_title(label(title), loc="left", fontweight="bold")
    for row, one in enumerate(results):
        if one.accuracy is not None:
            value = one.accuracy.value * 100
            axes.barh(row - 0.13, value, height=0.4, color=COLOURS["adjusted"], alpha=0.28, linewidth=0)
            bar = Series("", "adjusted", "o", (scaled(one.accuracy, 100),))
            _intervals(axes, bar, [row - 0.13], horizontal=True)
        if one.matched is not None:
            matched = Series("", "matched", "D", (scaled(one.matched, 100),), hollow=True)
            _intervals(axes, matched, [row + 0.24], horizontal=True)
    axes.axvline(50, color=COLOURS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yticks(range(len(results)), [label(one.name) for one in results])
    axes.set_ylim(len(results) - 0.45, -0.55)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_xlabel("% of pairs; dashed: chance")
    words = [
        f"{label(one.name)}: {in_percent(one.accuracy)} of all pairs,"
        f" {in_percent(one.matched)} of pairs of equal length."
        for one in results
    ]
    return svg(figure, name, f"{title}; chance is 50%. {' '.join(words)}")


def in_percent(one: Estimate | None) -> str:
    return numbers.sentence_estimate(one, sign=False, scale=100, unit="%")


def scaled(one: Estimate, factor: float) -> Estimate:
    return Estimate(one.value * factor, one.low * factor, one.high * factor)


def shapes(
    name: str, title: str, rows: Sequence[ShapeShares], classes: Sequence[str], text_of_row: Sequence[str]
) -> Markup:
    """Draw the shares of the classes of shape as stacked bars, one for each text and group."""
    figure, axes = blank(PANEL, 17 * len(rows) + 64, room(text_of_row))
    axes.set_title(label(title), loc="left", fontweight="bold")
    words = []
    for row, one in enumerate(rows):
        counts = dict(one.classes)
        total = sum(counts.values())
        left = 0.0
        for number, name_of_class in enumerate(classes):
            share = 100 * counts.get(name_of_class, 0) / total if total else 0.0
            colour = COLOURS[PALETTE[number % len(PALETTE)]]
            axes.barh(
                row, share, left=left, height=0.78, color=colour, edgecolor=COLOURS["page"], linewidth=0.6
            )
            left += share
        shares = ", ".join(
            f"{label(kind)} {numbers.percent(n / total if total else None)}" for kind, n in one.classes
        )
        words.append(f"{label(text_of_row[row])}: {shares}.")
    axes.set_yticks(range(len(rows)), [label(text) for text in text_of_row])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("% of samples")
    return svg(figure, name, f"{label(title)}, shares of classes. {' '.join(words)}")
