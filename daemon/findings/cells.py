"""Draws the small bars in the cells of tables, and marks how strongly a token fires."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from markupsafe import Markup, escape

from daemon.escaping import escape_control
from daemon.findings import numbers
from daemon.findings.results import Estimate, Example, FloatArray, IntArray, ShownToken

WIDTH = 120.0  # of a bar, in its own units
ROW = 10.0
MARK = 2.6  # radius of the dot at an estimate
LEVELS = 8  # of a token's colour
SIDES = ("positive", "negative", "reference")
HISTOGRAM_WIDTH, HISTOGRAM_HEIGHT = 320.0, 90.0


def widest(estimates: Iterable[Estimate | None]) -> float:
    """Return the largest distance from 0 that an interval reaches: the scale that bars of one table share."""
    ends = [abs(end) for one in estimates if one is not None for end in (one.low, one.high)]
    return max((end for end in ends if math.isfinite(end)), default=0.0) or 1.0


def interval_bar(estimates: Sequence[tuple[str, Estimate | None]], limit: float) -> Markup:
    """Draw estimates with their intervals below one another around 0; the numbers stand beside them.

    Each comes with the class of its colour. The scale goes from -limit to limit.
    """
    height = ROW * len(estimates)
    drawn = [_interval(name, one, limit, ROW * (row + 0.5)) for row, (name, one) in enumerate(estimates)]
    if not any(drawn):
        return Markup("")
    return Markup(
        f'<svg class="interval" viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" height="{height:g}"'
        f' aria-hidden="true"><path class="zero" d="M{WIDTH / 2:g} 0V{height:g}"/>{"".join(drawn)}</svg>'
    )


def _interval(name: str, one: Estimate | None, limit: float, y: float) -> str:
    if one is None:
        return ""
    low, at, high = (_place(number, limit) for number in (one.low, one.value, one.high))
    return (
        f'<path class="{name}" d="M{low:.1f} {y:g}H{high:.1f}"/>'
        f'<circle class="{name}" cx="{at:.1f}" cy="{y:g}" r="{MARK}"/>'
    )


def _place(number: float, limit: float) -> float:
    inner = WIDTH / 2 - MARK
    return WIDTH / 2 + inner * min(max(number / limit, -1.0), 1.0)


def share_bars(shares: Sequence[tuple[str, float]], limit: float = 1.0) -> Markup:
    """Draw shares as bars below one another; each comes with the class of its colour."""
    thick, gap = 5.0, 2.0
    bars = [
        f'<rect class="{name}" y="{row * (thick + gap):g}" width="{WIDTH * min(share / limit, 1.0):.1f}"'
        f' height="{thick:g}"/>'
        for row, (name, share) in enumerate(shares)
        if numbers.known(share)
    ]
    height = (thick + gap) * len(shares) - gap
    return Markup(
        f'<svg class="shares" viewBox="0 0 {WIDTH:g} {height:g}" width="{WIDTH:g}" height="{height:g}"'
        f' aria-hidden="true">{"".join(bars)}</svg>'
    )


def level(activation: float | None, most: float) -> int:
    """Return how strongly a token is coloured: 0 where it is silent, else 1 to LEVELS, up to `most`."""
    if activation is None or not activation > 0 or not most > 0:
        return 0
    return min(max(math.ceil(activation / most * LEVELS), 1), LEVELS)


def strongest(examples: Iterable[Example]) -> float:
    """Return the largest activation of a token in these examples."""
    return max(
        (
            token.activation
            for example in examples
            for text in example.texts
            for token in text.tokens
            if token.activation is not None and math.isfinite(token.activation)
        ),
        default=0.0,
    )


def runs(tokens: Iterable[ShownToken]) -> Iterator[tuple[str, list[ShownToken]]]:
    """Give each token that fires alone, and those between together: (fires | silent | unread, tokens)."""
    for kind, some in itertools.groupby(tokens, _kind):
        if kind == "fires":
            for token in some:
                yield kind, [token]
        else:
            yield kind, list(some)


def _kind(token: ShownToken) -> str:
    if token.activation is None:
        return "unread"
    return "fires" if token.activation > 0 else "silent"


def side(number: int) -> str:
    """Return the class of the colour of a histogram's texts, in their order."""
    return SIDES[number % len(SIDES)]


def histogram(edges: FloatArray, counts: Sequence[tuple[str, IntArray]]) -> Markup:
    """Draw how often each text's activation falls into each bin, the texts side by side."""
    bins = len(edges) - 1
    most = max((int(of.max(initial=0)) for _, of in counts), default=0)
    if bins < 1 or most == 0:
        return Markup('<p class="quiet">It fires nowhere.</p>')
    step = HISTOGRAM_WIDTH / bins
    thick = step * 0.86 / len(counts)
    bars = [
        f'<path class="{side(number)}" d="'
        + "".join(
            f"M{step * place + thick * number + step * 0.07:.1f} {HISTOGRAM_HEIGHT:g}"
            f"v{-HISTOGRAM_HEIGHT * int(one) / most:.1f}h{thick:.1f}V{HISTOGRAM_HEIGHT:g}z"
            for place, one in enumerate(of)
            if one
        )
        + '"/>'
        for number, (_, of) in enumerate(counts)
    ]
    total = "; ".join(
        f"{escape_control(name[:60])}: {numbers.counted(int(of.sum()), 'text')}" for name, of in counts
    )
    words = (
        f"Histogram of the activation from {numbers.figure(edges[0])} to {numbers.figure(edges[-1])},"
        f" at most {numbers.count(most)} per bin. {total}."
    )
    return Markup(
        f'<p class="axis"><span>{numbers.count(most)}</span></p>'
        f'<svg class="bins" role="img" aria-label="{escape(words)}" preserveAspectRatio="none"'
        f' viewBox="0 0 {HISTOGRAM_WIDTH:g} {HISTOGRAM_HEIGHT:g}">{"".join(bars)}</svg>'
    )
