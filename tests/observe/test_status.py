"""The status board reports a run, by a clock of its own; the page shows the report."""

from __future__ import annotations

import dataclasses
import re
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import aiohttp
import pytest
from markupsafe import escape
from prometheus_client import CollectorRegistry
from rich.console import Console

from daemon.escaping import escape_control
from daemon.model_info import ModelInfo, SaeInfo
from daemon.observe.board import FILES_SHOWN, NO_PROGRESS_SECONDS, STEP_SECONDS, WINDOW_SECONDS, StatusBoard
from daemon.observe.charts import line, nice_ceiling, runs
from daemon.observe.formatting import ago, duration, eta, rate, size
from daemon.observe.health import LOADING, Health
from daemon.observe.http import serve_http
from daemon.observe.metrics import Metrics
from daemon.observe.page import document, status_routes
from daemon.observe.progress import Progress
from daemon.observe.status import Status, from_json, to_json
from daemon.observe.summary import figures
from daemon.observe.workload import Workload
from daemon.records import Departure, InboxLoad, Outcome, PartExtent, StageSeconds
from tests.support.sources import unclaimed

HOOK = "blocks.{}.hook_resid_post"
SAES = tuple(SaeInfo(HOOK.format(n), HOOK.format(n), n, 4, 8, 4, "jumprelu", "s", "h") for n in (3, 5))
INFO = ModelInfo("tiny", "Llama", 4, 6, "float32", "cpu", "packed", None, SAES)
EPOCH = 1_700_000_000.0  # Unix time when the clock is at 0
NOTHING = InboxLoad(files=0, bytes=0, oldest_at=None, counted_at=EPOCH + 1000.0)


def waiting(files: int, size: int) -> InboxLoad:
    return InboxLoad(files=files, bytes=size, oldest_at=EPOCH + 900.0, counted_at=EPOCH + 1000.0)


class ToldHealth(Health):
    """Health that says what it is told to."""

    def __init__(self) -> None:
        super().__init__(FakeDevice(), stall_seconds=60.0)
        self.reasons: list[str] = []

    def stalled(self) -> list[str]:
        return self.reasons


