"""The small frozen records that cross the boundaries between stages.

They hold plain Python and NumPy values only: no tensors, no open files, no configuration.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from daemon.frozen import frozen

SIGNED_NUMBER = re.compile(r"-?\.?\d")  # its sign or point is no punctuation of the sentence

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Positions = Literal["last", "all", "mean", "max"]  # of a text, that the SAEs read


@dataclass(frozen=True, slots=True)
class Contrast:
    """Which texts of a sample are compared: names of texts of the same recipe."""

    reference: str
    positive: str
    negative: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a record becomes texts: `(name, template)` pairs, and the contrast between them, if any.

    A template is literal, unless the recipe `joins`: then it names fields with a space between each two, and
    `join` says where that space is left out.
    """

    templates: tuple[tuple[str, str], ...]
    contrast: Contrast | None
    joins: bool = False

    @property
    def text_names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.templates)

    @property
    def fields(self) -> frozenset[str]:
        """The record fields that the templates name."""
        return fields_of(self.templates)

    def render(self, values: dict[str, str]) -> tuple[str, ...]:
        """The texts of one record, in the order of the templates."""
        if not self.joins:
            return tuple(template.format_map(values) for _, template in self.templates)
        return tuple(
            functools.reduce(join, (values[field] for field in named_fields(template)))
            for _, template in self.templates
        )


@functools.lru_cache(maxsize=64)
def fields_of(templates: tuple[tuple[str, str], ...]) -> frozenset[str]:
    return frozenset(field for _, template in templates for field in named_fields(template))


@functools.lru_cache(maxsize=64)
def named_fields(template: str) -> tuple[str, ...]:
    """The fields that a template names, in its order."""
    return tuple(field for _, field, _, _ in string.Formatter().parse(template) if field)


def join(prompt: str, completion: str) -> str:
    """Prompt and completion as one text, with a space between them where neither brings its own.

    No space where the completion is empty or begins with white space (as `str.isspace` has it) or with
    punctuation (Unicode category P*, but for the sign or point of a number such as -5), nor where the prompt
    is empty or ends with white space.
    """
    if not prompt or not completion or prompt[-1].isspace() or brings_its_own(completion):
        return prompt + completion
    return f"{prompt} {completion}"


def brings_its_own(completion: str) -> bool:
    """Whether a text that is not empty stands after another one without a space."""
    first = completion[0]
    if first.isspace():
        return True
    return unicodedata.category(first).startswith("P") and SIGNED_NUMBER.match(completion) is None


CONTRAST_RECIPE = Recipe(
    templates=(
        ("prompt", "{prompt}"),
        ("fact", "{prompt} {fact}"),
        ("hall", "{prompt} {hallucination}"),
    ),
    contrast=Contrast(reference="prompt", positive="fact", negative="hall"),
    joins=True,
)
PLAIN_RECIPE = Recipe(templates=(("text", "{text}"),), contrast=None)
BUILT_IN_RECIPES = (CONTRAST_RECIPE, PLAIN_RECIPE)


@frozen
class FileIdentity:
    """What must not change between claiming a file and publishing its results."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@frozen
class Claim:
    """An input file that this process owns, lying in its lease folder."""

    name: str  # as it was dropped into the inbox
    at: str  # where it lies now
    attempt: int  # how often work on it has begun, this time included
    identity: FileIdentity

    @property
    def path(self) -> Path:
        return Path(self.at)


@frozen
class Source:
    """A claimed file whose content is known: the unit of delivery."""

    claim: Claim
    sha256: str  # of the file as it lies there, compressed or not
    size: int  # bytes
    unit: str  # 12 hex digits: content and every setting that changes results
    opened_at: float = 0.0  # monotonic seconds, when its first byte was read


@frozen
class Sample:
    """One usable record."""

    record_index: int  # 0-based, counts rejected records too
    sample_id: str
    domain: str | None
    complexity: float | None
    extra: str | None  # JSON object of the fields that nothing else uses
    texts: tuple[str, ...]  # in the order of the recipe
    line: int | None  # 1-based line of the input; None where lines mean nothing
    byte_offset: int | None  # of the record's first byte in the uncompressed input; None as with lines


@frozen
class Reject:
    """One record that can't be used, and why. Never carries the record's text."""

    record_index: int
    sample_id: str | None
    line: int | None
    byte_offset: int | None
    reason: str  # short stable word
    message: str


@frozen
class PartExtent:
    """Which run of a file's records a part is. Two parts of the same extent of the same file are the same."""

    number: int  # counts from 0 within the file
    first_record: int  # 0-based record index
    records: int
    byte_offset: int  # of the first record in the uncompressed input; in Parquet, about where it is


