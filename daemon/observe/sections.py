"""Computes the values that the status page shows. Knows no HTML and no HTTP.

Values that only need formatting are formatted in the templates.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from daemon.observe.charts import Line, line, nice_ceiling, nice_seconds
from daemon.observe.formatting import count, duration, period, rate, size
from daemon.observe.status import HEALTHY, Running, Status
from daemon.observe.summary import DASH, shares, time_left

SPANS = (60.0, 120.0, 300.0, 600.0)


@dataclass(frozen=True, slots=True)
class Chart:
    """One value over time."""

    id: str
    name: str
    now: str
    top: str  # the end of the scale; empty where no value is above 0
    label: str  # for screen readers
    line: Line


@dataclass(frozen=True, slots=True)
class StageShare:
    """A stage's part of the work, and where it begins in a bar of them all."""

    name: str
    share: float
    begin: float  # the sum of the shares before it
    seconds: float


def title(status: Status) -> str:
    """Return the document's title: how many alerts need attention, the state and the host."""
    grave = grave_alerts(status)
    alerts = f"({grave}) " if grave else ""
    return f"{alerts}{status.state} · lensd {status.host}"


def icon(status: Status) -> str:
    return "icon.svg" if status.state in HEALTHY and not grave_alerts(status) else "icon-alert.svg"


def grave_alerts(status: Status) -> int:
    return sum(alert.level != "note" for alert in status.alerts)


def span(status: Status) -> float:
    """Return the seconds that the charts show: the uptime, rounded up, at most the history's window."""
    window = status.history.window_seconds
    return min(window, next((step for step in SPANS if step >= status.uptime_seconds), window))


def charts(status: Status) -> tuple[Chart, ...]:
    pace, backlog = status.pace, status.backlog
    to_do = backlog.files + backlog.files_under_way
    return (
        chart(status, "samples_per_second", "Samples per second", rate(pace.samples_per_second)),
        chart(status, "tokens_per_second", "Tokens per second", rate(pace.tokens_per_second)),
        chart(status, "backlog_files", "Files waiting or under way", count(to_do)),
        chart(status, "eta_seconds", "Time left", time_left(status)),
    )


def chart(status: Status, field: str, name: str, now: str) -> Chart:
    """Return the chart of one field of the history's points."""
    history, window = status.history, span(status)
    points: list[tuple[float, float | None]] = [
        (status.at - point.at, getattr(point, field)) for point in history.points
    ]
    highest = max((value for _, value in points if value is not None), default=0.0)
    top, top_text, highest_text = scale(field, highest)
    return Chart(
        id=f"chart-{field.replace('_', '-')}",
        name=name,
        now=now,
        top=top_text if highest else "",
        label=f"{name} over the last {period(window)}: now {now}, at most {highest_text}",
        line=line(points, window=window, gap=3 * history.step_seconds, top=top),
    )


def scale(field: str, highest: float) -> tuple[float, str, str]:
    """Return the end of the scale as a number and as text, and the highest value as text."""
    if field == "eta_seconds":
        top = nice_seconds(highest)
        return top, duration(top), duration(round(highest))
    top = nice_ceiling(highest)
    return top, count(top), count(highest) if field == "backlog_files" else rate(highest)


def stage_shares(status: Status) -> tuple[StageShare, ...]:
    """Return the stages with their shares; empty where no work was done."""
    seconds = {stage.name: round(stage.seconds, 1) for stage in status.stages}
    found = shares(status)
    begins = itertools.accumulate((share for _, share in found), initial=0.0)
    return tuple(
        StageShare(name, share, begin, seconds[name])
        for (name, share), begin in zip(found, begins, strict=False)
    )


def shows_names(running: Running) -> bool:
    """Return whether any SAE has a name that says more than its layer."""
    return any(sae.name not in ("", f"l{sae.layer}") for sae in running.saes)


def shows_sources(running: Running) -> bool:
    """Return whether any SAE comes from elsewhere than its hook's name says."""
    return any(sae.source != sae.hook_name for sae in running.saes)


def free_space(status: Status) -> str:
    """Return the least free space of the folders, which as a rule share a file system."""
    return size(min(status.free_bytes.values())) if status.free_bytes else DASH
