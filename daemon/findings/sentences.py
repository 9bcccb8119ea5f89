"""Says in sentences what was run, what holds and what does not. Every sentence has its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from daemon.analysis.sae_fit import FVU_FACTOR, FVU_MORE, L0_FACTOR, MIN_READINGS
from daemon.findings import numbers
from daemon.findings.cautions import extrapolates
from daemon.findings.paired_features import PairedSettings
from daemon.findings.results import (
    ColumnFinding,
    ControlledDifference,
    Estimate,
    GroupedFeatures,
    PairedFeatures,
    ProbeResult,
    Report,
    RunSummary,
    SwapControl,
    Verdict,
)

VERDICTS: dict[str, str] = {
    "holds": "holds",
    "controls": "lost to controls",
    "none": "not found",
    "few": "too few",
}
OFTEN = PairedSettings().min_firing
EXTRAPOLATED = ", extrapolated"
VERDICT_ORDER: dict[str, int] = {verdict: place for place, verdict in enumerate(VERDICTS)}


def verdict(verdict: str, *, extrapolated: bool = False, constant: bool = False) -> str:
    """Return the words of a verdict; `extrapolated` where no pair is of equal length, `constant` where all
    pairs are equal.
    """
    if constant and verdict == "few":
        return "no difference"
    return VERDICTS[str(verdict)] + (EXTRAPOLATED if extrapolated and verdict == "holds" else "")


def is_constant(difference: ControlledDifference) -> bool:
    """Return whether the two texts of every pair have the same number."""
    return difference.deviation == 0 and difference.raw is not None and difference.raw.value == 0


def listed(words: Iterable[str]) -> str:
    """Return `a, b and c`."""
    *most, last = words
    return f"{', '.join(most)} and {last}" if most else last


def held_equal(report: Report) -> str:
    """Return what the adjusted numbers hold equal: `equal length and log-probability`."""
    names = ["length" if name == "tokens" else name for name in report.controls]
    return f"equal {listed(names)}" if names else "equal length"


def what_was_run(report: Report) -> str:
    run = report.run
    if report.n_pairs and run.positive and run.negative:
        read = f"{numbers.counted(report.n_pairs, 'pair')} of texts ({run.negative} against {run.positive})"
        if report.n_clusters < report.n_pairs:
            read += f", of {numbers.counted(report.n_clusters, 'distinct prompt')},"
    else:
        read = numbers.counted(run.samples, "sample")
    folders = f" from {numbers.counted(len(run.folders), 'folder')}" if len(run.folders) > 1 else ""
    names = [one.name for one in run.dictionaries]
    read_by = f"the sparse autoencoders {listed(names)}" if len(names) > 1 else "one sparse autoencoder"
    if not names:
        return f"{read}{folders} read by {run.model}."
    return f"{read}{folders} read by {run.model} and {read_by}."


def findings(report: Report) -> list[str]:
    """Return the sentences of the first screen, the most important one first."""
    sentences: list[str] = []
    if report.features is not None:
        sentences += features(report, report.features)
        if report.swapped is not None and len(report.swapped.found):
            sentences.append(swapped(report.swapped, report.features.n_found))
    if report.grouped:
        sentences.append(grouped(report, report.grouped))
    of_columns = columns(report)
    leads = features_found(report) == 0 and any_holds(report.columns)
    sentences = [*of_columns, *sentences] if leads else [*sentences, *of_columns]
    sentences += lengths(report)
    sentences += probes(report)
    if not sentences and report.prevalence:
        why = without_groups(report)
        sentences.append(f"Nothing is compared: these samples have no contrast, and {why}.")
        sentences.append(
            "The page says how often each feature fires, and which fire together. It tests nothing."
        )
    return sentences or ["These samples allow no finding; the notes below say why."]


def without_groups(report: Report) -> str:
    """Return why no groups are compared, as part of a sentence."""
    if report.small_groups:
        return (
            f"the groups of {report.group_column} have too few samples, inside or outside:"
            f" {named(report.small_groups)}"
        )
    if report.group_column:
        return f"{report.group_column} makes one group alone"
    return "no column makes groups (--by COLUMN names one)"


def named(names: Sequence[str], most: int = 12) -> str:
    """Return `a, b, c and 3 more`."""
    more = [f"{numbers.count(len(names) - most)} more"] * (len(names) > most)
    return listed([*names[:most], *more])


def health(run: RunSummary) -> str:
    """Return how far from their cards the dictionaries are where none is warned of."""
    if run.samples < MIN_READINGS:
        return (
            f"Not judged: {numbers.counted(run.samples, 'sample')} are too few to hold a dictionary against"
            f" its card, {MIN_READINGS} are needed."
        )
    unknown = [one.name for one in run.dictionaries if one.card_l0 is None and one.card_fvu is None]
    if len(unknown) == len(run.dictionaries):
        return "Not judged: no dictionary has a card with its L0 and variance unexplained."
    limits = (
        f"a warning begins above {L0_FACTOR:g} times the card's L0 or below 1/{L0_FACTOR:g} of it, and above"
        f" {FVU_FACTOR:g} times its variance unexplained, at least {FVU_MORE * 100:g} points more"
    )
    left_out = f"; {listed(unknown)} {is_are(len(unknown))} not judged, without a card" if unknown else ""
    return f"No dictionary is far from its card: {limits}{left_out}."


def clear_but_not_found(some: Iterable[ColumnFinding]) -> bool:
    """Return whether an interval of a column that is not found leaves out 0."""
    raw = [one.difference.raw for one in some if one.difference.verdict == "none"]
    return any(one is not None and (one.low > 0 or one.high < 0) for one in raw)


def features_found(report: Report) -> int:
    return 0 if report.features is None else report.features.n_found


def any_holds(columns: Sequence[ColumnFinding]) -> bool:
    return any(one.group is None and one.difference.verdict == "holds" for one in columns)


def features(report: Report, features: PairedFeatures) -> list[str]:
    tested, found, holding = int(features.tested.sum()), features.n_found, features.n_holding
    one, other = report.run.positive, report.run.negative
    rate = numbers.target(report.target)
    equal = held_equal(report)
    if tested == 0:
        often = int(np.sum((features.rate_positive + features.rate_negative) * report.n_pairs > OFTEN - 0.5))
        if not often:
            return [f"No feature fires in enough texts to be tested between {one} and {other}."]
        return [
            f"No feature differs between {one} and {other} in enough pairs to be tested: of"
            f" {numbers.counted(often, 'feature')} that fire often enough, each is the same in nearly all"
            " pairs."
        ]
    if found == 0:
        return [
            f"None of {numbers.counted(tested, 'tested feature')} is found to differ between {one} and"
            f" {other} at a false discovery rate of {rate}."
        ]
    first = (
        f"{numbers.count(found)} of {numbers.counted(tested, 'tested feature')}"
        f" {'differs' if found == 1 else 'differ'} between {one} and {other}"
        f" at a false discovery rate of {rate};"
    )
    if holding == 0:
        return [f"{first} none still does at {equal}."]
    still = f"{numbers.count(holding)} still {'does' if holding == 1 else 'do'}"
    if extrapolates(report):
        return [f"{first} {still} by extrapolation of a regression alone, since no pair is of equal length."]
    return [f"{first} {still} at {equal}."]


def swapped(control: SwapControl, found: int) -> str:
    mean, draws, most = float(control.found.mean()), len(control.found), int(control.found.max())
    labels = "With the labels swapped at random within pairs"
    if not most:
        return f"{labels}, none is found in {numbers.counted(draws, 'draw')}."
    average = "fewer than 0.1" if mean < 0.05 else numbers.fixed(mean, 1)
    sentence = (
        f"{labels}, {average} are found on average"
        f" ({numbers.counted(draws, 'draw')}, at most {numbers.count(most)})."
    )
    if mean >= 1 and mean > control.target * max(found, 1):
        sentence += " That is more than the target allows: read the count of features with distrust."
    return sentence


def grouped(report: Report, findings: Sequence[GroupedFeatures]) -> str:
    found = sum(n_found(one.verdict) for one in findings)
    holding = sum(n_found(one.verdict, ("holds",)) for one in findings)
    groups = list(dict.fromkeys(one.group for one in findings))
    one_of = f"one of {numbers.counted(len(groups), 'group')}" if len(groups) > 1 else groups[0]
    where = f"between {one_of} and {others(report)} ({report.group_column})"
    rate = f"at a false discovery rate of {numbers.target(report.target)}"
    if not found:
        return f"No feature is found to differ {where} {rate}."
    return (
        f"{numbers.counted(found, 'difference')} of features {where} {is_are(found)} found {rate};"
        f" {numbers.count(holding) if holding else 'none'}"
        f" still {'stands' if holding == 1 else 'stand'} at {held_equal(report)}."
    )


def others(report: Report) -> str:
    """Return with what a group is compared: the other one, where there are but two and one comparison."""
    groups = {one.group for one in report.grouped} | {one.group for one in report.grouped_columns}
    rest = [name for name in report.group_names if name not in groups]
    return rest[0] if len(groups) == 1 and len(report.group_names) == 2 and rest else "all others"


def n_found(verdicts: Iterable[str], of: Sequence[str] = ("holds", "controls")) -> int:
    return sum(str(one) in of for one in verdicts)


def columns(report: Report) -> list[str]:
    """Return one sentence on the columns of the contrast, and one on those of the dictionaries."""
    everywhere = [one for one in report.columns if one.group is None]
    sentences = []
    for of_dictionary, noun in ((False, "column"), (True, "column of the dictionaries")):
        some = [one for one in everywhere if (one.sae is not None) == of_dictionary]
        if some:
            several = "columns" if not of_dictionary else "columns of the dictionaries"
            sentences.append(verdicts_of(some, noun, several, extrapolates(report)))
    if report.grouped_columns:
        some_verdicts = Counter(one.verdict for one in report.grouped_columns)
        total = numbers.counted(
            len(report.grouped_columns), "comparison of a column", "comparisons of columns"
        )
        sentences.append(f"Of {total} between groups, {counted_verdicts(some_verdicts)}.")
    return sentences


def verdicts_of(some: Sequence[ColumnFinding], noun: str, several: str, extrapolated: bool) -> str:
    """Return how many columns have each verdict, with the names of a few that hold."""
    constant = sum(is_constant(one.difference) for one in some if one.difference.verdict == "few")
    counts = Counter(one.difference.verdict for one in some)
    holding = [effect(one) for one in some if one.difference.verdict == "holds"]
    shown = f": {listed(holding)}" if 0 < len(holding) <= 4 else ""
    if len(some) == counts["none"] > 1:
        return f"None of {numbers.counted(len(some), noun, several)} is found to differ."
    said = counted_verdicts(counts, shown, constant=constant, extrapolated=extrapolated)
    return f"Of {numbers.counted(len(some), noun, several)}, {said}."


def effect(one: ColumnFinding) -> str:
    """Return `entropy (hall - fact +0.12 nat, +0.05 to +0.19)`."""
    value, interval = numbers.value_and_interval(one.difference.raw)
    unit = "" if one.unit == "1" else f" {one.unit}"
    return f"{one.column} ({one.orientation}: {value}{unit}, {interval})" if interval else one.column


def counted_verdicts(
    counts: Counter[Verdict], named: str = "", *, constant: int = 0, extrapolated: bool = False
) -> str:
    """Return how many have each verdict; `constant` of those that are too few are equal in all pairs."""
    holds, few = counts["holds"], counts["few"] - constant
    by = " by extrapolation" if holds and extrapolated else ""
    first = f"{numbers.count(holds) if holds else 'none'} {'holds' if holds == 1 else 'hold'}{by}{named}"
    parts = []
    if counts["controls"]:
        parts.append(f"{numbers.count(counts['controls'])} {were(counts['controls'])} lost to controls")
    if counts["none"]:
        parts.append(f"{numbers.count(counts['none'])} {were(counts['none'])} not found to differ")
    if constant:
        parts.append(f"{numbers.count(constant)} {were(constant)} equal in all pairs")
    if few:
        parts.append(f"{numbers.count(few)} had too few samples to test")
    if named and parts:
        return f"{first}; {listed(parts)}"
    return listed([first, *parts])


def were(number: int) -> str:
    return "was" if number == 1 else "were"


def lengths(report: Report) -> list[str]:
    mean = dict(report.mean_tokens)
    one, other = report.run.positive, report.run.negative
    if not report.n_pairs or one not in mean or other not in mean:
        return []
    difference = mean[other] - mean[one]
    size = numbers.fixed(abs(difference), 2)
    if size == numbers.fixed(0, 2):
        longer = f"On average {other} and {one} have the same number of tokens"
    else:
        longer = f"On average {other} has {size} tokens {'more' if difference > 0 else 'fewer'} than {one}"
    equal = numbers.count(report.n_matched) if report.n_matched else "none"
    pairs = numbers.counted(report.n_pairs, "pair")
    return [f"{longer}; {equal} of {pairs} {is_are(report.n_matched)} of equal length."]


def is_are(number: int) -> str:
    return "is" if number == 1 else "are"


def of_kind(results: Iterable[ProbeResult], kind: str) -> list[ProbeResult]:
    """Return the probes on `length`, on `features` of some dictionary or on the `residual` that one reads."""
    return [one for one in results if one.name.partition(" ")[0] == kind and one.accuracy is not None]


def best(results: Iterable[ProbeResult]) -> ProbeResult | None:
    """Return the probe that tells most pairs."""
    return max(results, key=lambda one: one.accuracy.value if one.accuracy else 0.0, default=None)


def probes(report: Report) -> list[str]:
    """Return the sentence that sets the best probe on features beside the one on length."""
    length = best([one for one in of_kind(report.probes, "length") if one.name == "length"])
    several = of_kind(report.probes, "features")
    features, residual = best(several), best(of_kind(report.probes, "residual"))
    negative, positive = report.run.negative, report.run.positive
    if length is None and features is None:
        return []
    told = f"tells {negative} from {positive} in"
    if length is None or features is None:
        only = length or features
        assert only is not None
        return [f"A linear probe on {only.name} {told} {share(only.accuracy)} of held-out pairs."]
    sentence = (
        f"A linear probe on length alone {told} {share(length.accuracy)} of held-out pairs,"
        f" {f'the best of {len(several)} on features' if len(several) > 1 else 'one on features'}"
        f" ({features.name}) in {share(features.accuracy)}: {compared(features, length)}."
    )
    if features.matched is not None:
        chance = "clearly above chance" if features.matched.low > 0.5 else "not clearly above chance (50%)"
        sentence += f" Among pairs of equal length the latter tells {share(features.matched)}, {chance}."
    if residual is not None:
        sentence += f" What the dictionaries read tells at most {share(residual.accuracy)} ({residual.name})."
    return [sentence]


def compared(one: ProbeResult, other: ProbeResult) -> str:
    if one.accuracy is None or other.accuracy is None:
        return "they can't be compared"
    if one.accuracy.low > other.accuracy.high:
        return "more than length tells"
    if one.accuracy.high < other.accuracy.low:
        return "less than length tells"
    return "not clearly more than length tells"


def share(one: Estimate | None) -> str:
    """Return `71% (68 to 74)`."""
    if one is None:
        return numbers.DASH
    return f"{one.value:.0%} ({one.low * 100:.0f} to {one.high * 100:.0f})"
