"""The end of the HTTP server, whatever its clients do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from daemon.observe.health import Health
from daemon.observe.http import SHUTDOWN_SECONDS, serve_http
from daemon.observe.threaded_server import threaded_server
from tests.observe.test_http import FakeDevice, get

ANSWER_BYTES = 4 << 20
ASK = b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n"
PATIENCE = 5 * SHUTDOWN_SECONDS + 20  # of a loaded machine; a time-out of aiohttp's own took 120 s


async def large(_: web.Request) -> web.Response:
    return web.Response(body=bytes(ANSWER_BYTES))


@contextlib.asynccontextmanager
async def client(url: str, send: bytes) -> AsyncIterator[socket.socket]:
    """A connection that sends and then reads nothing by itself."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    loop = asyncio.get_running_loop()
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.setblocking(False)
        await loop.sock_connect(one, (host, int(port)))
        if send:
            await loop.sock_sendall(one, send)
        yield one


async def begun(one: socket.socket) -> None:
    """Wait until an answer has begun to come."""
    loop = asyncio.get_running_loop()
    while not await loop.sock_recv(one, 1):
        await asyncio.sleep(0)


async def one_answer(one: socket.socket) -> None:
    """Read an answer of /livez to its end; the connection stays open."""
    loop, read = asyncio.get_running_loop(), b""
    while b"\r\n\r\n" not in read or not read.endswith(b"}\n"):
        read += await loop.sock_recv(one, 4096)


async def nothing(_: socket.socket) -> None:
    pass


CLIENTS: dict[str, tuple[bytes, Callable[[socket.socket], object]]] = {
    "silent": (b"", nothing),
    "half a request": (b"GET /large HT", nothing),
    "half a body": (b"POST /large HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", nothing),
    "kept alive": (ASK.replace(b"large", b"livez"), one_answer),
    "does not read": (ASK, begun),
    "does not read what it pipelined": (50 * ASK, begun),
}


@pytest.mark.parametrize("kind", CLIENTS)
async def test_the_server_ends_within_its_own_time_out(kind):
    send, prepare = CLIENTS[kind]
    health = Health(FakeDevice(), stall_seconds=60.0)
    routes = [web.get("/large", large)]
    async with asyncio.timeout(PATIENCE):
        async with threaded_server(
            lambda: serve_http("127.0.0.1:0", CollectorRegistry(), health, routes)
        ) as url:
            clients = contextlib.AsyncExitStack()
            connections = [await clients.enter_async_context(client(url, send)) for _ in range(3)]
            for one in connections:
                await prepare(one)
            await get(f"{url}/livez")  # so the connections before this one are accepted
        loop = asyncio.get_running_loop()
        for one in connections:  # closed by the server: the rest of what was on its way, then the end
            with contextlib.suppress(ConnectionResetError):
                while await loop.sock_recv(one, 1 << 16):
                    pass
        await clients.aclose()


async def test_a_request_under_way_is_answered_before_the_end():
    entered, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_: web.Request) -> web.Response:
        entered.set()
        await go_on.wait()
        return web.Response(text="all of it")

    health = Health(FakeDevice(), stall_seconds=60.0)
    async with serve_http("127.0.0.1:0", CollectorRegistry(), health, [web.get("/slow", slow)]) as url:
        connection = client(url, ASK.replace(b"large", b"slow"))
        one = await connection.__aenter__()
        await entered.wait()
        asyncio.get_running_loop().call_later(0, go_on.set)
    read = b""
    while piece := await asyncio.get_running_loop().sock_recv(one, 4096):
        read += piece
    assert read.endswith(b"all of it")
    await connection.__aexit__(None, None, None)
