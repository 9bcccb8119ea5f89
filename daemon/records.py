"""Every message that passes between the parts of the daemon, as small frozen records.

They hold plain Python and NumPy values only: no tensors, no open files, no configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from daemon.errors import FileError
from daemon.model_info import SaeInfo
from daemon.recipes import Recipe, Text

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Positions = Literal["last", "all", "mean", "max"]  # of a text, that the SAEs read
CountedTokens = Literal["all", "assistant", "user", "completion"]  # of a text, among which positions are
LongTexts = Literal["reject", "keep_end", "keep_start"]  # of more tokens than may be
Presence = Literal["same", "changed", "gone"]  # of a claimed file
OutcomeKind = Literal["committed", "failed", "duplicate", "requeued"]
DepartureKind = Literal["l0", "fvu"]
Against = Literal["card", "file_before"]
WorkerState = Literal["starting", "ready", "draining"]
WORKER_STATES: tuple[WorkerState, ...] = get_args(WorkerState)
PAUSE_REASONS = ("disk", "descriptors", "folders", "workers")  # why nothing is taken up
RETRIED = ("start", "claim", "read", "forward", "write", "settle")  # what may be tried again
KINDS: tuple[DepartureKind, ...] = get_args(DepartureKind)
AGAINST: tuple[Against, ...] = get_args(Against)

# A variance below this share of the mean square is rounding error: the rows are all alike.
NEGLIGIBLE_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Identifies a file by its metadata, which must not change until its results are published."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(frozen=True, slots=True)
class Claim:
    """An input file that this process owns, lying in its lease folder."""

    name: str  # as it was dropped into the inbox
    at: str  # where it lies now
    attempt: int  # how often work on it has begun, this time included
    identity: FileIdentity

    @property
    def path(self) -> Path:
        return Path(self.at)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A claimed file whose content is known: the unit of delivery."""

    claim: Claim
    sha256: str  # of the file as it lies there, compressed or not
    size: int  # bytes
    unit: str  # 12 hex digits: content and every setting that changes results
    opened_at: float = 0.0  # monotonic seconds, when its first byte was read
    stem: str = ""  # of its name, without what says its format; the folder of its results is named by it


@dataclass(frozen=True, slots=True)
class Sample:
    """One usable record."""

    record_index: int  # 0-based, counts rejected records too
    sample_id: str
    domain: str | None
    complexity: float | None
    extra: str | None  # JSON object of the fields that nothing else uses
    texts: tuple[Text, ...]  # in the order of the recipe
    line: int | None  # 1-based line of the input; None where lines mean nothing
    byte_offset: int | None  # of the record's first byte in the uncompressed input; None as with lines
    row_group: int | None = None  # of a Parquet file
    # Where each text's completion begins, a character or of a conversation a message: 0 in a prompt itself.
    starts: tuple[int | None, ...] = ()

    def reject(self, reason: str, message: str) -> Reject:
        """This record as one that can't be used after all."""
        return Reject(
            self.record_index, self.sample_id, self.line, self.byte_offset, reason, message, self.row_group
        )


@dataclass(frozen=True, slots=True)
class Reject:
    """One record that can't be used, and why. Never carries the record's text."""

    record_index: int
    sample_id: str | None
    line: int | None
    byte_offset: int | None
    reason: str  # short stable word
    message: str
    row_group: int | None = None  # of a Parquet file


@dataclass(frozen=True, slots=True)
class PartExtent:
    """Which run of a file's records a part is. Two parts of the same extent of the same file are the same."""

    number: int  # counts from 0 within the file
    first_record: int  # 0-based record index
    records: int
    byte_offset: int  # of the first record in the uncompressed input; in Parquet, about where it is


