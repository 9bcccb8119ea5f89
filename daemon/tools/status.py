"""`lensd status`: what a running daemon says of itself, in the terminal. Asks over HTTP, touches no files."""

from __future__ import annotations

import http.client
import urllib.error
import urllib.request
from collections.abc import Sequence
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.config import Config
from daemon.errors import ConfigError, MachineError
from daemon.escaping import escape_control, escape_name
from daemon.observe.formatting import ago, count, duration, rate, size
from daemon.observe.status import HEALTHY, SettledFile, Status, Workers, from_json
from daemon.observe.summary import (
    DASH,
    figures,
    sentence,
    shares_text,
    uptime,
    what_runs,
    worker_caption,
    worker_facts,
    worker_rows,
)

TIMEOUT_SECONDS = 5.0
STATUS_BYTES = 16 << 20  # what answers more is no daemon
ANYWHERE = {"0.0.0.0": ("127.0.0.1",), "[::]": ("[::1]", "127.0.0.1")}  # listened on: asked at
BARS = " ▁▂▃▄▅▆▇█"
BARS_SHOWN = 24
STYLES = {
    "idle": "green",
    "working": "green",
    "paused": "red",
    "stalled": "red",
    "critical": "red",
    "warning": "yellow",
    "failed": "red",
    "committed": "green",
    "ready": "green",
    "starting": "yellow",
    "draining": "yellow",
}


def urls_of(config: Config) -> list[str]:
    """Where the daemon with this configuration may answer. Raises ConfigError where it does not."""
    if not config.http.enabled:
        raise ConfigError("http.enabled is false in the configuration: such a daemon can't be asked")
    host, _, port = config.http.address.rpartition(":")
    if port == "0":
        raise ConfigError("http.address has port 0, any free one: give --url, which the daemon's log names")
    return [f"http://{asked}:{port}" for asked in ANYWHERE.get(host, (host,))]


class NoAnswer(MachineError):
    """Nobody answers at an address."""


def fetch_first(urls: Sequence[str]) -> Status:
    """Ask at each base URL until somebody answers. Raises as `fetch` does, of the first where nobody does."""
    silent: list[NoAnswer] = []
    for url in urls:
        try:
            return fetch(url)
        except NoAnswer as error:
            silent.append(error)
    raise silent[0]


def fetch(url: str) -> Status:
    """Ask the daemon at a base URL, without a proxy.

    Raises ConfigError for what is no URL, NoAnswer where nobody answers, MachineError where no status comes.
    """
    if not is_url(url):
        raise ConfigError(f"--url {escape_control(url)}: expected http://HOST:PORT")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url.rstrip('/')}/status.json", timeout=TIMEOUT_SECONDS) as response:
            body: bytes = response.read(STATUS_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise MachineError(f"{url}: answered {error.code}: is that lensd, of this version?") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        why = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise NoAnswer(f"{url}: no answer ({why}): is lensd running there?") from None
    try:
        if len(body) > STATUS_BYTES:
            raise ValueError("no status is that large")
        return from_json(body)
    except ValueError:
        raise MachineError(f"{url}: the answer is no status: is that lensd, of this version?") from None


def is_url(text: str) -> bool:
    if not text.isprintable() or " " in text:
        return False
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def healthy(status: Status) -> bool:
    """Whether it is live and ready, so that it takes work up."""
    return status.live and status.ready and status.state in HEALTHY


def print_status(console: Console, status: Status) -> None:
    state = Text(status.state, style=f"bold {STYLES.get(status.state, 'yellow')}")
    show(console, Text.assemble("lensd on ", status.host, ": ", state, f". {sentence(status)}"))
    details = f"{what_runs(status)}, version {status.version}, up {uptime(status)}"
    show(console, Text(details, style="dim"))
    for alert in status.alerts:
        title = Text(alert.title, style=f"bold {STYLES.get(alert.level, 'cyan')}")
        show(console, Text.assemble("\n", title, "\n" if alert.detail else "", alert.detail))
    console.print()
    console.print(figure_table(status))
    if said := shares_text(status):
        show(console, Text(f"Time goes to {said}."))
    if status.workers is not None:
        console.print()
        for fact in worker_facts(status.workers):
            show(console, Text.assemble((f"{fact.name:12}", "dim"), fact.value))
        if status.workers.rows:
            console.print()
            console.print(worker_table(status.workers))
            show(console, Text(f"{worker_caption(status.workers)}.", style="dim"))
    if status.files:
        console.print()
        console.print(file_table(status.files, status.at))


def show(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True, highlight=False)


def figure_table(status: Status) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")
    for figure in figures(status):
        table.add_row(figure.name, figure.value, figure.note)
    points, pace = status.history.points[-BARS_SHOWN:], status.pace
    step = f"in steps of {duration(status.history.step_seconds)}"
    samples = sparkline([point.samples_per_second for point in points])
    tokens = sparkline([point.tokens_per_second for point in points])
    table.add_row("Samples/s", rate(pace.samples_per_second), f"{samples} {step}" if points else "")
    table.add_row("Tokens/s", rate(pace.tokens_per_second), f"{tokens} {step}" if points else "")
    return table


def sparkline(values: Sequence[float]) -> str:
    """A bar per value, the highest full; the lowest bar is a value above 0."""
    top = max(values, default=0.0)
    if not top:
        return BARS[1] * len(values)
    return "".join(BARS[max(1, round(value / top * (len(BARS) - 1)))] for value in values)


def worker_table(workers: Workers) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("worker", justify="right", no_wrap=True)
    table.add_column("node", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("batches", "samples", "samples/s", "busy", "restarts", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in worker_rows(workers):
        table.add_row(
            str(row.number),
            Text(row.node or DASH),
            Text(row.state, style=STYLES.get(row.state, "")),
            count(row.batches),
            count(row.samples),
            rate(row.samples_per_second),
            f"{row.busy_ratio:.0%}",
            Text(count(row.restarts), style="red" if row.restarts else ""),
            size(row.memory_bytes) if row.memory_bytes else DASH,
        )
    return table


def file_table(files: Sequence[SettledFile], at: float) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("outcome", no_wrap=True)
    for name in ("samples", "rejects", "took", "when"):
        table.add_column(name, justify="right", no_wrap=True)
    for file in files:
        published = file.outcome == "committed"
        label = Text(escape_name(file.name))
        if file.reason:
            label.append(f"\n{file.message or file.reason}", style="dim")
        table.add_row(
            label,
            Text(file.outcome, style=STYLES.get(file.outcome, "")),
            count(file.rows) if published else DASH,
            count(file.rejects) if published else DASH,
            duration(file.seconds) if published else DASH,
            ago(at - file.at),
        )
    return table
