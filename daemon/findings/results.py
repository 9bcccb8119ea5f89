"""Every record that passes from the statistics to the page.

A number that can't be computed rightly is NaN in an array and None elsewhere, and is shown as a dash.
Differences are negative - positive (hall - fact), as the text names of the contrast say, unless a column says
otherwise. Pairs are the unit; pairs with equal reference texts are one cluster. Intervals are 95%.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# holds: found at the false discovery rate, and still there, with its sign, at equal length (and probability).
# controls: found, but not shown to be there once length (and probability) are held equal.
# none: not found. few: too few pairs to test.
Verdict = Literal["holds", "controls", "none", "few"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """One number with its 95% interval, in the unit of the number."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Pairs:
    """The n pairs that are compared."""

    cluster: IntArray  # (n,) number of the pair's cluster, from 0: equal reference texts
    d_tokens: FloatArray  # (n,) tokens of the negative text - of the positive one
    d_log_prob: FloatArray | None  # (n,) the same of the mean log-probability, where there is one
    group: IntArray  # (n,) index into `group_names`; -1 where the sample has no value
    group_names: tuple[str, ...]

    @property
    def n(self) -> int:
        return len(self.cluster)

    @property
    def n_clusters(self) -> int:
        return int(self.cluster.max(initial=-1)) + 1

    @property
    def matched(self) -> BoolArray:
        """(n,) whether both texts have the same number of tokens."""
        same: BoolArray = self.d_tokens == 0
        return same


@dataclass(frozen=True, slots=True)
class ControlledDifference:
    """A mean paired difference: as it is, at equal length, and among pairs of equal length."""

    n: int  # pairs in which both numbers are defined
    n_clusters: int
    raw: Estimate | None
    p: float | None  # of the paired test
    q: float | None  # its false discovery rate over all that were tested together
    rank_biserial: Estimate | None  # matched pairs, -1 to 1
    deviation: float | None  # standard deviation of the differences; 0 where all are equal
    d_z: float | None  # mean over standard deviation
    adjusted: Estimate | None  # at equal length (and log-probability), by regression
    adjusted_p: float | None
    matched: Estimate | None  # of the pairs of equal length alone
    matched_p: float | None
    n_matched: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class ColumnFinding:
    """One column of the analysis, compared between the two texts, over all pairs or in one group."""

    column: str  # centroid_drift, or of an SAE l7_l0_norm
    sae: str | None  # of whose columns it is
    unit: str
    meaning: str
    orientation: str  # "hall - fact": what the difference is of
    group: str | None  # of the pairs; None: all
    difference: ControlledDifference


@dataclass(frozen=True, slots=True)
class PairedFeatures:
    """Every feature of every SAE, compared between the two texts; arrays have one entry for each of F.

    "firing" is whether a text activates the feature, "activation" how much, 0 where it does not.
    """

    sae: IntArray  # (F,) index into the study's dictionaries
    feature: IntArray  # (F,) index in its dictionary
    tested: BoolArray  # (F,) whether the prevalence filter, fixed beforehand, lets it be tested

    only_positive: IntArray  # (F,) pairs in which the positive text alone fires
    only_negative: IntArray
    rate_positive: FloatArray  # (F,) share of positive texts that fire
    rate_negative: FloatArray
    firing: FloatArray  # (F,) rate_negative - rate_positive
    firing_low: FloatArray
    firing_high: FloatArray
    firing_p: FloatArray  # McNemar

    activation: FloatArray  # (F,) mean difference, in units of the activation
    activation_low: FloatArray
    activation_high: FloatArray
    activation_p: FloatArray  # Wilcoxon signed-rank
    rank_biserial: FloatArray
    rank_biserial_low: FloatArray
    rank_biserial_high: FloatArray
    d_z: FloatArray

    q: FloatArray  # (F,) false discovery rate over all features, of both tests together (Simes)
    q_dependent: FloatArray  # (F,) the same by Benjamini-Yekutieli
    adjusted: FloatArray  # (F,) mean difference at equal length (and probability)
    adjusted_low: FloatArray
    adjusted_high: FloatArray
    adjusted_p: FloatArray
    matched: FloatArray  # (F,) mean difference among pairs of equal length
    matched_low: FloatArray
    matched_high: FloatArray
    matched_p: FloatArray  # of both tests
    found_on_half: BoolArray  # (F,) at the false discovery rate, on half of the clusters
    held_out: FloatArray  # (F,) mean difference on the other half
    held_out_low: FloatArray
    held_out_high: FloatArray
    groups_agreeing: FloatArray  # (F,) share of the counted groups that have the sign of all
    groups_counted: IntArray  # (F,) groups with enough pairs whose mean difference is not zero
    verdict: npt.NDArray[np.str_]  # (F,) of Verdict

    @property
    def n_found(self) -> int:
        """Features found before any control."""
        return int(np.isin(self.verdict, ("holds", "controls")).sum())

    @property
    def n_holding(self) -> int:
        return int((self.verdict == "holds").sum())


