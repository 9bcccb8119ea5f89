"""Planted data: pairs of which it is known what differs, and how often the statistics say so.

A population is drawn once: features with realistic rates (0.1% to 50%) and log-normal activations, of which
100 differ between the two texts, 100 depend on the number of tokens alone, and the others on neither.
Negative texts are longer, so the features of length differ too, until length is held equal. Then samples of
1,000 pairs are drawn from it, one for each seed, and what the statistics find is compared with what is true.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
from scipy import special

from daemon.findings.paired_features import FeatureBlock, PairedSettings, paired_features
from daemon.findings.paired_tests import by_size, signed_ranks
from daemon.findings.results import BoolArray, FloatArray, IntArray, PairedFeatures, Pairs, SwapControl
from daemon.findings.sparse import Columns, as_columns

MEAN_TOKENS = 40.0
LONGER = 3.0  # mean tokens by which the negative text is longer
SHARED = 0.5  # chance that both texts of a pair fire a feature from the same draw
MONTE_CARLO = 100_000  # pairs, from which the true rank-biserial is computed


@dataclass(frozen=True, slots=True)
class Population:
    """How each of F features fires, with what activation, in either text; (F,) each."""

    rate: FloatArray  # of positive texts, at the mean number of tokens
    rate_negative: FloatArray
    log_mean: FloatArray  # of the activation
    log_mean_negative: FloatArray
    log_sd: FloatArray
    rate_slope: FloatArray  # of the log-odds of firing, per token
    log_slope: FloatArray  # of the log-activation, per token

    @property
    def n_features(self) -> int:
        return len(self.rate)

    @property
    def planted(self) -> BoolArray:
        """(F,) features that differ between texts of equal length."""
        different: BoolArray = (self.rate != self.rate_negative) | (self.log_mean != self.log_mean_negative)
        return different

    @property
    def of_length(self) -> BoolArray:
        """(F,) features that depend on the number of tokens."""
        sloped: BoolArray = self.rate_slope != 0
        return sloped


def population(features: int = 5000, planted: int = 100, of_length: int = 100, seed: int = 0) -> Population:
    """Draw a population: the first `planted` features differ, the next `of_length` depend on length."""
    rng = np.random.default_rng([seed, 10])
    rate = np.exp(rng.uniform(np.log(0.001), np.log(0.5), features))
    first, second = slice(0, planted), slice(planted, planted + of_length)
    # What can't fire can't differ: both kinds are planted among features of 1% to 30%.
    seen = planted + of_length
    rate[:seen] = np.exp(rng.uniform(np.log(0.01), np.log(0.3), seen))
    log_mean = rng.normal(0, 0.5, features)
    rate_negative, log_mean_negative = rate.copy(), log_mean.copy()
    kind = np.arange(planted) % 3  # firing, magnitude, both
    direction = rng.choice([-1.0, 1.0], planted)
    odds = special.logit(rate[first]) + direction * rng.uniform(0.3, 1.5, planted)
    rate_negative[first] = np.where(kind != 1, special.expit(odds), rate[first])
    shift = direction * rng.uniform(0.2, 0.8, planted)
    log_mean_negative[first] += np.where(kind != 0, shift, 0)
    rate_slope, log_slope = np.zeros(features), np.zeros(features)
    rate_slope[second] = rng.choice([-1.0, 1.0], of_length) * rng.uniform(0.05, 0.2, of_length)
    log_slope[second] = rate_slope[second] / 4
    return Population(
        rate,
        rate_negative,
        log_mean,
        log_mean_negative,
        rng.uniform(0.3, 0.8, features),
        rate_slope,
        log_slope,
    )


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of both texts of n pairs."""

    cluster: IntArray  # (n,)
    positive: FloatArray  # (n,)
    negative: FloatArray  # (n,)


def draw_lengths(n: int, clustered: bool, rng: np.random.Generator) -> Lengths:
    """Draw clusters, of which one in five has two to four pairs, and the tokens of every text."""
    sizes = np.where(rng.random(n) < 0.2, rng.integers(2, 5, n), 1) if clustered else np.ones(n, np.int64)
    cluster = np.repeat(np.arange(n), sizes)[:n]
    positive = np.rint(rng.lognormal(np.log(MEAN_TOKENS), 0.25, n))[cluster]
    negative = np.maximum(positive + np.rint(rng.normal(LONGER, 4, n)), 5)
    return Lengths(cluster, positive, negative)


