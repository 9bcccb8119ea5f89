"""The status of a daemon: one frozen snapshot, as `/status.json`, the page and `lensd status` show it.

Plain values only; knows no files, no model and no HTML. Times are Unix times, durations seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter

State = Literal["loading", "idle", "working", "draining", "paused", "not ready", "stalled"]
HEALTHY = ("idle", "working")


@dataclass(frozen=True, slots=True)
class Alert:
    """Something that wants a look, while it holds; a `note` is nobody's fault."""

    level: Literal["critical", "warning", "note"]
    title: str
    detail: str


@dataclass(frozen=True, slots=True)
class Dictionary:
    """A loaded SAE; `fvu` is that of the last file, None while unknown."""

    hook_name: str
    layer: int
    architecture: str
    d_in: int
    d_sae: int
    source: str
    fvu: float | None


@dataclass(frozen=True, slots=True)
class Running:
    """The loaded model and its SAEs."""

    model: str
    architecture: str
    dtype: str
    device: str
    engine: str
    max_batch_tokens: int
    saes: tuple[Dictionary, ...]


@dataclass(frozen=True, slots=True)
class Backlog:
    """The files that wait in the inbox, and the work that was taken up and is not settled."""

    files: int
    bytes: int
    oldest_seconds: float
    counted_at: float | None  # when somebody last looked, None before
    files_under_way: int
    samples_under_way: int  # read so far and not computed


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast it goes now, and how long the rest takes.

    `eta_seconds` is None while nobody can tell; it is `estimated` where files are left whose samples nobody
    counted yet, so that their bytes stand for them.
    """

    samples_per_second: float
    tokens_per_second: float  # run by the model
    device_busy_ratio: float
    eta_seconds: float | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class Totals:
    """Since the process started."""

    committed: int
    failed: int
    duplicate: int
    requeued: int
    rows: int
    rejects: int
    text_tokens: int
    computed_tokens: int
    output_bytes: int
    last_commit_at: float | None


@dataclass(frozen=True, slots=True)
class Stage:
    """Seconds of work. Stages overlap: the sum is no wall time."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class SettledFile:
    """How one input file ended."""

    name: str  # printable, whatever the file's name holds
    outcome: str
    rows: int
    rejects: int
    seconds: float  # first read to commit, 0 where nothing was published
    reason: str | None
    message: str | None
    unit: str | None
    at: float


@dataclass(frozen=True, slots=True)
class Point:
    """The means of a few seconds that ended at `at`."""

    at: float
    samples_per_second: float
    tokens_per_second: float
    backlog_files: int  # waiting or under way
    eta_seconds: float | None
    failed_files: int  # in these seconds


@dataclass(frozen=True, slots=True)
class History:
    """The last minutes, oldest first."""

    window_seconds: float
    step_seconds: float
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at one moment."""

    version: str
    host: str
    instance: str  # another one after each start
    inbox: str
    outbox: str
    at: float
    started_at: float
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
    free_bytes: dict[str, int]  # by folder's role
    history: History

    @property
    def uptime_seconds(self) -> float:
        return max(0.0, self.at - self.started_at)


_status = TypeAdapter(Status)


def to_json(status: Status) -> bytes:
    return _status.dump_json(status)


def from_json(body: bytes) -> Status:
    """Raises ValueError where the body is no status."""
    return _status.validate_json(body)