@frozen
class Part:
    """A run of consecutive records of one file: the grain in which work flows and is written.

    `last` marks the file's end; extent.records == len(samples) + len(rejects).
    """

    source: Source
    extent: PartExtent
    last: bool
    recipe: Recipe
    samples: tuple[Sample, ...]
    rejects: tuple[Reject, ...]
    read_seconds: float = 0.0
    tokenize_seconds: float = 0.0

    @property
    def number(self) -> int:
        return self.extent.number


@frozen
class KeptPart:
    """A part whose results an earlier attempt stored already."""

    source: Source
    extent: PartExtent
    last: bool
    recipe: Recipe


@frozen
class TokenizedSample:
    """A sample and the token ids of each of its texts, BOS included where the SAEs expect it."""

    sample: Sample
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def n_tokens(self) -> int:
        return sum(map(len, self.token_ids))

    @property
    def width(self) -> int:
        """Length of the longest text, in tokens."""
        return max(map(len, self.token_ids))


@frozen
class TokenizedPart:
    """A part ready for the device; `part.samples` and `samples` hold the same samples in order."""

    part: Part
    samples: tuple[TokenizedSample, ...]

    @property
    def n_tokens(self) -> int:
        return sum(sample.n_tokens for sample in self.samples)


@frozen
class FeatureRows:
    """Sparse activations, one row per (sample, text, layer, position); ragged, sorted by index.

    R rows, `nnz` activations in all; row r owns `indices[offsets[r]:offsets[r + 1]]`.
    """

    sample_row: IntArray  # (R,) row of the sample in its block
    text: IntArray  # (R,) index into the recipe's texts
    layer: IntArray  # (R,) index into the engine's SAEs
    position: IntArray  # (R,) token position in the text
    token_id: IntArray  # (R,)
    offsets: IntArray  # (R + 1,)
    indices: npt.NDArray[np.uint32]  # (nnz,)
    values: npt.NDArray[np.float32] | FloatArray  # (nnz,)


@frozen
class LayerSums:
    """What a file's FVU and mean L0 at one SAE are made of, per sample and summed over its texts."""

    rows: IntArray  # (n,) activations counted
    l0: FloatArray  # (n,)
    squared_error: FloatArray  # (n,) sum of ||x - decode(f)||^2, x being what is to be reconstructed
    squared_norm: FloatArray  # (n,) sum of ||x||^2
    total: FloatArray  # (n, d_out) sum of x


class RowMessage(NamedTuple):
    """Why a row of a block is none."""

    row: int
    message: str


@frozen
class Block:
    """The results of one device batch of n samples, on the host.

    `columns` maps each name of `daemon.columns.analysis_columns` to an (n,) array; NaN means undefined.
    """

    columns: dict[str, npt.NDArray[np.generic]]
    features: FeatureRows
    layers: tuple[LayerSums, ...]  # one per SAE
    forward_seconds: float
    sae_seconds: float
    analysis_seconds: float
    computed_tokens: int = 0  # token positions that the model ran, padding included
    padding_tokens: int = 0
    not_finite: tuple[RowMessage, ...] = ()  # samples without numbers: their rows mean nothing

    @property
    def n_samples(self) -> int:
        return len(next(iter(self.columns.values())))


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a dictionary does, as far as it is known."""

    l0: float | None = None  # mean number of active features
    fvu: float | None = None  # fraction of variance unexplained


@dataclass(frozen=True, slots=True)
class SaeInfo:
    """One loaded dictionary, as the manifest and the columns name it."""

    hook_name: str  # what it reads
    hook_name_out: str  # what its reconstruction is to equal: of a transcoder another place
    layer: int
    d_in: int
    d_sae: int
    d_out: int
    architecture: str
    source: str  # release and id, or the path's last component
    weights_sha256: str
    settings_sha256: str = ""  # of all that its configuration says


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """The loaded model, as the manifest and `lensd_model_info` name it."""

    name: str
    architecture: str
    d_model: int
    n_layers: int
    dtype: str
    device: str
    engine: str  # "packed", or "padded" where the model can't be packed
    weights_sha256: str | None  # None where the weights came from a hub
    saes: tuple[SaeInfo, ...]
    cards: tuple[Fit, ...] = ()  # of each SAE, by its makers; empty where what is read is not comparable
    settings_sha256: str = ""  # of its configuration, its tokenizer and, of a hub's, its commit

    @property
    def known_fits(self) -> tuple[Fit, ...]:
        """Of each SAE what is known of it that files can be compared with."""
        return self.cards or (Fit(),) * len(self.saes)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(sae.layer for sae in self.saes)
