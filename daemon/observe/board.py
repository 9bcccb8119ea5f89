"""The status board: keeps what one daemon has to say of itself, in bounded memory, and says it when asked.

Numbers are read from the metrics, so that page, terminal and Prometheus agree. Told of each second and of
each settled file by one thread, asked by any; knows no HTTP and no HTML.
"""

from __future__ import annotations

import dataclasses
import platform
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from daemon.escaping import escape_control
from daemon.observe.formatting import counted, duration, period
from daemon.observe.health import DRAINING, LOADING, PAUSED, Health
from daemon.observe.reports import report_path
from daemon.observe.status import (
    HEALTHY,
    Alert,
    Backlog,
    Dictionary,
    History,
    Pace,
    Point,
    Running,
    SettledFile,
    Stage,
    State,
    Status,
    Totals,
)
from daemon.observe.values import by_label
from daemon.observe.worker_board import LOCAL, WorkerBoard

if TYPE_CHECKING:
    from daemon.model_info import ModelInfo
    from daemon.observe.metrics import Metrics
    from daemon.observe.progress import Progress
    from daemon.observe.workload import Workload
    from daemon.records import InboxLoad, Outcome, WorkerLoad

WINDOW_SECONDS = 900.0
STEP_SECONDS = 5.0
RATE_SECONDS = 10.0  # that a rate "now" looks back
FILES_SHOWN = 20
NO_PROGRESS_SECONDS = 120.0  # with work at hand, after which that is worth an alert
WAITING = "queue"  # of the stages, the one that does no work


@dataclass(frozen=True, slots=True)
class Look:
    """The counts at one moment of the monotonic clock."""

    when: float
    done: int  # samples computed or rejected
    tokens: float  # run by the model
    failed: int
    stages: dict[str, float]