@dataclass(frozen=True, slots=True)
class Part:
    """A run of consecutive records of one file: the unit of work and of storage.

    `last` marks the file's end; extent.records == len(samples) + len(rejects).
    """

    file: InputFile
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


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A part whose results an earlier attempt stored already."""

    file: InputFile
    extent: PartExtent
    last: bool
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """A sample and the token ids of each of its texts, BOS included where an SAE expects it.

    `counted` has a byte for each token of each text, 1 where the token counts; None where all do.
    `bos_added` says whether each text's BOS was put before it, and is not its own; empty where all SAEs read
    `token_ids`.
    """

    sample: Sample
    token_ids: tuple[tuple[int, ...], ...]
    counted: tuple[bytes, ...] | None = None
    bos_added: tuple[bool, ...] = ()

    @property
    def bare_ids(self) -> tuple[tuple[int, ...], ...]:
        """The texts as SAEs that expect no BOS read them; empty where all SAEs read `token_ids`."""
        return tuple(ids[added:] for ids, added in zip(self.token_ids, self.bos_added, strict=False))

    def read_by(self, prepend_bos: bool) -> tuple[tuple[int, ...], ...]:
        """The texts as an SAE reads them."""
        return self.token_ids if prepend_bos else self.bare_ids or self.token_ids

    @property
    def n_tokens(self) -> int:
        """Tokens to read: those of a text that is read with and without BOS count in both."""
        total = sum(map(len, self.token_ids))
        return 2 * total - sum(self.bos_added) if self.bos_added else total

    @property
    def width(self) -> int:
        """Length of the longest text, in tokens."""
        return max(map(len, self.token_ids))

    def without_texts(self) -> TokenizedSample:
        sample = self.sample
        bare = Sample(sample.record_index, sample.sample_id, None, None, None, (), None, None)
        return replace(self, sample=bare)


@dataclass(frozen=True, slots=True)
class TokenizedPart:
    """A part ready for the device; `part.samples` and `samples` hold the same samples in order."""

    part: Part
    samples: tuple[TokenizedSample, ...]
    cut_texts: int = 0  # that were longer than they may be

    @property
    def n_tokens(self) -> int:
        return sum(sample.n_tokens for sample in self.samples)


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """Sparse activations, one row per (sample, text, SAE, position); ragged, sorted by index.

    R rows, `nnz` activations in all; row r owns `indices[offsets[r]:offsets[r + 1]]`.
    """

    sample_row: IntArray  # (R,) row of the sample in its batch
    text: IntArray  # (R,) index into the recipe's texts
    layer: IntArray  # (R,) index into the engine's SAEs
    position: IntArray  # (R,) token position in the text
    token_id: IntArray  # (R,)
    offsets: IntArray  # (R + 1,)
    indices: npt.NDArray[np.uint32]  # (nnz,)
    values: npt.NDArray[np.float32] | FloatArray  # (nnz,)


@dataclass(frozen=True, slots=True)
class LayerSums:
    """The sums behind FVU and mean L0 at one SAE, per sample and over its texts."""

    rows: IntArray  # (n,) activations counted
    l0: FloatArray  # (n,)
    squared_error: FloatArray  # (n,) sum of ||x - decode(f)||^2, x being what is to be reconstructed
    squared_norm: FloatArray  # (n,) sum of ||x||^2
    total: FloatArray  # (n, d_out) sum of x


class RowMessage(NamedTuple):
    """Why a row of a batch has no numbers."""

    row: int
    message: str


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The results of one batch of n samples, on the host.

    `columns` maps each name of `daemon.analysis.columns.analysis_columns` to an (n,) array; NaN means
    undefined.
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
class Entry:
    """One sample of a batch and where its result belongs."""

    part: TokenizedPart
    row: int  # in part.samples

    @property
    def sample(self) -> TokenizedSample:
        return self.part.samples[self.row]


@dataclass(frozen=True, slots=True)
class SampleBatch:
    """Tokenized samples of one recipe that run in one forward pass, wherever they came from."""

    recipe: Recipe
    samples: tuple[TokenizedSample, ...]

    def without_texts(self) -> SampleBatch:
        """The same token ids and sample ids alone: all that another process needs to compute."""
        return SampleBatch(self.recipe, tuple(sample.without_texts() for sample in self.samples))


@dataclass(frozen=True, slots=True)
class Batch:
    """Samples of one recipe that run in one forward pass, and where their results belong.

    A `suspect` batch was on a worker that died; it runs alone on its next one.
    """

    recipe: Recipe
    entries: tuple[Entry, ...]
    suspect: bool = False

    @property
    def samples(self) -> tuple[TokenizedSample, ...]:
        return tuple(entry.sample for entry in self.entries)

    @property
    def inputs(self) -> SampleBatch:
        return SampleBatch(self.recipe, self.samples)


@dataclass(frozen=True, slots=True, eq=False)
class LayerTotals:
    """The sums behind FVU and mean L0 at one SAE, over samples and texts."""

    rows: int  # activations counted
    l0: float
    squared_error: float  # sum of ||x - decode(f)||^2
    squared_norm: float  # sum of ||x||^2
    total: FloatArray  # (d_out,) sum of x

    @classmethod
    def zero(cls, d_out: int) -> LayerTotals:
        return cls(rows=0, l0=0.0, squared_error=0.0, squared_norm=0.0, total=np.zeros(d_out))

    @classmethod
    def of_groups(cls, sums: LayerSums, rows: IntArray, starts: IntArray) -> list[LayerTotals]:
        """The totals of groups of samples; group g, not empty, is `rows[starts[g]:starts[g + 1]]`."""

        def added(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.add.reduceat(values[rows], starts, axis=0)

        scalars = (added(sums.rows), added(sums.l0), added(sums.squared_error), added(sums.squared_norm))
        return [
            cls(*row) for row in zip(*(column.tolist() for column in scalars), added(sums.total), strict=True)
        ]

    def plus(self, other: LayerTotals) -> LayerTotals:
        return LayerTotals(
            rows=self.rows + other.rows,
            l0=self.l0 + other.l0,
            squared_error=self.squared_error + other.squared_error,
            squared_norm=self.squared_norm + other.squared_norm,
            total=self.total + other.total,
        )

    def fvu(self) -> float | None:
        """Fraction of variance unexplained: sum ||x - x^||^2 / (sum ||x||^2 - ||sum x||^2 / rows).

        None where the rows have no variance to explain, or a sum is not finite.
        """
        if not self.rows:
            return None
        with np.errstate(over="ignore", invalid="ignore"):
            variance = self.squared_norm - float(self.total @ self.total) / self.rows
        if not variance > NEGLIGIBLE_VARIANCE * self.squared_norm:
            return None
        ratio = self.squared_error / variance
        return ratio if np.isfinite(ratio) else None

    def mean_l0(self) -> float | None:
        """Mean number of active features per activation; None without any."""
        return self.l0 / self.rows if self.rows else None


@dataclass(frozen=True, slots=True)
class StageSeconds:
    """Seconds of work, or of waiting in `queue`, per stage. Stages overlap: the sum is no wall time."""

    read: float = 0.0
    tokenize: float = 0.0
    queue: float = 0.0
    pack: float = 0.0
    forward: float = 0.0
    sae: float = 0.0
    analysis: float = 0.0
    write: float = 0.0
    commit: float = 0.0

    def __add__(self, other: StageSeconds) -> StageSeconds:
        names = [field.name for field in fields(self)]
        return StageSeconds(*(getattr(self, name) + getattr(other, name) for name in names))


@dataclass(frozen=True, slots=True)
class ResultRows:
    """Rows `result_rows` of a batch are the results of the samples at `part_rows` of a part."""

    result: BatchResult
    result_rows: IntArray  # (m,)
    part_rows: IntArray  # (m,)
    row_bytes: int  # about what one of them weighs in memory


@dataclass(frozen=True, slots=True)
class FinishedPart:
    """A part and the pieces of device batches that together cover each of its samples once."""

    part: TokenizedPart
    pieces: tuple[ResultRows, ...]
    rejects: tuple[Reject, ...]  # all of the part, in any order
    layers: tuple[LayerTotals, ...]  # one per SAE
    seconds: StageSeconds

    @property
    def nbytes(self) -> int:
        """About what its results weigh in memory: its share of the batches."""
        return 1 + sum(piece.row_bytes * len(piece.result_rows) for piece in self.pieces)

    def check_covered(self) -> None:
        """Raises AssertionError unless every sample of the part is covered exactly once."""
        n = len(self.part.samples)
        covered = sorted(row for piece in self.pieces for row in piece.part_rows.tolist())
        pairs_up = all(len(piece.result_rows) == len(piece.part_rows) for piece in self.pieces)
        if not pairs_up or covered != list(range(n)):
            part = self.part.part
            raise AssertionError(
                f"unit {part.file.unit} part {part.number}: {len(covered)} result rows"
                f" do not cover its {n} samples exactly once"
            )


@dataclass(frozen=True, slots=True)
class FileTotals:
    """One file of an output folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class UnitTotals:
    """All that was written for one input file."""

    records: int
    rows: int  # of metrics.parquet: samples
    rejects: int
    layers: tuple[LayerTotals, ...]  # one per SAE
    fvu: tuple[float | None, ...]  # of each
    seconds: StageSeconds
    clipped: int  # activations that the stored type does not hold
    files: tuple[FileTotals, ...]

    @property
    def bytes(self) -> int:
        """Size of the files listed, the manifest not counted."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class FileFailed:
    """Follows the parts of a file that turned out to be unusable after some of it was read."""

    file: InputFile
    error: FileError
    parts: int  # enqueued before it


@dataclass(frozen=True, slots=True)
class Departure:
    """One number of a file at one SAE that is far from what it is measured by."""

    sae: SaeInfo
    kind: DepartureKind
    against: Against
    value: float
    expected: float

    def __str__(self) -> str:
        what = "mean L0" if self.kind == "l0" else "FVU"
        whose = "on its card" if self.against == "card" else "in the file before"
        return f"{what} {self.value:.3g} at {self.sae.where}, {self.expected:.3g} {whose}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one file ended."""

    kind: OutcomeKind
    name: str
    unit: str | None = None
    folder: Path | None = None  # where the results are
    rows: int = 0
    rejects: int = 0
    output_bytes: int = 0
    seconds: float = 0.0  # first read to commit
    fvu: tuple[float | None, ...] = ()  # per SAE
    mean_l0: tuple[float | None, ...] = ()  # the same
    readings: int = 0  # that each SAE made, of which these are means
    clipped: int = 0  # activations that the stored type does not hold
    departures: tuple[Departure, ...] = ()  # in what its SAEs are far from what is known of them
    stages: StageSeconds | None = None
    report: str | None = None  # name of the page of findings in `folder`, where there is one
    report_failed: str | None = None  # why there is none, where there was to be one
    reason: str | None = None
    message: str | None = None

    def log_fields(self) -> dict[str, Any]:
        fields = {
            "outcome": self.kind,
            "file": self.name,
            "unit": self.unit,
            "rows": self.rows,
            "rejects": self.rejects,
            "clipped": self.clipped or None,
            "seconds": round(self.seconds, 2),
            "folder": str(self.folder) if self.folder else None,
            "reason": self.reason,
            "message": self.message,
        }
        return {key: value for key, value in fields.items() if value is not None}


