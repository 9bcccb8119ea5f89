"""On data of which the truth is known the statistics keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from daemon.tools import planted
from daemon.tools.planted import lines, main, population, simulate


@pytest.fixture(autouse=True)
def _small_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "MONTE_CARLO", 20_000)


def test_planted_data_meet_the_bars() -> None:
    """The table of daemon/STATISTICS.md with fewer seeds and features, and as much room as that needs."""
    tally = simulate(population(features=600, planted=40, of_length=40), seeds=8)
    assert np.mean(tally.raw_fdp) <= 0.05
    assert np.mean(tally.holds_fdp) <= 0.05
    assert np.mean(tally.power) > 0.3
    assert np.mean(tally.holds_power) > 0.2
    assert np.mean(tally.length_found) > 0.1
    assert np.mean(tally.length_flagged) > 0.95
    assert np.mean(tally.swapped) < 0.5
    covered = tally.covered.sum(axis=(1, 2)) / tally.intervals.sum(axis=(1, 2))
    assert ((covered > 0.93) & (covered < 0.97)).all()


def test_command_prints_its_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted, "MONTE_CARLO", 500)
    tally = simulate(population(features=240), seeds=1, n=100)
    assert main(["--seeds", "1", "--pairs", "100", "--features", "240"]) == 0
    assert capsys.readouterr().out.splitlines() == list(lines(tally))
