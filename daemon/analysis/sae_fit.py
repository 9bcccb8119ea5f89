"""Whether what SAEs make of a file is far from what is known of them: by their cards, in the file before.

An SAE at another layer, of another model, or on values of another scale gives numbers like any other. How
many features fire (L0), and how little of the variance they explain (FVU), give it away. Knows no files but
by what is said of them.

The limits are wide: cards are measured on every token of running text, and files are of any kind. By the
bundled dictionaries, last tokens of short prompts have up to 2.5 times the L0 of the card and FVUs up to 0.1
above it. What is found is an SAE some layers away, or a scale of a half or of ten; the layer beside is not.
"""

from __future__ import annotations

from collections.abc import Sequence

from daemon.model_info import Fit, ModelInfo
from daemon.records import AGAINST, Departure, DepartureKind, Outcome

MIN_READINGS = 64  # of a file that is judged
L0_FACTOR = 4.0  # more or less
FVU_FACTOR = 2.0  # and
FVU_MORE = 0.25  # at least so much more


class FitComparison:
    """Compares files as they end. Those with few readings are passed over."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._before: Sequence[Fit] = [Fit()] * len(info.saes)

    def of(self, outcome: Outcome) -> tuple[Departure, ...]:
        """Compare a file with the cards and with the committed file before it; list what is far."""
        if outcome.kind != "committed" or outcome.readings < MIN_READINGS:
            return ()
        fits = tuple(map(Fit, outcome.mean_l0, outcome.fvu))
        before, self._before = self._before, fits
        return tuple(
            Departure(sae, kind, against, value, expected)
            for sae, fit, *known in zip(self._info.saes, fits, self._info.known_fits, before, strict=True)
            for against, other in zip(AGAINST, known, strict=True)
            for kind, value, expected in far(fit, other)
        )


def far(fit: Fit, known: Fit) -> list[tuple[DepartureKind, float, float]]:
    """Kind, value and what it should be, of those that are far from what is known."""
    found: list[tuple[DepartureKind, float, float]] = []
    if fit.l0 is not None and known.l0 and not known.l0 / L0_FACTOR <= fit.l0 <= known.l0 * L0_FACTOR:
        found.append(("l0", fit.l0, known.l0))
    if fit.fvu is not None and known.fvu is not None and fit.fvu > highest_fvu(known.fvu):
        found.append(("fvu", fit.fvu, known.fvu))
    return found


def highest_fvu(known: float) -> float:
    """Up to which an FVU is not far from one that is known."""
    return max(known * FVU_FACTOR, known + FVU_MORE)


def far_from_card(fit: Fit, card: Fit, readings: int) -> list[DepartureKind] | None:
    """List what is far from the card; None where that can't be said."""
    if readings < MIN_READINGS or card == Fit():
        return None
    return [kind for kind, *_ in far(fit, card)]
