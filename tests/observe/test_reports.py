"""The route of the pages of findings that lie in published folders."""

from __future__ import annotations

from pathlib import Path

import aiohttp
import pytest
from prometheus_client import CollectorRegistry
from yarl import URL

from daemon.observe.health import Health
from daemon.observe.http import serve_http
from daemon.observe.reports import report_path, report_routes
from daemon.records import Outcome

FOLDER = "a b%2F\u00fc-0123456789ab"


class Device:
    busy_since: float | None = None
    alive = True


@pytest.fixture
def outbox(tmp_path: Path) -> Path:
    outbox = tmp_path / "outbox"
    (outbox / FOLDER).mkdir(parents=True)
    (outbox / FOLDER / "report.html").write_text("<p>found</p>")
    (outbox / FOLDER / "metrics.parquet").write_text("PAR1")
    (outbox / ".staging").mkdir()
    (outbox / ".staging" / "report.html").write_text("half")
    (outbox / "linked-0123456789ab").mkdir()
    (outbox / "linked-0123456789ab" / "report.html").symlink_to(tmp_path / "secret")
    (tmp_path / "report.html").write_text("outside")
    (tmp_path / "secret").write_text("outside")
    return outbox


async def asked(outbox: Path, path: str, *, enabled: bool = True) -> tuple[int, str, str]:
    routes = report_routes(outbox, name="report.html", enabled=lambda: enabled)
    health = Health(Device(), stall_seconds=60.0, clock=lambda: 0.0)
    async with (
        serve_http("127.0.0.1:0", CollectorRegistry(), health, routes) as url,
        aiohttp.ClientSession() as session,
        session.get(URL(f"{url}/{path}", encoded=True)) as response,
    ):
        policy = response.headers.get("Content-Security-Policy", "")
        return response.status, await response.text(), policy


async def test_a_page_is_served_where_the_status_page_says_and_may_ask_for_nothing(outbox: Path) -> None:
    outcome = Outcome("committed", "a.json", folder=outbox / FOLDER, report="report.html")
    path = report_path(outcome)
    assert path is not None
    status, body, policy = await asked(outbox, path)
    assert (status, body) == (200, "<p>found</p>")
    assert "default-src 'none'" in policy
    assert "sandbox" in policy
    assert "connect-src" not in policy


async def test_nothing_is_served_unless_the_configuration_asks_for_pages(outbox: Path) -> None:
    outcome = Outcome("committed", "a.json", folder=outbox / FOLDER, report="report.html")
    path = report_path(outcome)
    assert path is not None
    assert (await asked(outbox, path, enabled=False))[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "reports/.staging/report.html",
        "reports/../report.html",
        "reports/%2E%2E/report.html",
        "reports/..%2F/report.html",
        "reports/%2E%2E%2Foutbox/report.html",
        "reports/none-0123456789ab/report.html",
        "reports/linked-0123456789ab/report.html",
        "reports/a%20b%252F%C3%BC-0123456789ab/metrics.parquet",
    ],
)
async def test_nothing_else_is_served(outbox: Path, path: str) -> None:
    assert (await asked(outbox, path))[0] == 404


def test_a_file_without_a_page_has_no_path(outbox: Path) -> None:
    assert report_path(Outcome("committed", "a.json", folder=outbox / FOLDER)) is None
    assert report_path(Outcome("failed", "a.json")) is None
