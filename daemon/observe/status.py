"""The status of a daemon: one frozen snapshot, as `/status.json`, the page and `lensd status` show it.

Plain values only; knows no files, no model and no HTML. Times are Unix times, durations seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, TypeAdapter

from daemon.escaping import escape_control

State = Literal["loading", "idle", "working", "draining", "paused", "not ready", "stalled"]
HEALTHY = ("idle", "working")

# Of a status that is read, whoever wrote it: nothing that a terminal obeys, and numbers that can be shown.
Text = Annotated[str, AfterValidator(escape_control)]
Whole = Annotated[int, Field(gt=-(1 << 63), lt=1 << 63)]
Number = FiniteFloat


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that wants a look, while it holds; a `note` is nobody's fault."""

    level: Literal["critical", "warning", "note"]
    title: Text
    detail: Text


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A loaded SAE; `fvu` is that of the last file, None while unknown."""

    hook_name: Text
    layer: Whole
    architecture: Text
    d_in: Whole
    d_sae: Whole
    source: Text
    fvu: Number | None
    name: Text = ""  # with which its columns begin; daemons of earlier versions don't tell


@dataclass(frozen=True, slots=True)
class Running:
    """The loaded model and its SAEs."""

    model: Text
    architecture: Text
    dtype: Text
    device: Text
    engine: Text
    max_batch_tokens: Whole
    saes: tuple[Dictionary, ...]


@dataclass(frozen=True, slots=True)
class Backlog:
    """The files that wait in the inbox, and the work that was taken up and is not settled."""

    files: Whole
    bytes: Whole
    oldest_seconds: Number
    counted_at: Number | None  # when somebody last looked, None before
    files_under_way: Whole
    samples_under_way: Whole  # read so far and not computed


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast it goes now, and how long the rest takes.

    `eta_seconds` is None while nobody can tell; it is `estimated` where files are left whose samples nobody
    counted yet, so that their bytes stand for them.
    """

    samples_per_second: Number
    tokens_per_second: Number  # run by the model
    device_busy_ratio: Number
    eta_seconds: Number | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the process started."""

    committed: Whole
    failed: Whole
    duplicate: Whole
    requeued: Whole
    rows: Whole
    rejects: Whole
    text_tokens: Whole
    computed_tokens: Whole
    output_bytes: Whole
    last_commit_at: Number | None


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of work. Stages overlap: the sum is no wall time."""

    name: Text
    seconds: Number


@dataclass(frozen=True, slots=True)
class SettledFile:
    """How one input file ended."""

    name: Text  # printable, whatever the file's name holds
    outcome: Text
    rows: Whole
    rejects: Whole
    seconds: Number  # first read to commit, 0 where nothing was published
    reason: Text | None
    message: Text | None
    unit: Text | None
    at: Number
    report: Text | None = None  # where its page of findings is, seen from the status page


@dataclass(frozen=True, slots=True)
class Point:
    """The means of a few seconds that ended at `at`."""

    at: Number
    samples_per_second: Number
    tokens_per_second: Number
    backlog_files: Whole  # waiting or under way
    eta_seconds: Number | None
    failed_files: Whole  # in these seconds


@dataclass(frozen=True, slots=True)
class History:
    """The last minutes, oldest first."""

    window_seconds: Number
    step_seconds: Number
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """One worker of an executor. Ratio and rate are those of the last minute, counts since the start."""

    number: Whole
    node: Text  # empty while it has no place
    state: Text
    batches: Whole
    samples: Whole
    samples_per_second: Number
    restarts: Whole
    busy_ratio: Number  # of its device
    memory_bytes: Whole  # of its process


@dataclass(frozen=True, slots=True)
class Workers:
    """An executor of workers; with what this process itself takes of a core."""

    executor: Text  # its kind
    wanted: Whole
    by_state: dict[Text, Whole]
    slots: Whole  # batches that it takes at a time
    batches_in_flight: Whole
    coordinator_busy_ratio: Number
    rows: tuple[WorkerRow, ...]  # by number

    @property
    def ready(self) -> int:
        return self.by_state.get("ready", 0)


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at one moment."""

    version: Text
    host: Text
    instance: Text  # another one after each start
    inbox: Text
    outbox: Text
    at: Number
    started_at: Number
    state: State
    live: bool
    ready: bool
    alerts: tuple[Alert, ...]  # the gravest first
    running: Running | None  # None while the model loads
    backlog: Backlog
    pace: Pace
    totals: Totals
    stages: tuple[Stage, ...]  # in the history's window
    files: tuple[SettledFile, ...]  # the newest first
    free_bytes: dict[Text, Whole]  # by folder's role
    history: History
    workers: Workers | None = None  # None where the daemon computes itself

    @property
    def uptime_seconds(self) -> float:
        return max(0.0, self.at - self.started_at)


_status = TypeAdapter(Status)


def to_json(status: Status) -> bytes:
    return _status.dump_json(status, exclude={"workers"} if status.workers is None else None)


def from_json(body: bytes) -> Status:
    """Read what anybody may have written. Raises ValueError where the body is no status."""
    return _status.validate_json(body)
