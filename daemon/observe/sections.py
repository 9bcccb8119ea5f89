"""The parts of the status page, each a pure function of the status. Knows no HTTP.

An element with `data-live` and an id is what the page's script replaces when it changed.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from daemon.observe.charts import bar, line, nice_ceiling
from daemon.observe.markup import Html, join, tag
from daemon.observe.status import Alert, Dictionary, Point, Running, SettledFile, Status
from daemon.observe.summary import DASH, Figure, figures, sentence, shares, time_left, uptime, what_runs
from daemon.observe.wording import ago, count, counted, duration, period, plural, rate, size

NICE_SECONDS = (10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21_600, 43_200, 86_400)
SPANS = (60.0, 120.0, 300.0, 600.0)


def header(status: Status) -> Html:
    """What this is, and how it is."""
    return tag(
        "header",
        tag("h1", "lensd ", tag("span", status.host, class_="host")),
        tag(
            "p",
            tag("span", status.state.capitalize(), class_="state"),
            " ",
            tag("span", sentence(status), class_="sentence"),
        ),
        tag("p", f"{what_runs(status)} · version {status.version} · up {uptime(status)}", class_="what"),
        id="head",
        class_=f"is-{status.state.replace(' ', '-')}",
        data_live=True,
    )


def announcement(status: Status) -> Html:
    """For screen readers, and seldom: the state and how many alerts hold."""
    said = f"lensd is {status.state}, {counted(len(status.alerts), 'alert')}"
    return tag("p", said, id="said", class_="unseen", role="status", data_live=True)


def alerts(status: Status) -> Html:
    if not status.alerts:
        return section("alerts", "Alerts", tag("p", "Nothing needs a look.", class_="quiet"), heading=False)
    return section("alerts", "Alerts", tag("ul", *(alert_item(alert) for alert in status.alerts)))


def alert_item(alert: Alert) -> Html:
    return tag(
        "li",
        tag("strong", alert.title),
        tag("p", alert.detail) if alert.detail else None,
        class_=alert.level,
    )


def now(status: Status) -> Html:
    return section("now", "Now", tag("dl", *map(figure, figures(status))), heading=False)


def figure(item: Figure) -> Html:
    return tag("div", tag("dt", item.name), tag("dd", item.value), tag("dd", item.note, class_="note"))


def charts(status: Status) -> Html:
    points, pace = status.history.points, status.pace
    to_do = status.backlog.files + status.backlog.files_under_way
    return section(
        "charts",
        f"The last {period(span(status))}",
        tag(
            "div",
            chart(status, "Samples per second", rate(pace.samples_per_second), "samples_per_second"),
            chart(status, "Tokens per second", rate(pace.tokens_per_second), "tokens_per_second"),
            chart(status, "Files waiting or under way", count(to_do), "backlog_files"),
            chart(status, "Time left", time_left(status), "eta_seconds", seconds=True),
            class_="charts",
        ),
        tag("p", "The first points come within seconds.", class_="quiet") if not points else None,
    )


def chart(status: Status, name: str, now: str, field: str, *, seconds: bool = False) -> Html:
    history = status.history
    points = [(status.at - point.at, value_of(point, field)) for point in history.points]
    highest = max((value for _, value in points if value is not None), default=0.0)
    if seconds:
        top = float(
            next((nice for nice in NICE_SECONDS if nice >= highest), 86_400 * (highest // 86_400 + 1))
        )
        top_text, highest_text = duration(top), duration(round(highest))
    else:
        top = nice_ceiling(highest)
        top_text, highest_text = count(top), rate(highest) if field != "backlog_files" else count(highest)
    window = period(span(status))
    label = f"{name} over the last {window}: now {now}, at most {highest_text}"
    return tag(
        "figure",
        tag("figcaption", tag("span", name), tag("b", now)),
        tag(
            "div",
            tag("span", top_text if highest else None, class_="top", aria_hidden="true"),
            line(points, window=span(status), gap=3 * history.step_seconds, top=top, label=label),
            class_="plot",
        ),
        tag(
            "div",
            tag("span", f"{duration(span(status))} ago"),
            tag("span", "now"),
            class_="axis",
            aria_hidden="true",
        ),
        id=f"chart-{field.replace('_', '-')}",
    )


def span(status: Status) -> float:
    """Seconds that the charts show: in steps as long as the daemon runs, up to the window of its history."""
    window = status.history.window_seconds
    return min(window, next((step for step in SPANS if step >= status.uptime_seconds), window))


def value_of(point: Point, field: str) -> float | None:
    value: float | None = getattr(point, field)
    return value


def stages(status: Status) -> Html:
    """Where the time went, as one bar and a row for each."""
    parts = shares(status)
    if not parts:
        inner = tag("p", "No work in this time.", class_="quiet")
        return section("stages", "Where the time goes", inner)
    said = ", ".join(f"{name} {share:.0%}" for name, share in parts if share >= 0.005)
    rows = [
        tag(
            "li",
            tag("span", class_=f"swatch stage-{stage.name}"),
            tag("span", stage.name, class_="name"),
            tag("span", f"{share:.1%}", class_="number"),
            tag("span", duration(round(stage.seconds, 1)), class_="number note"),
        )
        for stage, (_, share) in zip(status.stages, parts, strict=True)
    ]
    window = period(span(status))
    return section(
        "stages",
        "Where the time goes",
        bar(parts, label=f"Shares of the stages: {said}"),
        tag("ul", *rows, class_="legend"),
        tag("p", f"Work of the last {window}. Stages overlap; waiting is not counted.", class_="quiet"),
    )


def files(status: Status) -> Html:
    if not status.files:
        inner = tag("p", "No file came to its end since the start.", class_="quiet")
        return section("files", "Last files", inner)
    columns = ("File", "Outcome", "Samples", "Rejects", "Took", "When")
    heads = [
        tag("th", name, scope="col", role="columnheader", class_="number" if name in columns[2:5] else None)
        for name in columns
    ]
    return section(
        "files",
        "Last files",
        tag(
            "table",
            tag("thead", tag("tr", *heads, role="row"), role="rowgroup"),
            tag("tbody", *(file_row(file, status.at) for file in status.files), role="rowgroup"),
            class_="cards",
            role="table",
            aria_labelledby="files-title",
        ),
    )


def file_row(file: SettledFile, at: float) -> Html:
    """On a narrow page a row becomes a card, which is why roles are spelled out."""
    published = file.outcome == "committed"
    when = datetime.fromtimestamp(file.at, UTC).isoformat(timespec="seconds")
    reason = file.message or file.reason
    return tag(
        "tr",
        tag(
            "th",
            tag("bdi", file.name),
            tag("p", reason, class_="reason") if reason else None,
            scope="row",
            role="rowheader",
        ),
        tag("td", tag("span", file.outcome, class_=f"outcome {file.outcome}"), role="cell"),
        number_cell(count(file.rows), told=published, after=plural(file.rows, "sample")),
        number_cell(
            count(file.rejects), told=published, after=plural(file.rejects, "reject"), marked=file.rejects > 0
        ),
        number_cell(duration(file.seconds), told=published, before="in"),
        tag("td", tag("time", ago(at - file.at), datetime=when, title=when), role="cell", class_="when"),
        role="row",
    )


def number_cell(
    value: str,
    *,
    told: bool = True,
    before: str | None = None,
    after: str | None = None,
    marked: bool = False,
) -> Html:
    """A value, where it is `told`; the words before and after it are for a card, which has no header."""
    return tag(
        "td",
        value if told else DASH,
        role="cell",
        class_="number marked" if marked else "number",
        data_before=before,
        data_after=after,
        data_plain=not told or value == "0",
    )


def running(status: Status) -> Html:
    """Model, dictionaries, folders."""
    if status.running is None:
        inner: Html = tag("p", "The model is being loaded.", class_="quiet")
    else:
        inner = model(status.running)
    free = size(min(status.free_bytes.values())) if status.free_bytes else DASH  # they share a file system
    since = datetime.fromtimestamp(status.started_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return section(
        "running",
        "What is running",
        inner,
        tag(
            "dl",
            fact("Inbox", status.inbox),
            fact("Outbox", status.outbox),
            fact("Free", free),
            fact("Started", since),
            fact("Version", f"lensd {status.version} on {status.host}"),
            class_="facts",
        ),
    )


def model(running: Running) -> Html:
    told = any(sae.source != sae.hook_name for sae in running.saes)  # else it would be said twice
    heads = ("Hook", "Architecture", *(("From",) if told else ()), "Features", "FVU")
    columns = [
        tag("th", name, scope="col", role="columnheader", class_="number" if name in heads[-2:] else None)
        for name in heads
    ]
    return join(
        tag(
            "dl",
            fact("Model", f"{running.model} ({running.architecture})"),
            fact("Runs in", f"{running.dtype} on {running.device}"),
            fact("Engine", f"{running.engine}, at most {count(running.max_batch_tokens)} tokens per batch"),
            class_="facts",
        ),
        tag(
            "div",
            tag(
                "table",
                tag("caption", "Sparse autoencoders; FVU of the last file"),
                tag("thead", tag("tr", *columns, role="row"), role="rowgroup"),
                tag("tbody", *(dictionary_row(sae, told=told) for sae in running.saes), role="rowgroup"),
                class_="cards",
                role="table",
            ),
            class_="scrolls",
            tabindex=0,
            role="region",
            aria_label="Sparse autoencoders",
        ),
    )


def dictionary_row(sae: Dictionary, *, told: bool) -> Html:
    """With where it comes from, if that is `told`."""
    return tag(
        "tr",
        tag("th", sae.hook_name, scope="row", role="rowheader"),
        tag("td", sae.architecture, role="cell"),
        tag("td", sae.source, role="cell", data_plain=sae.source == sae.hook_name) if told else None,
        number_cell(count(sae.d_sae), after="features"),
        number_cell(f"{sae.fvu or 0:.3f}", told=sae.fvu is not None, before="FVU"),
        role="row",
    )


def fact(name: str, value: str) -> Html:
    return tag("div", tag("dt", name), tag("dd", tag("bdi", value)))


def section(name: str, title: str, *content: Html | None, heading: bool = True) -> Html:
    """Where its content speaks for itself, the heading is for screen readers only."""
    return tag(
        "section",
        tag("h2", title, id=f"{name}-title", class_=None if heading else "unseen"),
        *content,
        id=name,
        aria_labelledby=f"{name}-title",
        data_live=True,
    )


def footer() -> Html:
    links = (("metrics", "metrics"), ("livez", "live"), ("readyz", "ready"), ("status.json", "JSON"))
    return tag(
        "footer", tag("nav", *(tag("a", text, href=href) for href, text in links), aria_label="Endpoints")
    )


SECTIONS: tuple[Callable[[Status], Html], ...] = (alerts, now, charts, stages, files, running)
