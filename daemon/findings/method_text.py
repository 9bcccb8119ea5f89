"""Says in the page's method which tests gave its numbers: exact ones only where they were exact."""

from __future__ import annotations

from daemon.findings.paired_tests import EXACT_TIED_UP_TO, EXACT_UP_TO
from daemon.findings.results import Report


def clustered(report: Report) -> bool:
    """Return whether some samples share a prompt or a text, so that they are not independent."""
    return 0 < report.n_clusters < (report.n_pairs or report.run.samples)


def mcnemar(report: Report) -> str:
    """Return the name of the test of firing within pairs."""
    return "clustered McNemar" if clustered(report) else "exact McNemar"


def tests_of_pairs(report: Report) -> str:
    """Return which tests the p-values of pairs are of."""
    if clustered(report):
        return (
            "Firing: McNemar's test for clusters. Activation and columns: Wilcoxon's signed-rank test for"
            " clusters. Some pairs share a prompt, so both compare the sums of whole clusters, by a normal"
            " approximation; neither is exact."
        )
    return (
        "Firing: exact McNemar test. Activation and columns: Wilcoxon signed-rank test, exact up to"
        f" {EXACT_UP_TO} pairs that differ ({EXACT_TIED_UP_TO} where some differ equally), else by a normal"
        " approximation."
    )
