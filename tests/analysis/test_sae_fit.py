from __future__ import annotations

import dataclasses

import pytest

from daemon.analysis.sae_fit import FitComparison, far_from_card
from daemon.model_info import Fit, ModelInfo, SaeInfo
from daemon.records import Departure, Outcome

HOOK = "blocks.7.hook_resid_post"
SAE = SaeInfo(HOOK, HOOK, 7, 4, 8, 4, "jumprelu", "tiny", "0")
INFO = ModelInfo("tiny", "Llama", 4, 9, "float32", "cpu", "packed", None, (SAE,), (Fit(65.0, 0.05),))


def outcome(l0: float | None, fvu: float | None, readings: int = 100) -> Outcome:
    return Outcome("committed", "f", fvu=(fvu,), mean_l0=(l0,), readings=readings)


@pytest.mark.parametrize(
    ("l0", "fvu", "kinds"),
    [
        (65, 0.05, []),
        (162, 0.125, []),  # last tokens of the demo's adversarial prompts
        (259, 0.29, []),
        (261, 0.05, ["l0"]),
        (16.5, 0.05, []),
        (16, 0.05, ["l0"]),
        (65, 0.31, ["fvu"]),
        (530, 2.7, ["l0", "fvu"]),  # the same at ten times the scale
        (None, None, []),
        (0, None, ["l0"]),
    ],
)
def test_files_far_from_the_card_are_told(l0, fvu, kinds):
    found = FitComparison(INFO).of(outcome(l0, fvu))
    assert [one.kind for one in found] == kinds
    assert {one.against for one in found} <= {"card"}
    assert far_from_card(Fit(l0, fvu), INFO.cards[0], 100) == kinds


def test_a_file_is_compared_with_the_one_before_that_had_enough_texts():
    departures = FitComparison(dataclasses.replace(INFO, cards=()))
    assert departures.of(outcome(20, 0.1)) == ()
    assert departures.of(outcome(300, 0.1, readings=63)) == ()
    assert departures.of(Outcome("failed", "f")) == ()
    (found,) = departures.of(outcome(90, 0.1))
    assert found == Departure(SAE, "l0", "file_before", 90, 20)
    assert str(found) == "mean L0 90 at blocks.7.hook_resid_post, 20 in the file before"
    assert departures.of(outcome(90, 0.1)) == ()
    (found,) = departures.of(outcome(90, 0.4))
    assert str(found) == "FVU 0.4 at blocks.7.hook_resid_post, 0.1 in the file before"


def test_what_can_not_be_said_is_null():
    assert far_from_card(Fit(65, 0.05), Fit(), 100) is None
    assert far_from_card(Fit(65, 0.05), Fit(65, 0.05), 63) is None
    assert far_from_card(Fit(500, None), Fit(65, None), 64) == ["l0"]
    assert far_from_card(Fit(65, 9.0), Fit(65, None), 64) == []