class Daemon:
    """A board with what it looks at, and a clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.metrics = Metrics(CollectorRegistry())
        self.progress = Progress(Console(quiet=True), clock=self.clock)
        self.progress.__enter__()
        self.workload = Workload()
        self.health = ToldHealth()
        self.load = NOTHING
        self.board = StatusBoard(
            inbox=Path("/in"),
            outbox=Path("/out"),
            metrics=self.metrics,
            progress=self.progress,
            clock=self.clock,
            wall_clock=lambda: EPOCH + self.now,
        )

    def clock(self) -> float:
        return self.now

    def run(self, seconds: int, *, samples: int = 0, tokens: int = 0) -> None:
        """So many seconds, so much done in each."""
        for _ in range(seconds):
            self.now += 1.0
            self.progress.advance(samples)
            self.metrics.tokens_total.labels("computed").inc(tokens)
            self.board.look(self.load, self.workload, ready=not self.health.unmet())

    def settle(self, outcome: Outcome) -> None:
        self.metrics.observe_outcomes([outcome], INFO.saes)
        self.board.settle(outcome)

    def status(self) -> Status:
        return self.board.status(self.health)


@pytest.fixture
def daemon() -> Daemon:
    return Daemon()


def titles(status: Status) -> list[str]:
    return [alert.title for alert in status.alerts]


def test_rates_are_those_of_the_last_seconds(daemon):
    daemon.progress.add_total(10_000)
    daemon.run(60, samples=7, tokens=70)
    daemon.run(20, samples=3, tokens=30)
    pace = daemon.status().pace
    assert (pace.samples_per_second, pace.tokens_per_second) == (3.0, 30.0)
    daemon.run(20)
    assert daemon.status().pace.samples_per_second == 0


def test_history_holds_one_window_and_no_more(daemon):
    daemon.progress.add_total(100_000)
    daemon.run(int(WINDOW_SECONDS) + 60, samples=4)
    history = daemon.status().history
    assert len(history.points) == WINDOW_SECONDS / STEP_SECONDS
    assert {point.samples_per_second for point in history.points} == {4.0}
    assert history.points[-1].at - history.points[0].at == WINDOW_SECONDS - STEP_SECONDS


def test_time_left_of_files_read_whole_is_counted(daemon):
    source = unclaimed("f")
    daemon.workload.begin(source)
    daemon.workload.read(source, PartExtent(0, 0, 100, 0), last=True)
    daemon.progress.add_total(100)
    daemon.run(10, samples=5)
    pace = daemon.status().pace
    assert pace.eta_seconds == pytest.approx(10.0)
    assert not pace.estimated


def test_time_left_of_unread_files_is_estimated_from_their_bytes(daemon):
    source = dataclasses.replace(unclaimed("f"), size=1000)
    daemon.workload.begin(source)
    daemon.workload.read(source, PartExtent(0, 0, 100, 0), last=True)  # 10 bytes a record
    daemon.progress.add_total(100)
    daemon.load = waiting(2, 500)
    daemon.run(10, samples=5)
    pace = daemon.status().pace
    assert pace.eta_seconds == pytest.approx((50 + 50) / 5)
    assert pace.estimated
    assert eta(pace.eta_seconds, estimated=pace.estimated) == "about 20 s"


def test_time_left_is_unknown_before_anything_is_known(daemon):
    daemon.load = waiting(2, 500)
    daemon.run(5)
    assert daemon.status().pace.eta_seconds is None
    assert "not known yet" in document(daemon.status(), "r")


def test_nobody_can_tell_the_time_left_during_a_pause(daemon):
    daemon.load = waiting(2, 500)
    daemon.progress.add_total(100)
    daemon.run(10, samples=5)
    daemon.health.pause(["full"])
    daemon.run(10)
    status = daemon.status()
    assert status.pace.eta_seconds is None
    assert status.history.points[-1].eta_seconds is None
    assert "not known while paused" in document(status, "r")


def test_an_idle_daemon_has_no_time_left(daemon):
    daemon.run(5)
    assert daemon.status().pace.eta_seconds is None
    assert daemon.status().state == "idle"


def test_a_large_file_under_way_tells_by_its_offsets_how_much_is_unread():
    workload = Workload()
    source = dataclasses.replace(unclaimed("big.jsonl"), size=10_000)
    workload.begin(source)
    assert workload.unread_records(0) is None
    workload.read(source, PartExtent(0, 0, 10, 0), last=False)
    workload.read(source, PartExtent(1, 10, 10, 1000), last=False)  # 10 records take 1000 bytes
    assert workload.unread_records(0) == pytest.approx(80)
    assert workload.unread_records(500) == pytest.approx(85)
    workload.read(source, PartExtent(2, 20, 5, 2000), last=True)
    assert workload.unread_records(0) == 0
    workload.end(source.unit)
    assert len(workload) == 0


def test_offsets_in_a_compressed_file_are_not_taken_for_its_bytes():
    workload = Workload()
    claim = dataclasses.replace(unclaimed("big.jsonl.gz").claim, name="big.jsonl.gz")
    source = dataclasses.replace(unclaimed("big.jsonl.gz"), claim=claim, size=1000)
    workload.begin(source)
    workload.read(source, PartExtent(0, 0, 10, 0), last=False)
    workload.read(source, PartExtent(1, 10, 10, 5000), last=False)
    assert workload.unread_records(0) is None


@pytest.mark.parametrize(
    ("unmet", "stalled", "state", "alerts"),
    [
        (set(), [], "idle", []),
        ({LOADING}, [], "loading", []),
        ({"draining"}, [], "draining", ["Draining"]),
        ({"draining", "paused: /out: full"}, [], "draining", ["Paused", "Draining"]),
        ({"paused: /out: full"}, [], "paused", ["Paused"]),
        ({"a folder is gone"}, [], "not ready", ["Not ready"]),
        ({"paused: x"}, ["device busy"], "stalled", ["Not live", "Paused"]),
    ],
)
def test_state_and_alerts_follow_health(daemon, unmet, stalled, state, alerts):
    for condition in unmet:
        daemon.health.require(condition)
    daemon.health.reasons = stalled
    daemon.run(1)
    status = daemon.status()
    assert (status.state, titles(status)) == (state, alerts)
    assert status.ready == (not unmet)
    assert status.live == (not stalled)


def test_work_that_does_not_move_is_an_alert_until_it_does(daemon):
    daemon.load = waiting(1, 10)
    daemon.progress.add_total(5)
    daemon.run(int(NO_PROGRESS_SECONDS) - 1)
    assert titles(daemon.status()) == []
    daemon.run(2)
    assert titles(daemon.status()) == ["No progress"]
    daemon.run(1, samples=1)
    assert titles(daemon.status()) == []


def test_waiting_for_work_is_no_lack_of_progress(daemon):
    daemon.run(2 * int(NO_PROGRESS_SECONDS))
    daemon.load = waiting(1, 10)
    daemon.run(2)
    assert titles(daemon.status()) == []


def test_a_count_that_is_old_says_so(daemon):
    assert figures(daemon.status())[0].note == "not counted yet"
    daemon.run(1)
    assert figures(daemon.status())[0].note == "the inbox is empty"
    daemon.load = waiting(2, 500)
    daemon.run(1)
    assert figures(daemon.status())[0].note == "500 bytes, the oldest for 1 min 42 s"
    daemon.run(120)
    assert figures(daemon.status())[0].note == "500 bytes, the oldest for 3 min 42 s; as it was 2 min ago"


def test_failures_are_an_alert_for_one_window(daemon):
    daemon.run(10)
    daemon.settle(Outcome("failed", "a.json", reason="empty", message="it is empty: drop another"))
    daemon.run(1)
    (alert,) = daemon.status().alerts
    assert alert.title == "1 file failed in the last minute"
    assert alert.detail == "The last: a.json: it is empty: drop another"
    daemon.run(int(WINDOW_SECONDS) + 60)
    assert daemon.status().alerts == ()
    assert [file.outcome for file in daemon.status().files] == ["failed"]


def test_it_may_be_asked_from_another_thread(daemon, request):
    """The endpoints may live on a thread of their own."""
    told = threading.Event()
    failures = []

    def ask() -> None:
        try:
            while not told.is_set():
                document(daemon.status(), "r")
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    request.addfinalizer(lambda: sys.setswitchinterval(interval))
    sys.setswitchinterval(1e-5)
    asking = threading.Thread(target=ask)
    asking.start()
    daemon.settle(Outcome("failed", "f.json", reason="empty", message="m"))
    for number in range(300):
        daemon.settle(Outcome("duplicate", f"{number}.json"))
        daemon.progress.add_total(3)
        daemon.run(3, samples=1)
    told.set()
    asking.join()
    assert failures == []


def test_only_the_last_files_are_kept_the_newest_first(daemon):
    for number in range(3 * FILES_SHOWN):
        daemon.settle(Outcome("duplicate", f"{number}.json"))
    names = [file.name for file in daemon.status().files]
    assert names == [f"{number}.json" for number in range(3 * FILES_SHOWN - 1, 2 * FILES_SHOWN - 1, -1)]


def test_stages_are_those_of_the_window_without_waiting(daemon):
    stages = StageSeconds(queue=50.0, write=2.0, commit=1.0)
    daemon.run(1)
    daemon.settle(Outcome("committed", "a", "u", Path("o"), rows=1, fvu=(0.1, None), stages=stages))
    seconds = {stage.name: stage.seconds for stage in daemon.status().stages}
    assert "queue" not in seconds
    assert (seconds["write"], seconds["commit"], seconds["forward"]) == (2.0, 1.0, 0.0)
    daemon.run(int(WINDOW_SECONDS) + 60)
    assert not any(stage.seconds for stage in daemon.status().stages)


def test_what_runs_carries_the_fit_of_the_last_file(daemon):
    assert daemon.status().running is None
    daemon.board.describe(INFO, 512)
    daemon.settle(Outcome("committed", "a", "u", Path("o"), rows=1, fvu=(0.25, None)))
    running = daemon.status().running
    assert running.max_batch_tokens == 512
    assert [sae.fvu for sae in running.saes] == [0.25, None]


def test_the_page_names_dictionaries_whose_names_say_more_than_their_layer(daemon):
    daemon.board.describe(INFO, 512)
    assert "l3" not in document(daemon.status(), "r")
    saes = [
        dataclasses.replace(SAES[0], name=name, d_sae=width) for name, width in (("l3_8", 8), ("l3_9", 9))
    ]
    daemon.board.describe(dataclasses.replace(INFO, saes=tuple(saes)), 512)
    daemon.metrics.observe_outcomes([Outcome("committed", "a", fvu=(0.25, 0.5), mean_l0=(1, 2))], saes)
    running = daemon.status().running
    assert [(sae.name, sae.fvu) for sae in running.saes] == [("l3_8", 0.25), ("l3_9", 0.5)]
    page = document(daemon.status(), "r")
    assert all(f">{text}<" in page for text in ("Name", "l3_8", "l3_9", "0.250", "0.500"))


def test_a_file_far_from_a_card_is_told_until_the_next_one(daemon):
    found = Departure(SAES[0], "l0", "card", 300.0, 65.0)
    daemon.settle(Outcome("committed", "a.json", "u", Path("o"), rows=1, departures=(found,)))
    (alert,) = daemon.status().alerts
    message = "mean L0 300 at blocks.3.hook_resid_post, 65 on its card"
    assert (alert.level, alert.detail) == ("warning", f"a.json: {message}.")
    assert daemon.status().files[0].message == message
    daemon.settle(Outcome("committed", "b.json", "v", Path("o"), rows=1))
    assert daemon.status().alerts == ()


def test_a_status_survives_json(daemon):
    daemon.board.describe(INFO, 512)
    daemon.settle(Outcome("failed", "caf\udce9\n.json", reason="empty", message="m"))
    daemon.health.pause(["x"])
    daemon.run(30)
    status = daemon.status()
    assert from_json(to_json(status)) == status
    with pytest.raises(ValueError, match="version"):
        from_json(b'{"service": "lensd"}')


async def test_the_daemon_serves_the_page_and_all_that_it_needs(daemon):
    health = Health(FakeDevice(), stall_seconds=60.0)
    routes = status_routes(daemon.status)
    async with (
        serve_http("127.0.0.1:0", daemon.metrics.registry, health, routes) as url,
        aiohttp.ClientSession() as session,
    ):
        page = await session.get(url)
        text = await page.text()
        assert (page.status, page.content_type) == (200, "text/html")
        assert page.headers["Content-Security-Policy"].startswith("default-src 'none';")
        for path in re.findall(r'(?:src|href)="([^"]+)"', text):
            assert (await session.get(urljoin(f"{url}/", path))).status in (200, 503), path
        assert (await session.get(f"{url}/static/script.js")).content_type == "text/javascript"
        for path in ("/static/page.py", "/static/..%2fpage.py", "/static/", "/nothing"):
            assert (await session.get(url + path)).status == 404, path
        answer = await session.get(f"{url}/status.json")
        assert answer.content_type == "application/json"
        assert from_json(await answer.read()).instance == daemon.status().instance


class FakeDevice:
    busy_since: float | None = None
    alive = True


HOSTILE = [
    "<script>alert(1)</script>\"'&.json",
    "caf\udce9-\udcff\n\x1b[31m.json",
    "a\u202egnp.json",
    "</td><td>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_as_text(daemon, name):
    daemon.settle(Outcome("failed", name, reason="empty", message=f"{name}: no"))
    daemon.run(1)
    page = document(daemon.status(), "r")
    page.encode()  # lone surrogates would refuse
    harmless = re.sub(r"<!doctype html>|</?[a-z0-9]+( [a-zA-Z-]+(=\"[^\"<>]*\")?)*>", "", page)
    assert "<" not in harmless
    assert str(escape(escape_control(name))) in page
    assert page.count("<script") == 1
    assert not set(page) & {"\x1b", "\u202e", "\udce9"}


def test_the_page_needs_no_script_to_be_true(daemon):
    daemon.board.describe(INFO, 512)
    daemon.settle(
        Outcome(
            "committed", "study.json", "u", Path("o"), rows=1234, rejects=5, fvu=(0.25, None), seconds=12.5,
            stages=StageSeconds(write=3.0, commit=1.0),
        )
    )  # fmt: skip
    daemon.run(30)
    page = document(daemon.status(), "r")
    for shown in ("1,234 samples", "5 rejects", "study.json", "75.0%", "blocks.5.hook_resid_post", "0.250"):
        assert shown in page
    assert '<noscript><meta http-equiv="refresh" content="5"></noscript>' in page
    assert "style=" not in page
    assert not re.search(r" on[a-z]+=", page)


class Elements(HTMLParser):
    """The elements of a page in their order, each with the names of its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, list[str]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, [name for name, _ in attrs]))