class StatusBoard:
    """`look` each second, `settle` each file, `status` whenever someone asks."""

    def __init__(
        self,
        *,
        inbox: Path,
        outbox: Path,
        executor: str = LOCAL,
        metrics: Metrics,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._inbox = escape_control(str(inbox.absolute()))
        self._outbox = escape_control(str(outbox.absolute()))
        self._workers = WorkerBoard(executor, metrics, clock())
        self._metrics = metrics
        self._progress = progress
        self._clock = clock
        self._wall_clock = wall_clock
        self._version = version("lensd")
        self._host = escape_control(platform.node())
        self._instance = secrets.token_hex(8)
        self._started_at = wall_clock()
        self._running: Running | None = None
        self._refused: str | None = None  # what is wrong with changed settings
        self._lock = threading.Lock()  # around all that is below
        self._load: InboxLoad | None = None  # of the last look
        self._workload: Workload | None = None
        self._estimated = False
        self._eta_seconds: float | None = None
        self._files: deque[SettledFile] = deque(maxlen=FILES_SHOWN)
        self._points: deque[Point] = deque(maxlen=int(WINDOW_SECONDS / STEP_SECONDS))
        first = self._now()
        self._marks: deque[Look] = deque([first], maxlen=self._points.maxlen)  # at the points' ends
        self._recent: deque[Look] = deque([first])  # of the last RATE_SECONDS
        self._progressed = first.when  # when `done` last grew, or there was nothing to do

    def describe(self, info: ModelInfo, max_batch_tokens: int) -> None:
        """The loaded model and its SAEs."""
        self._running = Running(
            model=escape_control(info.name),
            architecture=info.architecture,
            dtype=info.dtype,
            device=info.device,
            engine=info.engine,
            max_batch_tokens=max_batch_tokens,
            saes=tuple(
                Dictionary(
                    hook_name=sae.hook_name,
                    layer=sae.layer,
                    architecture=sae.architecture,
                    d_in=sae.d_in,
                    d_sae=sae.d_sae,
                    source=escape_control(sae.source),
                    fvu=None,
                    name=sae.name,
                )
                for sae in info.saes
            ),
        )

    def refuse_settings(self, message: str | None) -> None:
        """Why changed settings were not taken up; None once they were."""
        self._refused = None if message is None else escape_control(message)

    def settle(self, *outcomes: Outcome) -> None:
        """Files came to their ends, one after the other."""
        now = self._wall_clock()
        shown = [
            SettledFile(
                name=escape_control(outcome.name),
                outcome=outcome.kind,
                rows=outcome.rows,
                rejects=outcome.rejects,
                seconds=outcome.seconds,
                reason=outcome.reason,
                message=escape_control(message) if (message := told(outcome)) else None,
                unit=outcome.unit,
                at=now,
                report=report_path(outcome),
            )
            for outcome in outcomes[-FILES_SHOWN:]
        ]
        with self._lock:
            self._files.extendleft(shown)

    def look(
        self,
        load: InboxLoad | None,
        workload: Workload | None,
        *,
        ready: bool,
        workers: Sequence[WorkerLoad] = (),
    ) -> None:
        """Take note of this moment; `load` is None until it was counted, `workload` until a pipeline runs."""
        now = self._now()
        with self._lock:
            self._workers.look(workers, now.when)
            self._note_work(load, workload, ready=ready)
            if now.done > self._recent[-1].done or not self._work_at_hand:
                self._progressed = now.when
            self._recent.append(now)
            while len(self._recent) > 2 and self._recent[1].when <= now.when - RATE_SECONDS:
                self._recent.popleft()
            if now.when - self._marks[-1].when >= STEP_SECONDS:
                self._points.append(self._point(self._marks[-1], now))
                self._marks.append(now)

    def _note_work(self, load: InboxLoad | None, workload: Workload | None, *, ready: bool) -> None:
        """Note the work at hand, and how long it takes at the present rate."""
        self._load, self._workload = load, workload
        backlog, rate = (
            self._backlog,
            self._progress.rate,
        )  # which leaves out the time spent waiting for files
        unread = workload.unread_records(backlog.bytes) if workload is not None else None
        self._estimated = bool(unread)
        self._eta_seconds = None
        if ready and self._work_at_hand and unread is not None and rate:
            self._eta_seconds = round((backlog.samples_under_way + unread) / rate, 1)

    def status(self, health: Health) -> Status:
        """Describe this moment."""
        now, at = self._now(), self._wall_clock()
        stalled, unmet = health.stalled(), health.unmet()
        with self._lock:
            return self._status(stalled, unmet, now, at)

    def _status(self, stalled: list[str], unmet: list[str], now: Look, at: float) -> Status:
        state = self._state(stalled, unmet)
        return Status(
            version=self._version,
            host=self._host,
            instance=self._instance,
            inbox=self._inbox,
            outbox=self._outbox,
            at=at,
            started_at=self._started_at,
            state=state,
            live=not stalled,
            ready=not unmet,
            alerts=tuple(self._alerts(stalled, unmet, now, at)),
            running=self._with_fit(self._running),
            backlog=self._backlog,
            pace=self._pace(state),
            totals=self._totals(),
            stages=self._stages(now),
            files=tuple(self._files),
            free_bytes={name: int(free) for name, free in by_label(self._metrics.disk_free_bytes).items()},
            history=History(WINDOW_SECONDS, STEP_SECONDS, tuple(self._points)),
            workers=self._workers.status(),
        )

    @property
    def _backlog(self) -> Backlog:
        """As it is now, so that it fits the totals; but for the inbox, which is that of the last look."""
        load, workload, progress = self._load, self._workload, self._progress
        return Backlog(
            files=load.files if load else 0,
            bytes=load.bytes if load else 0,
            oldest_seconds=load.oldest_seconds(self._wall_clock()) if load else 0.0,
            counted_at=load.counted_at if load else None,
            files_under_way=len(workload) if workload else 0,
            samples_under_way=max(0, progress.total - progress.done),
        )

    @property
    def _work_at_hand(self) -> bool:
        backlog = self._backlog
        return bool(backlog.files or backlog.files_under_way or backlog.samples_under_way)

    def _now(self) -> Look:
        metrics = self._metrics
        return Look(
            when=self._clock(),
            done=self._progress.done,
            tokens=by_label(metrics.tokens_total)["computed"],
            failed=int(by_label(metrics.files_total)["failed"]),
            stages=by_label(metrics.stage_duration_seconds, "_sum"),
        )

    def _point(self, before: Look, now: Look) -> Point:
        seconds = now.when - before.when
        return Point(
            at=round(self._wall_clock(), 1),
            samples_per_second=round((now.done - before.done) / seconds, 2),
            tokens_per_second=round((now.tokens - before.tokens) / seconds, 1),
            backlog_files=self._backlog.files + self._backlog.files_under_way,
            eta_seconds=self._eta_seconds,
            failed_files=now.failed - before.failed,
        )

    def _pace(self, state: State) -> Pace:
        first, last = self._recent[0], self._recent[-1]
        seconds = last.when - first.when
        return Pace(
            samples_per_second=(last.done - first.done) / seconds if seconds else 0.0,
            tokens_per_second=(last.tokens - first.tokens) / seconds if seconds else 0.0,
            device_busy_ratio=by_label(self._metrics.device_busy_ratio).get("", 0.0),
            eta_seconds=self._eta_seconds if state in HEALTHY else None,
            estimated=self._estimated,
        )

    def _totals(self) -> Totals:
        metrics = self._metrics
        files, samples = by_label(metrics.files_total), by_label(metrics.samples_total)
        tokens = by_label(metrics.tokens_total)
        return Totals(
            committed=int(files["committed"]),
            failed=int(files["failed"]),
            duplicate=int(files["duplicate"]),
            requeued=int(files["requeued"]),
            rows=int(samples["committed"]),
            rejects=int(samples["rejected"]),
            text_tokens=int(tokens["text"]),
            computed_tokens=int(tokens["computed"]),
            output_bytes=int(by_label(metrics.output_bytes_total).get("", 0)),
            last_commit_at=by_label(metrics.last_commit_timestamp_seconds).get("") or None,
        )

    def _stages(self, now: Look) -> tuple[Stage, ...]:
        before = self._marks[0].stages
        return tuple(
            Stage(name, round(seconds - before.get(name, 0.0), 3))
            for name, seconds in now.stages.items()
            if name != WAITING
        )

    def _with_fit(self, running: Running | None) -> Running | None:
        """The SAEs with the fit that the last file showed."""
        if running is None:
            return None
        fvu = by_label(self._metrics.sae_fvu)
        saes = tuple(dataclasses.replace(sae, fvu=fvu.get(sae.name)) for sae in running.saes)
        limit = int(by_label(self._metrics.max_batch_tokens).get("", 0)) or running.max_batch_tokens
        return dataclasses.replace(running, saes=saes, max_batch_tokens=limit)

    def _state(self, stalled: list[str], unmet: list[str]) -> State:
        if stalled:
            return "stalled"
        if LOADING in unmet:
            return "loading"
        if DRAINING in unmet:
            return "draining"
        if any(reason.startswith(PAUSED) for reason in unmet):
            return "paused"
        if unmet:
            return "not ready"
        return "working" if self._work_at_hand else "idle"

    def _alerts(self, stalled: list[str], unmet: list[str], now: Look, at: float) -> Iterable[Alert]:
        for reason in stalled:
            yield Alert("critical", "Not live", escape_control(reason))
        for reason in unmet:
            if reason.startswith(PAUSED):
                message = escape_control(reason.removeprefix(PAUSED))
                yield Alert("critical", "Paused", f"{message}. Nothing is taken up until it is over.")
            elif reason not in (LOADING, DRAINING):
                yield Alert("warning", "Not ready", escape_control(reason))
        quiet = now.when - self._progressed
        if quiet >= NO_PROGRESS_SECONDS and self._state(stalled, unmet) in HEALTHY:
            yield Alert("warning", "No progress", f"There is work, and none was done for {duration(quiet)}.")
        yield from self._workers.alerts(now.when)
        if self._refused is not None:
            yield Alert("warning", "Settings refused", f"{self._refused}. The ones before hold.")
        yield from self._failures(now, at)
        last = next((file for file in self._files if file.outcome == "committed"), None)
        if last is not None and last.message:
            yield Alert("warning", "SAEs unlike what is known of them", f"{last.name}: {last.message}.")
        if DRAINING in unmet:
            yield Alert("note", "Draining", "It finishes the files that it has taken up, then it ends.")

    def _failures(self, now: Look, at: float) -> Iterable[Alert]:
        failed = now.failed - self._marks[0].failed
        if failed <= 0:
            return
        looked = now.when - self._marks[0].when
        minutes = f"in the last {period(max(60.0, looked // 60 * 60))}"
        last = next((file for file in self._files if file.outcome == "failed"), None)
        which = f" The last: {last.name}: {last.message or last.reason}" if last else ""
        yield Alert("warning", f"{counted(failed, 'file')} failed {minutes}", which.strip())


def told(outcome: Outcome) -> str | None:
    """Say why a file ended as it did; None where nothing is to be said."""
    return outcome.message or "; ".join(map(str, outcome.departures)) or None
