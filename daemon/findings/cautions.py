"""Warns where the samples can't bear out what the page says at equal length, or at the tokens that are read.

Knows no statistics: it reads what the report says of its pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

from daemon.findings import numbers
from daemon.findings.results import Report
from daemon.findings.verdicts import INFORMATIVE_MATCHED


def extrapolates(report: Report) -> bool:
    """Return whether what is said at equal length rests on a regression alone: no pair has that length."""
    return report.n_pairs > 0 and report.n_matched == 0


def cautions(report: Report) -> Iterator[str]:
    """Give the sentences that a reader needs before the numbers."""
    if extrapolates(report):
        yield (
            f"No pair is of equal length{differences(report)}. What the page says at equal length is"
            " extrapolation of the regression alone, and no pair can check it."
        )
    elif report.n_pairs > 0 and report.n_matched < min(INFORMATIVE_MATCHED, report.n_pairs):
        yield (
            f"Only {numbers.counted(report.n_matched, 'pair')} of {numbers.count(report.n_pairs)}"
            f" {'is' if report.n_matched == 1 else 'are'} of equal length{differences(report)}. What the page"
            " says at equal length rests on the regression: these are too few to check it."
        )


def differences(report: Report) -> str:
    """Return by how much the texts of a pair differ in length, as part of a sentence."""
    if report.length_range is None:
        return ""
    least, most = report.length_range
    if least <= 0 <= most:
        span = f"from {tokens(least)} to {tokens(most)}"
        return f": {report.run.negative} has {span} than {report.run.positive}"
    low, high = sorted((abs(least), abs(most)))
    more = "more" if least > 0 else "fewer"
    span = numbers.counted(high, "token") if low == high else f"{low} to {numbers.counted(high, 'token')}"
    return f": {report.run.negative} has {span} {more} than {report.run.positive}"


def tokens(difference: int) -> str:
    return f"{numbers.counted(abs(difference), 'token')} {'fewer' if difference < 0 else 'more'}"