def with_every_text(value: Any, text: str) -> Any:
    """A status in which every text is `text`, but for the state, which is one of a few words."""
    if dataclasses.is_dataclass(value):
        changed = {
            item.name: with_every_text(getattr(value, item.name), text)
            for item in dataclasses.fields(value)
            if item.name != "state"
        }
        return dataclasses.replace(value, **changed)
    if isinstance(value, tuple):
        return tuple(with_every_text(item, text) for item in value)
    return text if isinstance(value, str) else value


def test_every_text_of_a_status_is_escaped(daemon):
    stages = StageSeconds(write=1.0)
    daemon.board.describe(INFO, 512)
    daemon.settle(Outcome("committed", "a", "u", Path("o"), rows=1, stages=stages, fvu=(0.1, 0.2)))
    daemon.settle(Outcome("failed", "f.json", reason="empty", message="m"))
    daemon.run(30, samples=1)
    status = daemon.status()
    text = "'\"><i id=\"x\" title='y'>&</i></section>{{ 7 * 7 }}{% raw %}"
    page = document(with_every_text(status, text), text)
    assert Elements(page).found == Elements(document(with_every_text(status, "plain"), "plain")).found
    assert page.count(escape(text)) > 30
    assert text not in page


def test_a_line_breaks_where_nothing_is_known():
    assert runs([(30, 1.0), (25, None), (20, 2.0), (15, 3.0), (0, 4.0)], gap=10) == [
        [(30, 1.0)],
        [(20, 2.0), (15, 3.0)],
        [(0, 4.0)],
    ]
    drawn = line([(60, 0.0), (30, 5.0), (0, 10.0)], window=60, gap=60, top=10)
    assert drawn.stroke == "M0.0 100.0 L300.0 50.0 L600.0 0.0"
    assert drawn.area == "M0.0 100.0 L300.0 50.0 L600.0 0.0 L600.0 100 L0.0 100 Z"


