"""The HTTP face: `/metrics` for Prometheus, `/livez` and `/readyz` for supervisors, and routes it is given.

Knows nothing about files or models; health is told to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
from collections.abc import AsyncIterator, Iterable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from daemon.observe.health import Health
from daemon.observe.listening import listen

server_log = logging.getLogger("daemon.observe.http")
SHUTDOWN_SECONDS = 1.0  # for requests under way to end, and then for their handlers: twice at most


def application(
    registry: CollectorRegistry, health: Health, routes: Iterable[web.RouteDef] = ()
) -> web.Application:
    async def metrics(request: web.Request) -> web.Response:
        return exposition(request, registry)

    async def livez(_: web.Request) -> web.Response:
        return verdict(health.stalled())

    async def readyz(_: web.Request) -> web.Response:
        return verdict(health.unmet())

    app = web.Application()
    own = (web.get("/metrics", metrics), web.get("/livez", livez), web.get("/readyz", readyz))
    app.add_routes(
        web.RouteDef(route.method, after_slashes(route.path), route.handler, route.kwargs)
        for route in (*own, *routes)
    )
    return app


def after_slashes(path: str) -> str:
    """The same path after any number of slashes: proxies that take a prefix away may leave its last one."""
    return f"/{{slashes:/*}}{path.removeprefix('/')}"


def exposition(request: web.Request, registry: CollectorRegistry) -> web.Response:
    """The metrics as prometheus_client gives them: format, compression and choice by the request."""
    try:
        encode, content_type = choose_encoder(",".join(request.headers.getall("Accept", [])))
    except (TypeError, ValueError):  # a version that is no number
        encode, content_type = choose_encoder("")
    names = request.query.getall("name[]", [])
    body = encode(registry.restricted_registry(names) if names else registry)
    headers = {"Content-Type": content_type, "Vary": "Accept, Accept-Encoding"}
    if gzip_accepted(",".join(request.headers.getall("Accept-Encoding", []))):
        headers["Content-Encoding"] = "gzip"
        body = gzip.compress(body, compresslevel=6)
    return web.Response(body=body, headers=headers)


def verdict(reasons: list[str]) -> web.Response:
    """200 without reasons, else 503 with them."""
    body = json.dumps({"ok": not reasons, "reasons": reasons}) + "\n"
    return web.Response(text=body, status=503 if reasons else 200, content_type="application/json")


@contextlib.asynccontextmanager
async def serve_http(
    address: str, registry: CollectorRegistry, health: Health, routes: Iterable[web.RouteDef] = ()
) -> AsyncIterator[str]:
    """Serve on `address` (HOST:PORT; port 0 takes a free one) within the context; gives the base URL.

    `routes` come besides `/metrics`, `/livez` and `/readyz`. At the end connections are closed, whatever
    their clients do; answers under way have SHUTDOWN_SECONDS.

    Raises ConfigError or MachineError where the address can't be had.
    """
    host = address.rpartition(":")[0]
    app = application(registry, health, routes)
    server_log.addFilter(is_ours)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_SECONDS, logger=server_log)
    await runner.setup()
    try:
        sockets = await listen(address)
        for listening in sockets:
            await web.SockSite(runner, listening).start()
        yield f"http://{host}:{sockets[0].getsockname()[1]}"
    finally:
        await close(runner)


def is_ours(record: logging.LogRecord) -> bool:
    """Whether an error is worth a line: a request that is no HTTP is its client's, who is told."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


async def close(runner: web.AppRunner) -> None:
    """End every connection, those too whose client does not read what it asked for."""
    for site in runner.sites:
        await site.stop()
    await asyncio.sleep(0)  # what was accepted last becomes a connection
    server = runner.server
    transports = [] if server is None else [connection.transport for connection in server.connections]
    await runner.cleanup()
    for transport in transports:
        if transport is not None:
            transport.abort()
