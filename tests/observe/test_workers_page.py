"""Workers on the page and in the terminal: what an executor says of them, and nothing where it has none."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console

from daemon.model_info import ModelInfo, SaeInfo
from daemon.observe.board import StatusBoard
from daemon.observe.health import Health
from daemon.observe.http import serve_http
from daemon.observe.metrics import Metrics
from daemon.observe.page import document, status_routes
from daemon.observe.progress import Progress
from daemon.observe.snapshot import Snapshot
from daemon.observe.status import Status, from_json, to_json
from daemon.observe.summary import MOST_ROWS, WORST_ROWS, worker_rows
from daemon.observe.worker_board import MISSING_SECONDS
from daemon.records import WorkerLoad
from daemon.tools.status import print_status
from tests.observe.browser import CHROMIUM, Page, chromium, tab

# Names of facts that do not fit their column.
CUT = """
Array.from(document.querySelectorAll("dt")).filter((dt) => dt.scrollWidth > dt.clientWidth)
  .map((dt) => dt.innerText)
"""

HOOK = "blocks.7.hook_resid_post"
SAE = SaeInfo(HOOK, HOOK, 7, 576, 2304, 576, "jumprelu", HOOK, "h")
INFO = ModelInfo("SmolLM2-135M", "LlamaForCausalLM", 576, 30, "float32", "cpu", "packed", None, (SAE,))


class FakeDevice:
    busy_since: float | None = None
    alive = True


class Daemon:
    """A board that is told of workers, by a clock that goes when it is told to."""

    def __init__(self, executor: str = "ray", workers: int = 0) -> None:
        self.now = 1000.0
        self.wanted = workers
        self.loads = [WorkerLoad(number, "ready", f"node-{number // 8}") for number in range(workers)]
        self.metrics = Metrics(CollectorRegistry())
        self.health = Health(FakeDevice(), stall_seconds=60.0)
        progress = Progress(Console(quiet=True), clock=self.clock)
        self.board = StatusBoard(
            inbox=Path("/in"),
            outbox=Path("/out"),
            executor=executor,
            metrics=self.metrics,
            progress=progress,
            clock=self.clock,
            wall_clock=lambda: 1_700_000_000.0 + self.now,
        )
        self.board.describe(INFO, 4096)

    def clock(self) -> float:
        return self.now

    def change(self, number: int, **changes: object) -> None:
        before = self.loads[number]
        fields = {name: getattr(before, name) for name in before.__slots__}
        self.loads[number] = WorkerLoad(**{**fields, **changes})  # type: ignore[arg-type]

    def run(self, seconds: int, *, coordinator: float = 0.0) -> None:
        """So many seconds, in each of which worker n computes n + 1 samples, busy for half of the time."""
        for _ in range(seconds):
            self.now += 1.0
            for number, load in enumerate(self.loads):
                if load.state == "ready":
                    self.change(
                        number,
                        batches=load.batches + 1,
                        samples=load.samples + number + 1,
                        busy_seconds=load.busy_seconds + 0.5,
                        memory_bytes=3 << 30,
                    )
            snapshot = Snapshot(
                device_alive=True,
                device_busy_seconds=0.0,
                coordinator_seconds=coordinator * self.now,
                done=0,
                total=0,
                rate=0.0,
                slots=2 * self.wanted,
                batches_in_flight=len(self.loads),
                workers_wanted=self.wanted,
                workers=tuple(self.loads),
            )
            self.metrics.observe_snapshot(snapshot, None, self.now)
            self.board.look(None, None, ready=True, workers=snapshot.workers)

    def status(self) -> Status:
        return self.board.status(self.health)


def terminal(status: Status, width: int = 120) -> str:
    screen = io.StringIO()
    print_status(Console(file=screen, width=width), status)
    return screen.getvalue()


def troubled(workers: int) -> Daemon:
    """Workers of which one starts, one was lost twice, and one waits for a place."""
    daemon = Daemon(workers=workers)
    daemon.run(70, coordinator=0.42)
    daemon.change(0, restarts=2)
    daemon.change(workers // 2, state="starting")
    daemon.change(workers - 1, state="starting", node="", memory_bytes=0)
    daemon.run(10, coordinator=0.42)
    return daemon


def test_rates_and_shares_are_those_of_the_last_minute():
    daemon = Daemon(workers=3)
    daemon.run(100, coordinator=0.25)
    workers = daemon.status().workers
    assert [row.samples_per_second for row in workers.rows] == [1.0, 2.0, 3.0]
    assert [row.busy_ratio for row in workers.rows] == [0.5] * 3
    assert [(row.batches, row.samples) for row in workers.rows] == [(100, 100), (100, 200), (100, 300)]
    assert workers.coordinator_busy_ratio == 0.25
    assert (workers.wanted, workers.slots, workers.batches_in_flight) == (3, 6, 3)
    daemon.loads = [WorkerLoad(0, "draining", "node-0", samples=100, batches=100)]
    daemon.run(70)
    (row,) = daemon.status().workers.rows
    assert (row.state, row.samples_per_second, row.busy_ratio) == ("draining", 0.0, 0.0)


def test_a_worker_that_comes_back_under_its_number_begins_anew():
    daemon = Daemon(workers=1)
    daemon.run(30)
    daemon.loads = []
    daemon.run(1)
    assert daemon.status().workers.rows == ()
    assert daemon.metrics.registry.get_sample_value("lensd_worker_memory_bytes", {"worker": "0"}) is None
    daemon.loads = [WorkerLoad(0, "ready", "node-1")]
    daemon.run(10)
    assert [row.samples_per_second for row in daemon.status().workers.rows] == [1.0]


def test_workers_that_are_missing_are_an_alert_after_a_while():
    daemon = Daemon(workers=2)
    daemon.change(1, state="starting")
    daemon.run(int(MISSING_SECONDS) - 1)
    assert daemon.status().alerts == ()
    daemon.run(1)
    (alert,) = daemon.status().alerts
    assert (alert.level, alert.title) == ("warning", "Workers missing")
    assert alert.detail == "1 of 2 are ready, for 2 min now."
    daemon.change(1, state="ready")
    daemon.run(1)
    assert daemon.status().alerts == ()


def test_nothing_is_said_of_workers_where_the_daemon_computes_itself():
    daemon = Daemon("local")
    daemon.run(5)
    status = daemon.status()
    assert "workers" not in json.loads(to_json(status))
    assert from_json(to_json(status)) == status
    for shown in (document(status, "r"), terminal(status)):
        assert "orker" not in shown
        assert "Device busy" in shown


def test_page_and_terminal_show_each_worker():
    daemon = troubled(8)
    status = daemon.status()
    assert from_json(to_json(status)) == status
    page, lines = document(status, "r"), terminal(status)
    assert page.count('<th scope="row" role="rowheader"><span class="worker">') == 8
    for shown in (
        "1.00 to 7.00 samples/s, 42% to 50% busy",
        "6 of 8 ready, 2 starting",
        "8 under way, room for 16",
        "42% of a core",
        "SmolLM2",
    ):
        assert shown in page
        assert shown in lines
    assert "2 restarts" in lines
    assert "6 of 8 workers ready" in lines.replace("\n", " ")


def test_of_very_many_workers_the_worst_are_shown():
    daemon = troubled(MOST_ROWS + 36)
    status = daemon.status()
    worst = worker_rows(status.workers)
    assert len(worst) == WORST_ROWS
    assert [row.number for row in worst[:3]] == [50, 99, 0]  # two that start, then one that was lost twice
    assert [row.number for row in worst[3:6]] == [1, 2, 3]  # then the slowest
    assert len(status.workers.rows) == MOST_ROWS + 36
    assert "The 16 that do worst, of 100." in document(status, "r")
    assert "The 16 that do worst, of 100." in terminal(status)
    assert len(worker_rows(troubled(MOST_ROWS).status().workers)) == MOST_ROWS


def test_before_the_first_worker_there_is_a_place_for_them():
    assert "No worker was started yet." in document(Daemon().status(), "r")
    assert "0 of 0 ready" in terminal(Daemon().status())


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def page(devtools: str) -> AsyncIterator[Page]:
    async with tab(devtools) as page:
        await page.show()
        yield page


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 8, 64])
async def test_the_table_fits_a_desk_and_a_phone(page, workers, tmp_path):
    daemon = troubled(workers)
    routes = status_routes(daemon.status)
    async with serve_http("127.0.0.1:0", daemon.metrics.registry, daemon.health, routes) as url:
        await page.goto(url)
        for width in (1400, 390):
            for dark in (False, True):
                await page.show(width, 900, dark=dark)
                assert await page.value("document.documentElement.scrollWidth") == width
                assert await page.value("document.querySelectorAll('#workers tbody tr').length") == workers
                assert await page.value(CUT) == []
    assert page.complaints == []


@pytest.mark.slow
async def test_a_page_follows_a_daemon_that_gets_workers(page):
    statuses = [Daemon("local").status(), troubled(4).status()]
    daemon = Daemon()
    routes = status_routes(lambda: statuses[0])
    async with serve_http("127.0.0.1:0", daemon.metrics.registry, daemon.health, routes) as url:
        await page.goto(url)
        assert await page.value("document.querySelector('#workers') === null")
        statuses.pop(0)
        await page.until("document.querySelectorAll('#workers tbody tr').length === 4")
        assert not await page.value("document.body.innerText.includes('does not answer')")
    assert page.complaints == []
