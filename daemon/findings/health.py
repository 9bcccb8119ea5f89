"""Tells how the dictionaries do on the samples of a study, and why records gave no sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import orjson

from daemon.analysis.sae_fit import MIN_READINGS, far
from daemon.errors import ConfigError
from daemon.findings.activations import Counts
from daemon.findings.results import DictionaryHealth
from daemon.findings.study import Study
from daemon.model_info import Fit

REJECTS = "rejects.jsonl"
ALIKE = (
    " Or the texts are much alike where they are read: FVU is a share of the variance among them, and a small"
    " variance makes it large."
)
MOST_REASONS = 1000  # different ones that are told apart

# Of the bundled dictionaries by hash, at last tokens: the lowest and highest mean L0 of the demo's four
# domains, as files of their own, and the highest FVU.
DEMO_RANGES: dict[str, tuple[float, float, float]] = {
    "fc1826cc61e6212a0e1e3350e27885f56df858fd3a2b793b724574c5f852f37e": (65.4, 181.1, 0.1784),
    "2e69db4dd2e504d73d7c26b4345a1669c00a6040e77762bbc15255f02405338f": (64.1, 108.5, 0.2138),
    "d4f3ce80e887f17683e8a38f5881d095f2e9628d03de8eae9bb6ce2a410bedce": (56.2, 78.3, 0.2956),
}


def health_of(study: Study, counts: Counts) -> tuple[DictionaryHealth, ...]:
    """Return every dictionary's L0, FVU and dead features, and sentences on what is not as expected."""
    return tuple(dictionary(study, counts, number) for number in range(len(study.saes)))


def dictionary(study: Study, counts: Counts, number: int) -> DictionaryHealth:
    entry = study.saes[number]
    entries = [folder.manifest.saes[number] for folder in study.folders]
    rows = [folder.manifest.rows for folder in study.folders]
    fit = Fit(weighted([one.mean_l0 for one in entries], rows), weighted([one.fvu for one in entries], rows))
    card = Fit(entry.card.mean_l0, entry.card.fvu)
    of_demo = DEMO_RANGES.get(entry.weights_sha256 or "") if study.manifest.positions == "last" else None
    return DictionaryHealth(
        name=entry.prefix,
        hook=entry.hook,
        layer=entry.layer,
        architecture=entry.architecture,
        source=entry.source,
        d_sae=entry.d_sae,
        mean_l0=fit.l0,
        fvu=fit.fvu,
        card_l0=card.l0,
        card_fvu=card.fvu,
        dead=counts.dead(number),
        warnings=warnings_of(fit, card, sum(rows), of_demo),
        neuronpedia_id=entry.neuronpedia_id,
    )


def weighted(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    """Return the mean over folders, each by its samples; None where one folder has none."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not sum(weights):
        return None
    return sum(value * weight for value, weight in zip(known, weights, strict=True)) / sum(weights)


def warnings_of(
    fit: Fit, card: Fit, rows: int, of_demo: tuple[float, float, float] | None
) -> tuple[str, ...]:
    if rows < MIN_READINGS:
        return ()
    found = [
        f"{'Mean L0' if kind == 'l0' else 'FVU'} is {value:.3g}, its card says {expected:.3g}:"
        " far from it. It may read another layer, model or scale than it was trained on."
        f"{ALIKE if kind == 'fvu' else ''}"
        for kind, value, expected in far(fit, card)
    ]
    if of_demo is not None and not found:
        low, high, most = of_demo
        if fit.l0 is not None and not low <= fit.l0 <= high:
            found.append(
                f"Mean L0 is {fit.l0:.3g}; on the demo's samples it is {low:.3g} to {high:.3g}:"
                " these texts are of another kind."
            )
        if fit.fvu is not None and fit.fvu > most:
            found.append(
                f"FVU is {fit.fvu:.3g}; on the demo's samples it is at most {most:.3g}: more of these"
                " texts is left unexplained."
            )
    return tuple(found)


def reject_reasons(study: Study) -> tuple[tuple[str, int], ...]:
    """Count the records that were rejected for each reason, most frequent first.

    Raises ConfigError for a file that is damaged or has another number of lines than its manifest says.
    """
    reasons: Counter[str] = Counter()
    for folder in study.folders:
        path = folder.file(REJECTS)
        lines = 0
        if path.is_file():
            with path.open("rb") as file:
                for line in file:
                    lines += 1
                    try:
                        reason = orjson.loads(line)["reason"]
                    except (ValueError, TypeError, KeyError):
                        raise ConfigError(
                            f"{path}: line {lines} is no reject of lensd's: restore it,"
                            " or leave the folder out"
                        ) from None
                    known = str(reason) in reasons or len(reasons) < MOST_REASONS
                    reasons[str(reason) if known else "other"] += 1
        if lines != folder.manifest.rejects:
            raise ConfigError(
                f"{path}: has {lines} lines, its manifest says {folder.manifest.rejects} rejects: restore it,"
                " or leave the folder out"
            )
    return tuple(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
