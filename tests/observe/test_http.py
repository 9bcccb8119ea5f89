from __future__ import annotations

import asyncio
import dataclasses

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter

from daemon.errors import ConfigError
from daemon.observe.health import HEARTBEAT_STALE_SECONDS, Health
from daemon.observe.http import serve_http


@dataclasses.dataclass
class FakeDevice:
    busy_since: float | None = None
    alive: bool = True


@dataclasses.dataclass
class FakeClock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def health(device, clock) -> Health:
    return Health(device, stall_seconds=60.0, clock=clock)


async def get(url: str) -> tuple[int, str, str]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        return response.status, response.headers["Content-Type"], await response.text()


async def test_metrics_come_in_prometheus_text(health):
    registry = CollectorRegistry()
    Counter("lensd_things", "Things.", registry=registry).inc(3)
    async with serve_http("127.0.0.1:0", registry, health) as url:
        status, content_type, body = await get(f"{url}/metrics")
    assert status == 200
    assert content_type.startswith("text/plain; version=")
    assert "lensd_things_total 3.0" in body


@pytest.mark.parametrize("line", [b"GET /" + b"a" * 20_000, b"GET / HTTP/9.z", b"nonsense"])
async def test_what_is_no_http_is_told_to_its_client_and_not_to_the_log(line, health, caplog):
    async with serve_http("127.0.0.1:0", CollectorRegistry(), health) as url:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(line + b"\r\n\r\n")
        answer = await reader.readline()
        writer.close()
        status, _, _ = await get(f"{url}/livez")
    assert b" 400 " in answer
    assert status == 200
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


async def test_an_error_of_its_own_is_logged(health, caplog):
    async def fails(_: web.Request) -> web.Response:
        raise RuntimeError("on purpose")

    async with serve_http("127.0.0.1:0", CollectorRegistry(), health, [web.get("/fails", fails)]) as url:
        status, _, _ = await get(f"{url}/fails")
    assert status == 500
    assert any("on purpose" in str(record.exc_info) for record in caplog.records)


async def test_head_is_answered_where_get_is(health):
    async with (
        serve_http("127.0.0.1:0", CollectorRegistry(), health) as url,
        aiohttp.ClientSession() as session,
    ):
        for path in ("/metrics", "/livez", "/readyz"):
            async with session.head(f"{url}{path}") as response:
                assert (response.status, await response.read()) == (200, b"")


async def test_ready_follows_what_is_unmet(health):
    async with serve_http("127.0.0.1:0", CollectorRegistry(), health) as url:
        health.require("loading the model")
        assert (await get(f"{url}/readyz"))[0] == 503
        assert "loading the model" in (await get(f"{url}/readyz"))[2]
        assert (await get(f"{url}/livez"))[0] == 200
        health.meet("loading the model")
        assert (await get(f"{url}/readyz"))[0] == 200


async def test_a_device_stuck_in_one_call_is_not_live(health, device, clock):
    async with serve_http("127.0.0.1:0", CollectorRegistry(), health) as url:
        device.busy_since = clock.now
        clock.now += 59
        health.beat()
        assert (await get(f"{url}/livez"))[0] == 200
        clock.now += 2
        health.beat()
        status, _, body = await get(f"{url}/livez")
        assert status == 503
        assert "device busy on one call for 61 s" in body


async def test_a_stalled_event_loop_is_not_live(health, clock):
    clock.now += HEARTBEAT_STALE_SECONDS + 1
    assert health.stalled() == ["event loop stalled for 16 s"]
    health.beat()
    assert health.stalled() == []


async def test_a_taken_address_is_one_clear_line(health):
    async with serve_http("127.0.0.1:0", CollectorRegistry(), health) as url:
        address = url.removeprefix("http://")
        with pytest.raises(ConfigError, match=f"http.address = {address}: can't listen there"):
            async with serve_http(address, CollectorRegistry(), health):
                pass
