"""The HTTP face: `/metrics` for Prometheus, `/livez` and `/readyz` for supervisors, and routes it is given.

Knows nothing about files or models; health is told to it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterable

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from daemon.errors import ConfigError
from daemon.observe.health import Health


def application(
    registry: CollectorRegistry, health: Health, routes: Iterable[web.RouteDef] = ()
) -> web.Application:
    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def livez(_: web.Request) -> web.Response:
        return verdict(health.stalled())

    async def readyz(_: web.Request) -> web.Response:
        return verdict(sorted(health.unmet))

    app = web.Application()
    app.router.add_get("/metrics", metrics)
    app.router.add_get("/livez", livez)
    app.router.add_get("/readyz", readyz)
    app.router.add_routes(routes)
    return app


def verdict(reasons: list[str]) -> web.Response:
    """200 without reasons, else 503 with them."""
    body = json.dumps({"ok": not reasons, "reasons": reasons}) + "\n"
    return web.Response(text=body, status=503 if reasons else 200, content_type="application/json")


@contextlib.asynccontextmanager
async def serve_http(
    address: str, registry: CollectorRegistry, health: Health, routes: Iterable[web.RouteDef] = ()
) -> AsyncIterator[str]:
    """Serve on `address` (HOST:PORT; port 0 takes a free one) within the context; gives the base URL.

    `routes` come besides `/metrics`, `/livez` and `/readyz`.

    Raises ConfigError where the address can't be had.
    """
    host, _, port = address.rpartition(":")
    runner = web.AppRunner(application(registry, health, routes), access_log=None)
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
