"""The HTTP face: `/metrics` for Prometheus, `/livez` and `/readyz` for supervisors.

Knows nothing about files or models; health is told to it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from typing import Protocol

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from daemon.errors import ConfigError

HEARTBEAT_STALE_SECONDS = 15.0
LOADING = "loading the model"  # while it is unmet, one call may take as long as it takes


class Busy(Protocol):
    """What is asked of the device: since when it has been at one call, None while idle."""

    @property
    def busy_since(self) -> float | None: ...


class Health:
    """Whether the daemon is alive and ready; written by the service, read by the endpoints.

    `unmet` holds what readiness still waits for, in words. A device busy on one call for more than
    `stall_seconds` is stalled, except while LOADING is unmet.
    """

    def __init__(
        self, device: Busy, *, stall_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.unmet: set[str] = set()
        self._device = device
        self._stall_seconds = stall_seconds
        self._clock = clock
        self._beat = clock()

    def beat(self) -> None:
        """The event loop is running."""
        self._beat = self._clock()

    def stalled(self) -> list[str]:
        """What makes no progress; empty while all is well."""
        now = self._clock()
        reasons = []
        if now - self._beat > HEARTBEAT_STALE_SECONDS:
            reasons.append(f"event loop stalled for {now - self._beat:.0f} s")
        since = self._device.busy_since
        if LOADING in self.unmet or since is None:
            return reasons
        if now - since > self._stall_seconds:
            reasons.append(f"device busy on one call for {now - since:.0f} s")
        return reasons


def application(registry: CollectorRegistry, health: Health) -> web.Application:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return verdict(health.stalled())

    async def readyz(_: web.Request) -> web.Response:
        return verdict(sorted(health.unmet))

    async def index(_: web.Request) -> web.Response:
        endpoints = ["/metrics", "/livez", "/readyz"]
        return web.json_response({"service": "lensd", "version": version("lensd"), "endpoints": endpoints})

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/", index)
    return app


def verdict(reasons: list[str]) -> web.Response:
    """200 without reasons, else 503 with them."""
    body = json.dumps({"ok": not reasons, "reasons": reasons}) + "\n"
    return web.Response(text=body, status=503 if reasons else 200, content_type="application/json")


@contextlib.asynccontextmanager
async def serve_http(address: str, registry: CollectorRegistry, health: Health) -> AsyncIterator[str]:
    """Serve on `address` (HOST:PORT; port 0 takes a free one) within the context; gives the base URL.

    Raises ConfigError where the address can't be had.
    """
    host, _, port = address.rpartition(":")
    runner = web.AppRunner(application(registry, health), access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host.strip("[]"), int(port))
        try:
            await site.start()
        except OSError as error:
            raise ConfigError(
                f"http.address = {address}: can't listen there ({error.strerror}):"
                " choose another with --http HOST:PORT, or --no-http"
            ) from None
        bound = runner.addresses[0][1]
        yield f"http://{host}:{bound}"
    finally:
        await runner.cleanup()