@dataclass(frozen=True, slots=True)
class SwapControl:
    """How many features are found when the two labels are swapped at random within clusters."""

    found: IntArray  # (draws,) of each draw
    target: float  # the false discovery rate


@dataclass(frozen=True, slots=True)
class GroupedFeatures:
    """Every feature in one group of samples against all others. Arrays: one entry for each of F features.

    Counts, rates and means are of distinct texts: samples of one side with the same text count once.
    """

    group: str
    text: str  # of the samples, that is compared
    n_inside: int  # distinct texts
    n_outside: int
    sae: IntArray
    feature: IntArray
    tested: BoolArray
    rate_inside: FloatArray
    rate_outside: FloatArray
    firing: FloatArray  # inside - outside
    firing_low: FloatArray
    firing_high: FloatArray
    firing_p: FloatArray  # Fisher exact
    activation: FloatArray  # mean inside - mean outside
    activation_low: FloatArray  # NaN where too few fire for the interval to be right
    activation_high: FloatArray
    activation_p: FloatArray  # Mann-Whitney, among the samples that fire
    q: FloatArray  # over all features, tests and groups
    adjusted: FloatArray  # difference at equal length
    adjusted_low: FloatArray
    adjusted_high: FloatArray
    adjusted_p: FloatArray  # of firing and magnitude at equal length
    verdict: npt.NDArray[np.str_]
    against: str | None = None  # the other group where there are but two; None: all others


@dataclass(frozen=True, slots=True)
class GroupedColumn:
    """One column in one group of samples against all others."""

    column: str
    sae: str | None
    unit: str
    meaning: str
    text: str
    group: str
    n_inside: int  # distinct texts
    n_outside: int
    mean_inside: float | None
    difference: Estimate | None
    p: float | None
    q: float | None
    adjusted: Estimate | None
    adjusted_p: float | None
    verdict: Verdict
    against: str | None = None  # the other group where there are but two; None: all others
    same_sign: bool = False  # of the difference as it is and at equal length, with intervals or without


@dataclass(frozen=True, slots=True)
class Prevalence:
    """How often each feature fires in one text, and which fire together."""

    text: str
    sae: IntArray  # (F,)
    feature: IntArray  # (F,)
    rate: FloatArray  # (F,) share of samples that fire
    mean_active: FloatArray  # (F,) mean activation where it fires
    together: tuple[CoOccurrence, ...]  # the strongest, in order


@dataclass(frozen=True, slots=True)
class CoOccurrence:
    """Two features of one dictionary that fire on the same samples."""

    sae: int
    first: int
    second: int
    both: int  # samples
    jaccard: float  # both over either
    lift: float  # rate of both over the product of the rates


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """How well a linear probe tells the two texts of a held-out pair apart."""

    name: str  # "length", "features of l7", "residual at l7"
    accuracy: Estimate | None  # share of pairs told rightly; a tie counts half
    matched: Estimate | None  # among pairs of equal length
    n: int
    n_matched: int
    reason: str = ""  # why there is none