def draw(people: Population, n: int, seed: int, clustered: bool = True) -> tuple[FeatureBlock, Pairs]:
    """Draw n pairs. Pairs of one cluster have one positive text; each has a negative text of its own."""
    rng = np.random.default_rng([seed, 11])
    lengths = draw_lengths(n, clustered, rng)
    of_cluster, f = np.unique(lengths.cluster, return_index=True)[1], people.n_features
    chance = rng.random((len(of_cluster), f), dtype=np.float32)
    positive = draw_activations(people, lengths.positive[of_cluster], chance, False, rng).tocsr()[
        lengths.cluster
    ]
    chance = chance[lengths.cluster]
    own = rng.random((n, f), dtype=np.float32) >= SHARED
    chance[own] = rng.random(int(own.sum()), dtype=np.float32)
    negative = draw_activations(people, lengths.negative, chance, True, rng)
    pairs = Pairs(
        cluster=lengths.cluster,
        d_tokens=lengths.negative - lengths.positive,
        d_log_prob=None,
        group=rng.integers(0, 4, n),
        group_names=("north", "east", "south", "west"),
    )
    return FeatureBlock(0, 0, positive.tocsc(), negative), pairs


def draw_activations(
    people: Population,
    tokens: FloatArray,
    chance: npt.NDArray[np.float32],
    negative: bool,
    rng: np.random.Generator,
) -> Columns:
    """Return the activations (texts, F) of texts with these tokens, where a chance (texts, F) fires."""
    rate = (people.rate_negative if negative else people.rate).astype(np.float32)
    log_mean = people.log_mean_negative if negative else people.log_mean
    fired = chance < rate
    sloped = np.flatnonzero(people.rate_slope)
    longer = tokens - MEAN_TOKENS
    fired[:, sloped] = chance[:, sloped] < rates_of_length(people, sloped, longer)
    row, feature = np.nonzero(fired)
    log = log_mean[feature] + people.log_slope[feature] * longer[row]
    activation = np.exp(log + people.log_sd[feature] * rng.standard_normal(len(row)))
    return scipy.sparse.csc_matrix((activation, (row, feature)), shape=fired.shape)


def rates_of_length(people: Population, features: IntArray, longer: FloatArray) -> FloatArray:
    """Return the firing rates (texts, some features) of texts that are so many tokens more than the mean."""
    odds = special.logit(people.rate[features]) + people.rate_slope[features] * longer[:, None]
    rates: FloatArray = special.expit(odds)
    return rates


@dataclass(frozen=True, slots=True)
class Truth:
    """What is true in the population; (F,) each."""

    firing: FloatArray
    activation: FloatArray
    rank_biserial: FloatArray
    equal_length: FloatArray  # difference of the mean activations of texts of equal length


def truth(people: Population) -> Truth:
    """Compute the true effects; those of features of length, and rank-biserials, from a large sample."""
    moment = np.exp(people.log_sd**2 / 2)
    planted = people.rate_negative * np.exp(people.log_mean_negative) - people.rate * np.exp(people.log_mean)
    firing, activation = people.rate_negative - people.rate, planted * moment
    equal_length, rank_biserial = activation.copy(), np.zeros(people.n_features)
    rng = np.random.default_rng(12)
    lengths = draw_lengths(MONTE_CARLO, False, rng)
    for feature in np.flatnonzero(people.planted | people.of_length):
        one = _only(people, feature)
        if people.rate_slope[feature]:
            means = []
            for tokens in (lengths.positive, lengths.negative):
                rates = rates_of_length(one, np.zeros(1, dtype=np.int64), tokens - MEAN_TOKENS)[:, 0]
                log = one.log_mean[0] + one.log_slope[0] * (tokens - MEAN_TOKENS)
                means.append((rates.mean(), (rates * np.exp(log)).mean() * moment[feature]))
            firing[feature], activation[feature] = np.subtract(means[1], means[0])
        block, _ = draw(one, MONTE_CARLO, int(feature), clustered=False)
        ranks = signed_ranks(by_size(as_columns(block.negative - block.positive))).ranks.data
        rank_biserial[feature] = ranks.sum() / np.abs(ranks).sum()
    return Truth(firing, activation, rank_biserial, equal_length)


def _only(people: Population, feature: np.integer[Any]) -> Population:
    return Population(*(getattr(people, field.name)[[feature]] for field in fields(people)))


RARITY = ((0.0, 0.02), (0.02, 0.1), (0.1, 1.0))  # rates of firing, over both texts
KINDS = ("no difference", "planted", "length alone")
EFFECTS = ("firing", "activation", "rank_biserial", "adjusted", "matched", "held_out")


