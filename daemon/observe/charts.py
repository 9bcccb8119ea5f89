"""Computes the numbers that a line over time has in SVG. Knows no daemon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 600, 100  # of the drawings, in their own units
NICE_SECONDS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 43_200, 86_400)


@dataclass(frozen=True, slots=True)
class Line:
    """The path data of a line, and of the area below it."""

    stroke: str
    area: str


def nice_ceiling(value: float) -> float:
    """Return the least of 1, 2, 5, 10, 20, ... that is not below the value."""
    if value <= 1:
        return 1.0
    magnitude: float = 10.0 ** math.floor(math.log10(value))
    return next(step * magnitude for step in (1, 2, 5, 10) if step * magnitude >= value)


def nice_seconds(value: float) -> float:
    """Return the least round duration in seconds that is not below the value."""
    return float(next((nice for nice in NICE_SECONDS if nice >= value), 86_400 * (value // 86_400 + 1)))


def line(points: Sequence[tuple[float, float | None]], *, window: float, gap: float, top: float) -> Line:
    """Return the line through (age in seconds, value), oldest first, for the last `window` seconds.

    The scale ends at `top`. The line breaks where a value is None or more than `gap` seconds lie between two.
    """
    pieces = [
        [(WIDTH * (1 - age / window), HEIGHT * (1 - value / top)) for age, value in run]
        for run in runs([(age, value) for age, value in points if age <= window], gap)
    ]
    return Line(" ".join(map(path, pieces)), " ".join(map(closed_path, pieces)))


def runs(points: Sequence[tuple[float, float | None]], gap: float) -> list[list[tuple[float, float]]]:
    """Return the points that have a value, cut where the line breaks."""
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
    """Return a polyline's path data; a single point becomes a dot by its round cap."""
    first, *rest = (f"{x:.1f} {y:.1f}" for x, y in piece)
    return f"M{first} " + " ".join(f"L{point}" for point in rest or [first])


def closed_path(piece: Sequence[tuple[float, float]]) -> str:
    """Return the path data of the area between a polyline and the lower edge."""
    return f"{path(piece)} L{piece[-1][0]:.1f} {HEIGHT} L{piece[0][0]:.1f} {HEIGHT} Z"