@dataclass(frozen=True, slots=True)
class DictionaryHealth:
    """One dictionary on these samples."""

    name: str
    hook: str
    layer: int
    architecture: str
    source: str
    d_sae: int
    mean_l0: float | None
    fvu: float | None
    card_l0: float | None
    card_fvu: float | None
    dead: int  # features that fire on no text of these samples
    warnings: tuple[str, ...]  # each one plain sentence
    neuronpedia_id: str | None  # model/set, where the dictionary has one


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What was run."""

    title: str  # of the page: names of the inputs
    folders: tuple[str, ...]
    samples: int
    rejects: int
    reject_reasons: tuple[tuple[str, int], ...]  # most frequent first
    model: str
    dtype: str
    device: str
    n_layers: int
    recipe: str
    texts: tuple[tuple[str, str], ...]  # name, template
    reference: str | None  # texts of the contrast
    positive: str | None
    negative: str | None
    positions: str
    tokens: str
    computed: str  # ISO date, or range of dates
    versions: tuple[tuple[str, str], ...]
    analysis_version: int
    dictionaries: tuple[DictionaryHealth, ...]


@dataclass(frozen=True, slots=True)
class ShownToken:
    """One token of an example, as it stands in the text."""

    text: str
    activation: float | None  # None: the SAE did not read it
    is_peak: bool = False


@dataclass(frozen=True, slots=True)
class ShownText:
    """One text of an example around the token where the feature is strongest."""

    name: str  # of the text
    tokens: tuple[ShownToken, ...]
    cut_before: bool
    cut_after: bool
    activation: float  # of the text, 0 where it does not fire
    position: int | None  # of the peak in the whole text


@dataclass(frozen=True, slots=True)
class Example:
    """One sample that fires: of a contrast its positive and its negative text side by side."""

    sample_id: str
    folder: str
    record_index: int
    group: str | None
    texts: tuple[ShownText, ...]


@dataclass(frozen=True, slots=True)
class FeatureDetail:
    """All that is shown of one feature beside its statistics."""

    sae: int
    feature: int
    histogram_edges: FloatArray  # (bins + 1,) activations above 0
    histogram: tuple[tuple[str, IntArray], ...]  # (text, (bins,) counts)
    examples: tuple[Example, ...]
    promotes: tuple[tuple[str, float], ...]  # token, logit per unit of activation
    suppresses: tuple[tuple[str, float], ...]
    words_missing: str  # why there are no words; empty where there are
    groups: tuple[tuple[str, float, float, int], ...]  # group, rate positive, rate negative, pairs
    link: str | None


@dataclass(frozen=True, slots=True)
class ShapeShares:
    """How often each class of shape occurs, of one SAE and text, in one group."""

    sae: str
    text: str
    group: str | None
    classes: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """All that a page shows. Parts that the samples don't allow are empty, and `notes` says why."""

    run: RunSummary
    target: float  # false discovery rate
    group_column: str | None
    group_names: tuple[str, ...]
    n_pairs: int
    n_clusters: int
    n_matched: int
    mean_tokens: tuple[tuple[str, float], ...]  # by text
    controls: tuple[str, ...]  # names of what is held equal: "tokens", "log-probability"
    columns: tuple[ColumnFinding, ...]
    features: PairedFeatures | None
    swapped: SwapControl | None
    grouped: tuple[GroupedFeatures, ...]
    grouped_columns: tuple[GroupedColumn, ...]
    prevalence: tuple[Prevalence, ...]
    probes: tuple[ProbeResult, ...]
    shapes: tuple[ShapeShares, ...]
    details: tuple[FeatureDetail, ...]  # in the order in which they are shown
    has_texts: bool
    notes: tuple[str, ...]
    small_groups: tuple[str, ...] = ()  # with too few samples, inside or outside, to be compared
    length_range: tuple[int, int] | None = None  # least and greatest difference of a pair, in tokens
