"""On planted groups the statistics keep what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from daemon.tools import planted_groups
from daemon.tools.planted import population
from daemon.tools.planted_groups import group_truth, lines, main, simulate_groups


@pytest.mark.parametrize(
    ("texts", "size", "seeds", "power"), [(430, 60, 12, 0.0), (430, 200, 8, 0.2), (1000, 100, 8, 0.1)]
)
def test_planted_groups_meet_the_bars(texts: int, size: int, seeds: int, power: float) -> None:
    """The tables of daemon/STATISTICS.md with fewer seeds and features, and as much room as that needs."""
    people = population(features=800, planted=40, of_length=40)
    tally = simulate_groups(people, group_truth(people), texts, size, seeds)
    assert np.mean(tally.length_holds) <= 0.01
    assert np.mean(tally.shuffled) <= 0.2
    if size >= 100:  # in a small group little is found, and one false finding is all that there is
        assert np.mean(tally.raw_fdp) <= 0.06
        assert np.mean(tally.holds_fdp) <= 0.05
        assert np.mean(tally.power) > power
        assert np.mean(tally.holds_power) > power / 2
    covered, given = tally.covered.sum(axis=2), tally.intervals.sum(axis=2)
    enough = given > 400
    assert enough.any(axis=1).all()
    share = covered[enough] / given[enough]
    assert (share > 0.92).all()
    assert (share < 0.98).all()


def test_command_prints_its_tables(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planted_groups, "SIZES", ((60, 25),))
    people = population(features=240)
    tally = simulate_groups(people, group_truth(people), 60, 25, 1)
    assert main(["--seeds", "1", "--features", "240"]) == 0
    assert capsys.readouterr().out.splitlines() == list(lines([(60, 25, tally)]))
