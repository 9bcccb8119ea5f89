"""Planted groups: how often the comparison of a group with all other samples is right.

The population is that of `planted.py`. Texts of the group have the activations of its negative texts, all
others those of its positive ones, and are longer. One text in five comes two to four times. What the
statistics find in small and in large groups is compared with what is true, and so it is in shuffled groups.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import scipy.sparse

from daemon.findings.grouped import ActivationBlock, grouped_features
from daemon.findings.results import BoolArray, FloatArray, GroupedFeatures
from daemon.findings.units import Samples
from daemon.tools.planted import (
    KINDS,
    MEAN_TOKENS,
    MONTE_CARLO,
    Population,
    draw_activations,
    percent,
    population,
    rates_of_length,
    share,
)

LONGER, DEVIATION = 6.0, 4.0  # tokens by which texts of the group are longer: mean, standard deviation

SIZES = (
    (430, 20),
    (430, 100),
    (1000, 20),
    (1000, 50),
    (1000, 100),
    (1000, 500),
)  # texts, of them in the group
RARITY = ((0.0, 0.02), (0.02, 0.1), (0.1, 0.3), (0.3, 1.0))  # rates of firing, over all texts
EFFECTS = {
    "firing": "firing",
    "activation": "activation",
    "adjusted": "equal_length",
}  # and what is true of each
SHAPE = (len(EFFECTS), len(RARITY), len(KINDS))  # of the table of intervals


def draw_groups(
    people: Population, n: int, size: int, seed: int, repeated: bool = True
) -> tuple[ActivationBlock, Samples]:
    """Draw n texts, `size` of them in the group; where they are `repeated`, some come several times."""
    rng = np.random.default_rng([seed, 13])
    inside = np.arange(n) < size
    tokens = draw_tokens(inside, rng)
    chance = rng.random((n, people.n_features), dtype=np.float32)
    parts = [
        draw_activations(people, tokens[side], chance[side], negative, rng)
        for side, negative in ((inside, True), (~inside, False))
    ]
    times = np.where(rng.random(n) < 0.2, rng.integers(2, 5, n), 1) if repeated else np.ones(n, np.int64)
    text = np.repeat(np.arange(n), times)
    activations = scipy.sparse.vstack(parts).tocsr()[text].tocsc()
    samples = Samples(text, tokens[text], inside[text].astype(np.int64), ("others", "group"), "text")
    return ActivationBlock(0, 0, activations), samples


def draw_tokens(inside: BoolArray, rng: np.random.Generator) -> FloatArray:
    """Draw the tokens of texts (n,) inside the group and outside it."""
    tokens = np.rint(rng.lognormal(np.log(MEAN_TOKENS), 0.25, len(inside)))
    longer = np.where(inside, np.rint(rng.normal(LONGER, DEVIATION, len(inside))), 0)
    lengths: FloatArray = np.maximum(tokens + longer, 5)
    return lengths


@dataclass(frozen=True, slots=True)
class GroupTruth:
    """Group - others in the population; (F,) each."""

    firing: FloatArray
    activation: FloatArray
    equal_length: FloatArray


def group_truth(people: Population) -> GroupTruth:
    """Compute the true differences; those of features of length from many drawn lengths."""
    moment = np.exp(people.log_sd**2 / 2)
    group = people.rate_negative * np.exp(people.log_mean_negative)
    activation = (group - people.rate * np.exp(people.log_mean)) * moment
    firing, equal_length = people.rate_negative - people.rate, activation.copy()
    sloped = np.flatnonzero(people.of_length)
    rng = np.random.default_rng(15)
    means = []
    for inside in (np.ones(MONTE_CARLO, np.bool_), np.zeros(MONTE_CARLO, np.bool_)):
        tokens, times = np.unique(draw_tokens(inside, rng), return_counts=True)
        longer, weight = tokens - MEAN_TOKENS, times / MONTE_CARLO
        rates = rates_of_length(people, sloped, longer)
        log = people.log_mean[sloped] + people.log_slope[sloped] * longer[:, None]
        means.append((weight @ rates, weight @ (rates * np.exp(log)) * moment[sloped]))
    firing[sloped], activation[sloped] = means[0][0] - means[1][0], means[0][1] - means[1][1]
    return GroupTruth(firing, activation, equal_length)


def shuffled(samples: Samples, seed: int) -> Samples:
    """Draw which texts are in the group anew; one repeat in four changes sides, so that some are on both."""
    rng = np.random.default_rng([seed, 14])
    _, first = np.unique(samples.cluster, return_index=True)
    group = rng.permutation(samples.group[first])[samples.cluster]
    repeat = np.ones(len(group), np.bool_)
    repeat[first] = False
    changed = repeat & (rng.random(len(group)) < 0.25)
    return replace(samples, group=np.where(changed, 1 - group, group))


@dataclass(slots=True)
class GroupTally:
    """What was found in all draws of one size."""

    raw_fdp: list[float] = field(default_factory=list)
    holds_fdp: list[float] = field(default_factory=list)
    power: list[float] = field(default_factory=list)
    holds_power: list[float] = field(default_factory=list)
    length_found: list[float] = field(default_factory=list)
    length_holds: list[float] = field(default_factory=list)
    shuffled: list[float] = field(default_factory=list)
    covered: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(SHAPE, np.int64))
    intervals: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(SHAPE, np.int64))

    def add(self, people: Population, true: GroupTruth, found: GroupedFeatures) -> None:
        """Count one draw. The group is the second, so that its differences are others - group."""
        raw, holds = np.isin(found.verdict, ("holds", "controls")), found.verdict == "holds"
        of_length, planted = people.of_length, people.planted
        self.raw_fdp.append(share(raw & ~planted & ~of_length, raw))
        self.holds_fdp.append(share(holds & ~planted, holds))
        self.power.append(share(raw & planted, planted))
        self.holds_power.append(share(holds & planted, planted))
        self.length_found.append(share(raw & of_length, of_length))
        self.length_holds.append(share(holds & of_length, of_length))
        kind = np.where(planted, 1, np.where(of_length, 2, 0))
        total = found.n_inside + found.n_outside
        rate = (found.rate_inside * found.n_inside + found.rate_outside * found.n_outside) / total
        for at, (effect, name) in enumerate(EFFECTS.items()):
            wanted = -getattr(true, name)
            low, high = getattr(found, f"{effect}_low"), getattr(found, f"{effect}_high")
            given = ~(np.isnan(low) | np.isnan(high))
            inside = given & (low <= wanted) & (wanted <= high)
            for place, (least, most) in enumerate(RARITY):
                rare = (rate > least) & (rate <= most)
                for k in range(len(KINDS)):
                    self.intervals[at, place, k] += np.count_nonzero(given & rare & (kind == k))
                    self.covered[at, place, k] += np.count_nonzero(inside & rare & (kind == k))


def simulate_groups(
    people: Population, true: GroupTruth, n: int, size: int, seeds: int, repeated: bool = True
) -> GroupTally:
    """Draw one study for each seed, and count what the statistics say of it."""
    tally = GroupTally()
    for seed in range(seeds):
        block, samples = draw_groups(people, n, size, seed, repeated)
        (found,) = grouped_features([block], samples)
        tally.add(people, true, found)
        by_chance = grouped_features([block], shuffled(samples, seed))
        tally.shuffled.append(
            sum(float(np.isin(one.verdict, ("holds", "controls")).sum()) for one in by_chance)
        )
    return tally


def lines(tallies: Sequence[tuple[int, int, GroupTally]]) -> Iterator[str]:
    """Yield the tables, in Markdown."""
    yield (
        "| texts | in the group | false, found | false, `holds` | planted: found | planted: hold"
        " | length: found | length: hold | groups shuffled: found |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for n, size, tally in tallies:
        numbers = (
            tally.raw_fdp,
            tally.holds_fdp,
            tally.power,
            tally.holds_power,
            tally.length_found,
            tally.length_holds,
            tally.shuffled,
        )
        cells = [f"{np.mean(values):.4f}" for values in numbers]
        yield f"| {n} | {size} | " + " | ".join(cells) + " |"
    yield ""
    yield "Coverage of the 95% intervals, in percent, with the number of intervals:"
    yield ""
    yield "| texts | in the group | effect | firing rate | all | " + " | ".join(KINDS) + " | intervals |"
    yield "|---|---|---|---|---|" + "---|" * (len(KINDS) + 1)
    for n, size, tally in tallies:
        for at, effect in enumerate(EFFECTS):
            for place, (least, most) in enumerate(RARITY):
                covered, given = tally.covered[at, place], tally.intervals[at, place]
                if not given.any():
                    continue
                cells = [percent(covered.sum(), given.sum())]
                cells += [percent(c, g) for c, g in zip(covered, given, strict=True)]
                where = f"{100 * least:g} to {100 * most:g}%"
                yield f"| {n} | {size} | {effect} | {where} | " + " | ".join(cells) + f" | {given.sum()} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m daemon.tools.planted_groups", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=40, help="studies that are drawn of each size (40)")
    parser.add_argument("--features", type=int, default=5000, help="features of the population (5000)")
    arguments = parser.parse_args(argv)
    people = population(arguments.features)
    true = group_truth(people)
    tallies = [(n, size, simulate_groups(people, true, n, size, arguments.seeds)) for n, size in SIZES]
    sys.stdout.write("\n".join(lines(tallies)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
