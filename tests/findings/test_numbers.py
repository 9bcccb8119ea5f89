"""Numbers as they are printed."""

from __future__ import annotations

import math

import pytest

from daemon.findings import numbers
from daemon.findings.results import Estimate

MINUS, DASH, TIMES = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{MULTIPLICATION SIGN}"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (1.5, "1.50"),
        (-65.21, f"{MINUS}65.2"),
        (12345.6, "12,346"),
        (2.1e-7, f"2.10{TIMES}10⁻⁷"),
        (math.nan, DASH),
        (math.inf, DASH),
        (None, DASH),
    ],
)
def test_figure_has_three_digits(number: float | None, text: str) -> None:
    assert numbers.figure(number) == text


@pytest.mark.parametrize(
    ("p", "text"),
    [
        (0.5, "0.50"),
        (0.0421, "0.042"),
        (0.001, "0.001"),
        (2.13e-7, f"2.1{TIMES}10⁻⁷"),
        (0.0, "< 10⁻³⁰⁰"),
        (None, DASH),
    ],
)
def test_probability(p: float | None, text: str) -> None:
    assert numbers.probability(p) == text


@pytest.mark.parametrize(
    ("estimate", "text"),
    [
        (Estimate(0.1234, 0.05, 0.19), ("+0.123", "+0.050 to +0.190")),
        (Estimate(-31.4, -52.0, -11.0), (f"{MINUS}31", f"{MINUS}52 to {MINUS}11")),
        (Estimate(0.0001, -0.2, 0.2), ("0.00", f"{MINUS}0.20 to +0.20")),
        (Estimate(0.5, 0.5, 0.5), ("+0.500", "+0.500 to +0.500")),
        (Estimate(math.nan, 0, 1), (DASH, "")),
        (None, (DASH, "")),
    ],
)
def test_estimate_has_the_digits_that_its_interval_bears_out(
    estimate: Estimate | None, text: tuple[str, str]
) -> None:
    assert numbers.value_and_interval(estimate) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0%"), (0.0001, "< 0.1%"), (0.053, "5.3%"), (0.31, "31%"), (1, "100%"), (math.nan, DASH)],
)
def test_percent(share: float, text: str) -> None:
    assert numbers.percent(share) == text


def test_target_is_shown_as_it_was_chosen() -> None:
    assert numbers.target(0.05) == "5%"
    assert numbers.target(0.125) == "12.5%"