def test_scales_end_in_round_numbers():
    assert [nice_ceiling(value) for value in (0, 0.3, 1, 1.1, 4, 9, 10, 10.5, 4321)] == [
        1, 1, 1, 2, 5, 10, 10, 20, 5000,
    ]  # fmt: skip


def test_numbers_read_well():
    assert [duration(x) for x in (0, 0.26, 3, 59, 75, 600, 3600, 7500, 90_000)] == [
        "0 s", "0.3 s", "3 s", "59 s", "1 min 15 s", "10 min", "1 h", "2 h 5 min", "1 d 1 h",
    ]  # fmt: skip
    assert [duration(x) for x in (59.7, 3599.6, 86_399.9)] == ["1 min", "1 h", "1 d"]
    assert [size(x) for x in (0, 1023, 1024, 150 * 1024, 3 << 40)] == [
        "0 bytes", "1023 bytes", "1.0 KiB", "150 KiB", "3.0 TiB",
    ]  # fmt: skip
    assert [rate(x) for x in (0, 0.123, 12.34, 1234.5)] == ["0", "0.12", "12.3", "1,234"]
    assert [ago(x) for x in (0, 7, 59, 61, 4000)] == [
        "just now",
        "5 s ago",
        "55 s ago",
        "1 min ago",
        "1 h ago",
    ]
