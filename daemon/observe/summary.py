"""Sums up the status in words and a few figures, for the page and the terminal. Knows neither."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from daemon.observe.formatting import ago, count, counted, duration, eta, rate, size
from daemon.observe.status import HEALTHY, Status, WorkerRow, Workers

OLD_COUNT_SECONDS = 30.0  # after which the age of a count is told with it
MOST_ROWS = 64  # workers shown one by one
WORST_ROWS = 16  # of more than these
DASH = "\N{EN DASH}"  # where there is no value


@dataclass(frozen=True, slots=True)
class Figure:
    """A value with its name and a remark."""

    name: str
    value: str
    note: str


@dataclass(frozen=True, slots=True)
class Fact:
    """Something in words, with its name."""

    name: str
    value: str


def sentence(status: Status) -> str:
    """Return the state in a few more words."""
    backlog = status.backlog
    waits = count(backlog.files) if backlog.files else "none"
    waiting = f"{counted(backlog.files_under_way, 'file')} under way, {waits} waiting"
    return {
        "loading": f"Not ready yet. {waiting}.",
        "idle": "The inbox is empty.",
        "working": f"{waiting}.",
        "draining": f"Finishing what was taken up, then ending. {waiting}.",
        "paused": f"Nothing is taken up for now. {waiting}.",
        "not ready": f"{waiting}.",
        "stalled": f"Something makes no progress. {waiting}.",
    }[status.state]


def what_runs(status: Status) -> str:
    running, workers = status.running, status.workers
    model = f"{running.model}, {running.dtype} on {running.device}" if running else "no model loaded yet"
    if workers is None:
        return model
    return f"{model}, {count(workers.ready)} of {counted(workers.wanted, 'worker')} ready"


def uptime(status: Status) -> str:
    """Return the uptime to the minute, so that the text changes seldom."""
    seconds = status.uptime_seconds
    return "under a minute" if seconds < 60 else duration(seconds // 60 * 60)


def figures(status: Status) -> tuple[Figure, ...]:
    backlog, totals = status.backlog, status.totals
    last = ago(status.at - totals.last_commit_at) if totals.last_commit_at else "never"
    read = f"{counted(backlog.samples_under_way, 'sample')} read, not computed"
    published = (
        f"{counted(totals.committed, 'file')}, {size(totals.output_bytes)}; last {last}"
        if totals.committed
        else "no file yet"
    )
    failed = f"{counted(totals.failed, 'file')} failed, {count(totals.duplicate)} duplicate"
    waiting = counted(backlog.files, "file") if backlog.counted_at else DASH
    return (
        Figure("Waiting", waiting, waiting_note(status)),
        Figure("Under way", counted(backlog.files_under_way, "file"), read),
        Figure("Time left", time_left(status), time_left_note(status)),
        Figure("Published", counted(totals.rows, "sample"), published),
        Figure("Set aside", counted(totals.rejects, "reject"), failed),
        busy_figure(status),
    )


def busy_figure(status: Status) -> Figure:
    if status.workers is None:
        return Figure("Device busy", f"{status.pace.device_busy_ratio:.0%}", "of the last minute")
    rows = status.workers.rows
    busy = f"{sum(row.busy_ratio for row in rows) / len(rows):.0%}" if rows else DASH
    return Figure("Workers busy", busy, "of the last minute, on average")


def worker_facts(workers: Workers) -> tuple[Fact, ...]:
    """Return what holds for all workers together, in words."""
    rows = workers.rows
    others = [
        f"{count(number)} {state}"
        for state, number in workers.by_state.items()
        if number and state != "ready"
    ]
    facts = [
        Fact("Executor", workers.executor),
        Fact("Workers", ", ".join([f"{count(workers.ready)} of {count(workers.wanted)} ready", *others])),
        Fact("Batches", f"{count(workers.batches_in_flight)} under way, room for {count(workers.slots)}"),
    ]
    if len(rows) > 1:
        rates, shares = [row.samples_per_second for row in rows], [row.busy_ratio for row in rows]
        together = (
            f"{rate(sum(rates))} samples/s, {counted(sum(row.restarts for row in rows), 'restart')},"
            f" {size(sum(row.memory_bytes for row in rows))}"
        )
        each = f"{between(rates, rate)} samples/s, {between(shares, '{:.0%}'.format)} busy"
        facts += [Fact("Together", together), Fact("Each", each)]
    coordinator = f"{workers.coordinator_busy_ratio:.0%} of a core, this process"
    return (*facts, Fact("Coordinator", coordinator))


def between(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Return the least and the greatest as text, or the one that all have."""
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} to {high}"


def worker_rows(workers: Workers) -> tuple[WorkerRow, ...]:
    """Return the workers that are shown one by one: all, or of very many those that do worst."""
    if len(workers.rows) <= MOST_ROWS:
        return workers.rows
    return tuple(
        sorted(workers.rows, key=lambda row: (row.state == "ready", -row.restarts, row.samples_per_second))
    )[:WORST_ROWS]


def worker_caption(workers: Workers) -> str:
    """Return which workers are shown; shares and rates are those of the last minute."""
    shown, rows = len(worker_rows(workers)), len(workers.rows)
    which = "" if shown == rows else f"The {count(shown)} that do worst, of {count(rows)}. "
    return f"{which}Samples per second and shares are those of the last minute"


def waiting_note(status: Status) -> str:
    """Return the size and age of the files that wait, with the age of the count where it is old."""
    backlog = status.backlog
    if backlog.counted_at is None:
        return "not counted yet"
    note = f"{size(backlog.bytes)}, the oldest for {duration(round(backlog.oldest_seconds))}"
    if not backlog.files:
        note = "the inbox is empty"
    unseen = status.at - backlog.counted_at
    return note if unseen < OLD_COUNT_SECONDS else f"{note}; as it was {ago(unseen)}"


def has_work(status: Status) -> bool:
    return bool(status.backlog.files or status.backlog.files_under_way)


def time_left(status: Status) -> str:
    pace = status.pace
    if not has_work(status) or status.state not in HEALTHY:
        return DASH
    return eta(pace.eta_seconds, estimated=pace.estimated)


def time_left_note(status: Status) -> str:
    if not has_work(status):
        return "nothing to do"
    if status.state not in HEALTHY:
        return f"not known while {status.state}"
    if status.pace.eta_seconds is None:
        return "once there are results"
    return "unread files by their bytes" if status.pace.estimated else "at the present rate"


def shares(status: Status) -> tuple[tuple[str, float], ...]:
    """Return each stage's share of the work in the window; empty where no work was done."""
    total = sum(stage.seconds for stage in status.stages)
    return tuple((stage.name, stage.seconds / total) for stage in status.stages) if total else ()


def shares_text(status: Status) -> str:
    """Return the shares in words, those that round to 0% left out; empty where no work was done."""
    return ", ".join(f"{name} {share:.0%}" for name, share in shares(status) if share >= 0.005)