@dataclass(frozen=True, slots=True)
class FinishedFile:
    """A file of which everything came to the sink: complete, or failed with an error."""

    file: InputFile
    error: FileError | None
    nbytes: int  # of its results in memory, about


Arrival = FinishedPart | KeptPart | FileFailed  # at the sink


@dataclass(frozen=True, slots=True)
class Stored:
    """Results of a unit that the sink has from before."""

    published: Path | None  # the folder that holds its results
    extents: Mapping[int, PartExtent]  # by number, of parts that an earlier attempt stored


@dataclass(frozen=True, slots=True)
class InboxLoad:
    """The files that waited at one look. Times are Unix times."""

    files: int
    bytes: int
    oldest_at: float | None  # when the oldest was last written, None where none waits
    counted_at: float
    left: int = 0  # files that are somebody else's, and lie there all the same

    def oldest_seconds(self, now: float) -> float:
        """How old the oldest is by now, which goes on growing where nobody can look again."""
        return 0.0 if self.oldest_at is None else max(0.0, now - self.oldest_at)


@dataclass(frozen=True, slots=True)
class Queued:
    """Items that wait for a stage, and tokens that wait for the executor."""

    tokenize: int
    compute: int
    write: int
    tokens: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """One worker of an executor at one moment; what it counts goes on over its restarts."""

    number: int  # counts from 0
    state: WorkerState
    node: str  # where it runs; empty while it has no place
    batches: int = 0
    samples: int = 0
    restarts: int = 0
    busy_seconds: float = 0.0  # of its device
    memory_bytes: int = 0  # of its process, as of the last batch
