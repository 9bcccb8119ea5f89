"""A line over time and a bar of shares, as SVG that stretches with the page. Knows no daemon.

Labels are HTML beside the drawing, so that they do not stretch with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from daemon.observe.markup import Html, tag

WIDTH, HEIGHT = 600.0, 100.0


def nice_ceiling(value: float) -> float:
    """The least of 1, 2, 5, 10, 20, ... that is not below the value; 1 where there is none."""
    if value <= 1:
        return 1.0
    magnitude: float = 10.0 ** math.floor(math.log10(value))
    return next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= value)


def line(
    points: Sequence[tuple[float, float | None]], *, window: float, gap: float, top: float, label: str
) -> Html:
    """Values by age in seconds, oldest first, from 0 to `top`, over the last `window` seconds.

    The line breaks where a value is None, and where more than `gap` seconds lie between two.
    """
    pieces = runs([(age, value) for age, value in points if age <= window], gap)
    located = [
        [(WIDTH * (1 - age / window), HEIGHT * (1 - value / top)) for age, value in piece] for piece in pieces
    ]
    stroke = " ".join(path(piece) for piece in located)
    area = " ".join(
        f"{path(piece)} L{piece[-1][0]:.1f} {HEIGHT:.0f} L{piece[0][0]:.1f} {HEIGHT:.0f} Z"
        for piece in located
    )
    return tag(
        "svg",
        tag("path", class_="area", d=area),
        tag("path", class_="line", d=stroke),
        viewBox=f"0 0 {WIDTH:.0f} {HEIGHT:.0f}",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )


def runs(points: Sequence[tuple[float, float | None]], gap: float) -> list[list[tuple[float, float]]]:
    """The points without a value left out, cut where the line breaks."""
    pieces: list[list[tuple[float, float]]] = []
    last: float | None = None
    for age, value in points:
        if value is None:
            last = None
            continue
        if last is None or last - age > gap:
            pieces.append([])
        pieces[-1].append((age, value))
        last = age
    return pieces


def path(piece: Sequence[tuple[float, float]]) -> str:
    """A polyline; a single point becomes a dot by its round cap."""
    first, *rest = (f"{x:.1f} {y:.1f}" for x, y in piece)
    return f"M{first} " + " ".join(f"L{point}" for point in rest or [first])


def bar(shares: Sequence[tuple[str, float]], *, label: str) -> Html:
    """Named shares that sum to 1, side by side; the names are classes of the style sheet."""
    pieces, x = [], 0.0
    for name, share in shares:
        pieces.append(
            tag("rect", class_=f"stage-{name}", x=f"{x:.2f}", y=0, width=f"{WIDTH * share:.2f}", height=10)
        )
        x += WIDTH * share
    return tag(
        "svg",
        *pieces,
        class_="bar",
        viewBox=f"0 0 {WIDTH:.0f} 10",
        preserveAspectRatio="none",
        role="img",
        aria_label=label,
    )
