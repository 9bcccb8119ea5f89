"""The part of the status board that is about workers. Counts come from the metrics; rates are made here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from daemon.escaping import escape_control
from daemon.observe.formatting import count, duration
from daemon.observe.last_minute import LastMinute
from daemon.observe.status import Alert, WorkerRow, Workers
from daemon.observe.values import by_label

if TYPE_CHECKING:
    from daemon.observe.metrics import Metrics
    from daemon.records import WorkerLoad

LOCAL = "local"  # the executor that has none
MISSING_SECONDS = 120.0  # with fewer than are wanted, after which that is worth an alert


@dataclass(frozen=True, slots=True)
class WorkerPace:
    """The work of one worker in the last minute."""

    samples: LastMinute = field(default_factory=LastMinute)
    busy_seconds: LastMinute = field(default_factory=LastMinute)

    def row(self, worker: WorkerLoad, now: float) -> WorkerRow:
        return WorkerRow(
            number=worker.number,
            node=escape_control(worker.node),
            state=worker.state,
            batches=worker.batches,
            samples=worker.samples,
            samples_per_second=round(self.samples.rate(worker.samples, now), 2),
            restarts=worker.restarts,
            busy_ratio=round(min(1.0, self.busy_seconds.rate(worker.busy_seconds, now)), 3),
            memory_bytes=worker.memory_bytes,
        )


class WorkerBoard:
    """`look` each second, `status` and `alerts` whenever someone asks. Not safe to share between threads."""

    def __init__(self, executor: str, metrics: Metrics, now: float) -> None:
        """`executor` is its kind; `now` is of the monotonic clock, as everywhere."""
        self._executor = executor
        self._metrics = metrics
        self._rows: tuple[WorkerRow, ...] = ()
        self._paces: dict[int, WorkerPace] = {}
        self._complete = now  # when as many were ready as are wanted

    def look(self, workers: Sequence[WorkerLoad], now: float) -> None:
        """Take note of this moment, after the metrics."""
        self._paces = {worker.number: self._paces.get(worker.number) or WorkerPace() for worker in workers}
        self._rows = tuple(self._paces[worker.number].row(worker, now) for worker in workers)
        if sum(row.state == "ready" for row in self._rows) >= self._value("workers_wanted"):
            self._complete = now

    def status(self) -> Workers | None:
        """Describe this moment; None where there are no workers by design."""
        if self._executor == LOCAL:
            return None
        by_state = by_label(self._metrics.workers)
        return Workers(
            executor=self._executor,
            wanted=int(self._value("workers_wanted")),
            by_state={state: int(number) for state, number in by_state.items()},
            slots=int(self._value("executor_slots")),
            batches_in_flight=int(self._value("batches_in_flight")),
            coordinator_busy_ratio=round(self._value("coordinator_busy_ratio"), 3),
            rows=self._rows,
        )

    def alerts(self, now: float) -> Iterable[Alert]:
        """Say since when some are missing; where all are, that is a pause, with an alert of its own."""
        workers, missing = self.status(), now - self._complete
        if workers is not None and workers.ready and missing >= MISSING_SECONDS:
            ready = f"{count(workers.ready)} of {count(workers.wanted)} are ready"
            yield Alert("warning", "Workers missing", f"{ready}, for {duration(missing)} now.")

    def _value(self, name: str) -> float:
        return by_label(getattr(self._metrics, name)).get("", 0.0)
