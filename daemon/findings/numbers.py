"""Formats numbers as a paper prints them. A number that is not there is a dash."""

from __future__ import annotations

import math
from collections.abc import Sequence

from daemon.findings.results import Estimate

DASH = "\N{EN DASH}"
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LEAST_P = 1e-300  # below it a float holds no more than that it is small


def known(number: float | None) -> bool:
    """Return whether there is a finite number."""
    return number is not None and math.isfinite(number)


def estimate(value: float, low: float, high: float) -> Estimate | None:
    """Return an estimate of three entries of arrays, None where one of them is not known."""
    return Estimate(float(value), float(low), float(high)) if all(map(known, (value, low, high))) else None


def count(number: float | None) -> str:
    return f"{number:,.0f}".replace("-", MINUS) if number is not None and math.isfinite(number) else DASH


def counted(number: int, noun: str, several: str | None = None) -> str:
    """Return a number with its noun: `1 pair`, `2 pairs`."""
    return f"{count(number)} {noun if number == 1 else several or noun + 's'}"


def fixed(number: float | None, decimals: int, *, sign: bool = False) -> str:
    """Return a number with so many decimals; `sign` shows a plus too, but never that of a zero."""
    if number is None or not math.isfinite(number):
        return DASH
    text = f"{number:+,.{decimals}f}" if sign else f"{number:,.{decimals}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def figure(number: float | None, digits: int = 3) -> str:
    """Return a number to so many significant digits."""
    if number is None or not math.isfinite(number):
        return DASH
    if number == 0:
        return "0"
    power = math.floor(math.log10(abs(number)))
    if power < -5 or power > 8:
        return power_of_ten(number, digits - 1)
    return fixed(number, max(digits - 1 - power, 0))


def power_of_ten(number: float, decimals: int) -> str:
    """Return a number as mantissa and power of ten."""
    mantissa, _, exponent = f"{number:.{decimals}e}".partition("e")
    return f"{mantissa}{TIMES}10{str(int(exponent)).translate(SUPERSCRIPTS)}".replace("-", MINUS)


def decimals_of(interval: Sequence[float]) -> int:
    """Return how many decimals show an interval's width to two digits."""
    low, high = interval
    width = (high - low) / 2
    if width <= 0 or not math.isfinite(width):
        return 3
    return min(max(1 - math.floor(math.log10(width)), 0), 8)


def value_and_interval(one: Estimate | None, *, sign: bool = True, scale: float = 1.0) -> tuple[str, str]:
    """Return an estimate as `+0.12` and `+0.05 to +0.19`, to the digits that its interval bears out."""
    if one is None or not all(map(known, (one.value, one.low, one.high))):
        return DASH, ""
    value, low, high = (number * scale for number in (one.value, one.low, one.high))
    decimals = decimals_of((low, high)) if high > low else max(2 - exponent(value), 0)
    shown = [fixed(number, decimals, sign=sign) for number in (value, low, high)]
    return shown[0], f"{shown[1]} to {shown[2]}"


def exponent(number: float) -> int:
    return math.floor(math.log10(abs(number))) if number else 0


def sentence_estimate(one: Estimate | None, *, sign: bool = True, scale: float = 1.0, unit: str = "") -> str:
    """Return an estimate within a sentence: `+0.12 (95% interval +0.05 to +0.19)`."""
    value, interval = value_and_interval(one, sign=sign, scale=scale)
    return f"{value}{unit} (95% interval {interval}{unit})" if interval else value


def percent(share: float | None, decimals: int | None = None) -> str:
    """Return a share as per cent; small shares with a decimal."""
    if share is None or not math.isfinite(share):
        return DASH
    number = share * 100
    if decimals is None and 0 < number < 0.05:
        return "< 0.1%"
    if decimals is None:
        decimals = 1 if 0 < abs(number) < 10 else 0
    return f"{fixed(number, decimals)}%"


def target(share: float) -> str:
    """Return a share that was chosen, as it was: `5%`."""
    return f"{share * 100:g}%"


def probability(p: float | None) -> str:
    """Return a p or q value to two digits."""
    if p is None or not math.isfinite(p):
        return DASH
    if p < LEAST_P:
        return "< 10⁻³⁰⁰"
    if p >= 0.0995:
        return f"{p:.2f}"
    return f"{p:.3f}" if p >= 0.001 else power_of_ten(p, 1)
