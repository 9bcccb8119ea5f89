"""Reports made up for tests: of every kind that a page has to show, of any size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from daemon.findings import results
from daemon.findings.results import Estimate

DOMAINS = ("adversarial", "biology", "entity", "history", "numbers")
OWN = (
    "centroid_drift_diff",
    "axis_twist_diff",
    "stability_diff",
    "entropy_diff",
    "cross_layer_consistency_diff",
)
METRICS = (
    *("l0_norm", "l2_norm", "max_activation", "reconstruction_error", "relative_error", "gini"),
    *("sphericity", "elongation", "dimensionality", "eigenvalue_entropy", "misalignment"),
)
CLASSES = ("None", "Spherical", "Oblate", "Prolate", "Triaxial")
WORDS = (
    "The",
    " capital",
    " of",
    " France",
    " is",
    " Paris",
    ",",
    " and",
    " not",
    " Lyon",
    " at",
    " all",
    ".",
)


def contrast(
    *,
    width: int = 400,
    n_pairs: int = 1130,
    details: int = 4,
    draws: int = 20,
    examples: int = 4,
    metrics: int = 3,
    seed: int = 0,
) -> results.Report:
    """A report on pairs, read by three dictionaries of `width` features and `metrics` columns each."""
    rng = np.random.default_rng(seed)
    run = summary(width, n_pairs)
    features = paired_features(rng, 3 * width, width)
    place = np.array([("holds", "controls", "none", "few").index(one) for one in features.verdict])
    shown = np.lexsort((features.q, place))[:details]
    return results.Report(
        run=run,
        target=0.05,
        group_column="domain",
        group_names=DOMAINS,
        n_pairs=n_pairs,
        n_clusters=n_pairs - 12,
        n_matched=412,
        mean_tokens=(("prompt", 14.2), ("fact", 21.71), ("hall", 23.04)),
        controls=("tokens",),
        columns=tuple(columns(rng, n_pairs, METRICS[:metrics])),
        features=features,
        swapped=results.SwapControl(rng.poisson(0.2, draws), 0.05),
        grouped=(),
        grouped_columns=(),
        prevalence=(),
        probes=probes(),
        shapes=tuple(shapes(rng)),
        details=tuple(detail(rng, features, int(one), width, examples) for one in shown),
        has_texts=True,
        notes=(),
    )


def groups(*, width: int = 200, seed: int = 1) -> results.Report:
    """A report on samples of one text, compared between the groups of a column."""
    rng = np.random.default_rng(seed)
    base = contrast(width=width, details=2, seed=seed)
    return replace(
        base,
        run=plain_run(base.run),
        n_pairs=0,
        n_clusters=0,
        n_matched=0,
        columns=(),
        features=None,
        swapped=None,
        probes=(),
        shapes=(),
        mean_tokens=(("text", 33.3),),
        grouped=tuple(grouped(rng, name, 3 * width, width) for name in DOMAINS),
        grouped_columns=tuple(
            grouped_column(rng, metric, name) for metric in METRICS[:3] for name in DOMAINS
        ),
        details=tuple(
            replace(one, groups=tuple((name, share, float("nan"), n) for name, share, _, n in one.groups))
            for one in base.details
        ),
    )


def prevalences(*, width: int = 200, seed: int = 2) -> results.Report:
    """A report on samples of one text, without any group."""
    rng = np.random.default_rng(seed)
    base = groups(width=width)
    index = np.arange(3 * width)
    rate = rng.beta(0.4, 4, len(index)) * (rng.random(len(index)) > 0.2)
    together = tuple(
        results.CoOccurrence(int(n % 3), int(n), int(n + 7), 90 - int(n), 0.8 - n / 100, 3.2 + n / 9)
        for n in range(40)
    )
    prevalence = results.Prevalence(
        "text",
        index // width,
        index % width,
        rate,
        np.where(rate > 0, rng.gamma(2, 1, len(index)), np.nan),
        together,
    )
    return replace(
        base,
        group_column=None,
        group_names=(),
        grouped=(),
        grouped_columns=(),
        details=(),
        prevalence=(prevalence,),
        has_texts=False,
        notes=("The folders hold no texts.parquet, so there are no examples.",),
    )


def nothing_found(report: results.Report) -> results.Report:
    """The same report with no feature found."""
    assert report.features is not None
    features = replace(
        report.features,
        verdict=np.full(len(report.features.sae), "none"),
        q=np.full(len(report.features.sae), 0.9),
    )
    return replace(report, features=features)


def summary(width: int, n_pairs: int) -> results.RunSummary:
    dictionaries = tuple(
        results.DictionaryHealth(
            name=f"l{layer}",
            hook=f"blocks.{layer}.hook_resid_post",
            layer=layer,
            architecture="jumprelu",
            source=f"blocks.{layer}.hook_resid_post",
            d_sae=width,
            mean_l0=l0,
            fvu=fvu,
            card_l0=65.2,
            card_fvu=card,
            dead=width // 9,
            warnings=warnings,
            neuronpedia_id=None,
        )
        for layer, l0, fvu, card, warnings in (
            (7, 112.31, 0.1124, 0.0488, ("On average 112 features fire, where the card says 65.",)),
            (15, 84.4, 0.153, 0.1133, ()),
            (22, 70.0, 0.2102, None, ()),
        )
    )
    return results.RunSummary(
        title="hb1000: adversarial, biology, entity, history, numbers",
        folders=("adversarial-dd25fa42dc9c", "entity-f644824ccd22"),
        samples=n_pairs,
        rejects=7,
        reject_reasons=(("over max_text_tokens", 5), ("field 'fact' is missing", 2)),
        model="smollm2-135m",
        dtype="float32",
        device="cpu",
        n_layers=30,
        recipe="prompt-fact-hallucination",
        texts=(("prompt", "{prompt}"), ("fact", "{prompt} {fact}"), ("hall", "{prompt} {hallucination}")),
        reference="prompt",
        positive="fact",
        negative="hall",
        positions="last",
        tokens="all",
        computed="2026-11-30",
        versions=(("lensd", "0.1.0"), ("torch", "2.13.0"), ("sae-lens", "6.54.12")),
        analysis_version=4,
        dictionaries=dictionaries,
    )


def plain_run(run: results.RunSummary) -> results.RunSummary:
    return replace(
        run, texts=(("text", "{text}"),), recipe="text", reference=None, positive=None, negative=None
    )


def around(rng: np.random.Generator, value: float, width: float) -> Estimate:
    return Estimate(value, value - width * rng.uniform(0.8, 1.1), value + width * rng.uniform(0.8, 1.1))


def columns(rng: np.random.Generator, n_pairs: int, metrics: tuple[str, ...]) -> list[results.ColumnFinding]:
    findings = []
    named = [(None, name) for name in OWN] + [(sae, name) for sae in ("l7", "l15", "l22") for name in metrics]
    for group in (None, *DOMAINS):
        n = n_pairs if group is None else n_pairs // len(DOMAINS)
        for sae, name in named:
            deviation = float(rng.gamma(2, 3 if sae else 0.05))
            effect = float(rng.normal(0, 0.12))
            error = 1.96 / n**0.5
            raw = around(rng, effect * deviation, error * deviation)
            adjusted = around(rng, effect * deviation * 0.4, error * deviation * 1.1)
            found, held = raw.low * raw.high > 0, adjusted.low * adjusted.high > 0
            verdict: results.Verdict = "holds" if found and held else "controls" if found else "none"
            difference = results.ControlledDifference(
                n=n,
                n_clusters=n - 2,
                raw=raw,
                p=float(rng.uniform(1e-9, 0.04)) if found else float(rng.uniform(0.05, 1)),
                q=float(rng.uniform(1e-8, 0.05)) if found else float(rng.uniform(0.05, 1)),
                rank_biserial=around(rng, effect, error),
                deviation=deviation,
                d_z=effect,
                adjusted=adjusted,
                adjusted_p=float(rng.uniform()),
                matched=around(rng, effect * deviation * 0.35, error * deviation * 1.8),
                matched_p=float(rng.uniform()),
                n_matched=n // 3,
                verdict=verdict,
            )
            column = f"{sae}_{name}" if sae else name
            findings.append(
                results.ColumnFinding(column, sae, "1", "a number", "hall - fact", group, difference)
            )
    return findings


def paired_features(rng: np.random.Generator, n: int, width: int) -> results.PairedFeatures:
    rate = rng.beta(0.4, 6, n)
    effect = np.where(rng.random(n) < 0.03, rng.normal(0, 0.25, n), rng.normal(0, 0.015, n))
    negative = np.clip(rate + effect * 0.4, 0, 1)
    ghost = rng.random(n) < 0.004
    rate = np.where(ghost, 0.0, rate)
    negative = np.where(ghost, rng.integers(3, 19, n) / 1130, negative)
    deviation = rng.gamma(2, 0.5, n) + 0.05
    tested = rate + negative > 0.01
    found = tested & (np.abs(effect) > 0.1)
    holds = found & (rng.random(n) < 0.35)
    verdict = np.where(holds, "holds", np.where(found, "controls", np.where(tested, "none", "few")))
    keep = np.where(holds, 0.8, 0.2)

    def interval(value: np.ndarray, width: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        missing = np.where(tested, 0.0, np.nan)
        return value + missing, value - width * deviation + missing, value + width * deviation + missing

    firing = negative - rate
    activation = effect * deviation
    a, a_low, a_high = interval(activation, 0.058)
    adj, adj_low, adj_high = interval(activation * keep, 0.065)
    match, match_low, match_high = interval(activation * keep, 0.1)
    held, held_low, held_high = interval(activation * 0.9, 0.085)
    nan = np.full(n, np.nan)
    q = np.where(tested, np.where(found, 10.0 ** -rng.uniform(1.4, 14, n), rng.uniform(0.06, 1, n)), np.nan)
    return results.PairedFeatures(
        sae=np.arange(n) // width,
        feature=np.arange(n) % width,
        tested=tested,
        only_positive=np.where(ghost, 0, rng.poisson(8, n)),
        only_negative=np.where(ghost, np.round(negative * 1130).astype(int), rng.poisson(9, n)),
        rate_positive=rate,
        rate_negative=negative,
        firing=firing,
        firing_low=firing - 0.02,
        firing_high=firing + 0.02,
        firing_p=np.where(tested, rng.random(n), np.nan),
        activation=a,
        activation_low=a_low,
        activation_high=a_high,
        activation_p=np.where(tested, rng.random(n), np.nan),
        rank_biserial=np.where(tested, effect, np.nan),
        rank_biserial_low=np.where(tested, effect - 0.06, np.nan),
        rank_biserial_high=np.where(tested, effect + 0.06, np.nan),
        d_z=np.where(tested, effect, nan),
        q=q,
        q_dependent=np.minimum(q * 9.4, 1),
        adjusted=adj,
        adjusted_low=adj_low,
        adjusted_high=adj_high,
        adjusted_p=rng.random(n),
        matched=match,
        matched_low=match_low,
        matched_high=match_high,
        matched_p=rng.random(n),
        found_on_half=found & (rng.random(n) < 0.7),
        held_out=held,
        held_out_low=held_low,
        held_out_high=held_high,
        groups_agreeing=np.where(tested, rng.integers(2, 6, n) / 5, np.nan),
        groups_counted=np.where(tested, 5, 0),
        verdict=verdict,
    )


def probes() -> tuple[results.ProbeResult, ...]:
    rows = (
        ("length", (0.712, 0.684, 0.739), (0.5, 0.5, 0.5)),
        ("features of l7", (0.741, 0.715, 0.766), (0.602, 0.552, 0.651)),
        ("features of l15", (0.783, 0.758, 0.807), (0.651, 0.603, 0.698)),
        ("features of l22", (0.802, 0.778, 0.825), (0.668, 0.62, 0.714)),
    )
    known = tuple(results.ProbeResult(name, Estimate(*a), Estimate(*b), 1130, 412) for name, a, b in rows)
    reason = "The folders hold no residuals ([outbox] residuals)."
    return (*known, results.ProbeResult("residual", None, None, 0, 0, reason))


def shapes(rng: np.random.Generator) -> list[results.ShapeShares]:
    return [
        results.ShapeShares(
            sae,
            text,
            group,
            tuple(
                zip(
                    CLASSES,
                    (int(one) for one in rng.multinomial(200, rng.dirichlet((1, 4, 3, 8, 2)))),
                    strict=True,
                )
            ),
        )
        for sae in ("l7", "l15", "l22")
        for group in (None, *DOMAINS)
        for text in ("fact", "hall")
    ]


def detail(
    rng: np.random.Generator, features: results.PairedFeatures, index: int, width: int, examples: int
) -> results.FeatureDetail:
    edges = np.linspace(0.2, 8.4, 21)
    bins = np.arange(20)
    return results.FeatureDetail(
        sae=int(features.sae[index]),
        feature=int(features.feature[index]),
        histogram_edges=edges,
        histogram=(
            ("fact", rng.poisson(18 * np.exp(-bins / 5))),
            ("hall", rng.poisson(30 * np.exp(-bins / 7))),
        ),
        examples=tuple(example(rng, number) for number in range(examples)),
        promotes=tuple((f" word{number}", 1.4 - number / 10) for number in range(10)),
        suppresses=tuple((f" other{number}", -1.2 + number / 10) for number in range(10)),
        words_missing="",
        groups=tuple((name, float(rng.beta(1, 9)), float(rng.beta(1, 6)), 226) for name in DOMAINS),
        link=f"https://www.neuronpedia.org/smollm2/7-res/{index}",
    )


def example(rng: np.random.Generator, number: int) -> results.Example:
    return results.Example(
        f"bio_{number:03}",
        "biology-dd25fa42dc9c",
        number,
        "biology",
        (shown_text(rng, "fact", 0.2), shown_text(rng, "hall", 0.5)),
    )


def shown_text(rng: np.random.Generator, name: str, share: float, length: int = 26) -> results.ShownText:
    fires = rng.random(length) < share
    fires[0] = False
    activations = np.where(fires, rng.gamma(2, 1.2, length), 0.0)
    peak = int(activations.argmax())
    tokens = tuple(
        results.ShownToken(
            WORDS[place % len(WORDS)],
            None if place == 0 else float(activations[place]),
            bool(fires[peak]) and place == peak,
        )
        for place in range(length)
    )
    return results.ShownText(
        name, tokens, True, False, float(activations.max()), peak if fires[peak] else None
    )


def grouped(rng: np.random.Generator, name: str, n: int, width: int) -> results.GroupedFeatures:
    inside, outside = rng.beta(0.5, 5, n), rng.beta(0.5, 5, n)
    found = np.abs(inside - outside) > 0.25
    holds = found & (rng.random(n) < 0.6)
    firing = inside - outside
    return results.GroupedFeatures(
        group=name,
        text="text",
        n_inside=226,
        n_outside=904,
        sae=np.arange(n) // width,
        feature=np.arange(n) % width,
        tested=np.ones(n, bool),
        rate_inside=inside,
        rate_outside=outside,
        firing=firing,
        firing_low=firing - 0.05,
        firing_high=firing + 0.05,
        firing_p=rng.random(n),
        activation=firing * 2,
        activation_low=firing * 2 - 0.2,
        activation_high=firing * 2 + 0.2,
        activation_p=rng.random(n),
        q=np.where(found, 10.0 ** -rng.uniform(2, 9, n), rng.uniform(0.06, 1, n)),
        adjusted=firing,
        adjusted_low=firing - 0.25,
        adjusted_high=firing + 0.25,
        adjusted_p=rng.random(n),
        verdict=np.where(holds, "holds", np.where(found, "controls", "none")),
    )


def grouped_column(rng: np.random.Generator, metric: str, name: str) -> results.GroupedColumn:
    return results.GroupedColumn(
        column=f"l7_text_{metric}",
        sae="l7",
        unit="1",
        meaning="a number",
        text="text",
        group=name,
        n_inside=226,
        n_outside=904,
        mean_inside=float(rng.gamma(2, 3)),
        difference=around(rng, float(rng.normal(0, 0.4)), 0.3),
        p=0.02,
        q=0.04,
        adjusted=around(rng, float(rng.normal(0, 0.2)), 0.3),
        adjusted_p=0.3,
        verdict="controls",
    )