@dataclass(slots=True)
class Tally:
    """What was found over all samples."""

    raw_fdp: list[float]  # share of findings that are false, of each sample
    holds_fdp: list[float]
    power: list[float]  # share of the planted that are found
    holds_power: list[float]
    length_found: list[float]
    length_holds: list[float]
    length_flagged: list[float]  # of those found, where any are, the share called "controls"
    swapped: list[float]
    covered: npt.NDArray[np.int64]  # (effects, rarity, kinds)
    intervals: npt.NDArray[np.int64]

    @classmethod
    def empty(cls) -> Tally:
        shape = (len(EFFECTS), len(RARITY), len(KINDS))
        return cls([], [], [], [], [], [], [], [], np.zeros(shape, np.int64), np.zeros(shape, np.int64))

    def add(self, people: Population, true: Truth, found: PairedFeatures, swapped: SwapControl) -> None:
        """Count one sample."""
        raw = np.isin(found.verdict, ("holds", "controls"))
        holds = found.verdict == "holds"
        of_length = people.of_length
        self.raw_fdp.append(share(raw & ~people.planted & ~of_length, raw))
        self.holds_fdp.append(share(holds & ~people.planted, holds))
        self.power.append(share(raw & people.planted, people.planted))
        self.holds_power.append(share(holds & people.planted, people.planted))
        self.length_found.append(share(raw & of_length, of_length))
        self.length_holds.append(share(holds & of_length, of_length))
        if (raw & of_length).any():
            self.length_flagged.append(share(raw & of_length & ~holds, raw & of_length))
        self.swapped.append(float(swapped.found.mean()))
        kind = np.where(people.planted, 1, np.where(of_length, 2, 0))
        rate = (found.rate_positive + found.rate_negative) / 2
        for at, effect in enumerate(EFFECTS):
            truth_of = {"adjusted": "equal_length", "matched": "equal_length", "held_out": "activation"}
            wanted = getattr(true, truth_of.get(effect, effect))
            low, high = getattr(found, f"{effect}_low"), getattr(found, f"{effect}_high")
            given = ~(np.isnan(low) | np.isnan(high))
            inside = given & (low <= wanted) & (wanted <= high)
            for place, (least, most) in enumerate(RARITY):
                rare = (rate > least) & (rate <= most)
                for k in range(len(KINDS)):
                    self.intervals[at, place, k] += np.count_nonzero(given & rare & (kind == k))
                    self.covered[at, place, k] += np.count_nonzero(inside & rare & (kind == k))


def share(some: BoolArray, of: BoolArray) -> float:
    return float(some.sum() / max(of.sum(), 1))


def simulate(
    people: Population, seeds: int, n: int = 1000, clustered: bool = True, told: bool = True
) -> Tally:
    """Draw one sample for each seed, and count what the statistics say of it.

    Where they are not `told` of the clusters they take every pair for independent.
    """
    tally, true = Tally.empty(), truth(people)
    for seed in range(seeds):
        block, pairs = draw(people, n, seed, clustered)
        pairs = pairs if told else replace(pairs, cluster=np.arange(n))
        tally.add(people, true, *paired_features([block], pairs, PairedSettings(seed=seed)))
    return tally


def lines(tally: Tally) -> Iterator[str]:
    """Yield the table, in Markdown."""
    yield "| | mean over samples | standard error | bar |"
    yield "|---|---|---|---|"
    bars = {
        "false discovery rate, found": (tally.raw_fdp, "at most 0.05"),
        "false discovery rate, `holds`": (tally.holds_fdp, "at most 0.05"),
        "power: planted that are found": (tally.power, ""),
        "power: planted that hold": (tally.holds_power, ""),
        "length alone: found": (tally.length_found, ""),
        "length alone: of those found, `controls`": (tally.length_flagged, "near 1"),
        "length alone: `holds`": (tally.length_holds, "near 0"),
        "features found with labels swapped": (tally.swapped, "near 0"),
    }
    for name, (values, bar) in bars.items():
        if not values:
            yield f"| {name} | - | - | {bar} |"
            continue
        error = np.std(values) / np.sqrt(max(len(values) - 1, 1))
        yield f"| {name} | {np.mean(values):.4f} | {error:.4f} | {bar} |"
    yield ""
    yield "Coverage of the 95% intervals, in percent:"
    yield ""
    yield "| effect | firing rate | all | " + " | ".join(KINDS) + " |"
    yield "|---|---|---|" + "---|" * len(KINDS)
    for at, effect in enumerate(EFFECTS):
        for place, (least, most) in enumerate(RARITY):
            covered, given = tally.covered[at, place], tally.intervals[at, place]
            cells = [percent(covered.sum(), given.sum())]
            cells += [percent(c, g) for c, g in zip(covered, given, strict=True)]
            yield f"| {effect} | {100 * least:g} to {100 * most:g}% | " + " | ".join(cells) + " |"


def percent(part: int, of: int) -> str:
    return f"{100 * part / of:.1f}" if of else "-"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m daemon.tools.planted", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", type=int, default=200, help="samples that are drawn (200)")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of each (1000)")
    parser.add_argument("--features", type=int, default=5000, help="features of the population (5000)")
    parser.add_argument("--single", action="store_true", help="every pair is a cluster of its own")
    parser.add_argument(
        "--ignore-clusters", action="store_true", help="take pairs of a cluster for independent"
    )
    arguments = parser.parse_args(argv)
    tally = simulate(
        population(arguments.features),
        arguments.seeds,
        arguments.pairs,
        clustered=not arguments.single,
        told=not arguments.ignore_clusters,
    )
    sys.stdout.write("\n".join(lines(tally)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
