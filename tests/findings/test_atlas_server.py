"""The server of `lensd explore` answers only those who call it by its own address."""

from __future__ import annotations

from typing import Any

import pytest

from daemon.findings.atlas_server import answering_only


async def asked(kind: str, *hosts: bytes) -> list[dict[str, Any]]:
    """Return what the server sends to a request that names these hosts."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "the app's"})

    async def receive() -> dict[str, Any]:
        raise AssertionError("nothing is read of a request")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": kind, "headers": [(b"accept", b"*/*"), *((b"host", host) for host in hosts)]}
    await answering_only(app, "127.0.0.1", 5055)(scope, receive, send)
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("host", [b"127.0.0.1:5055", b"localhost:5055", b"LOCALHOST:5055"])
async def test_its_own_address_is_answered(kind: str, host: bytes) -> None:
    assert await asked(kind, host) == [{"type": "the app's"}]


@pytest.mark.parametrize(
    "hosts",
    [
        (b"evil.example",),
        (b"evil.example:5055",),
        (b"127.0.0.1:5055.evil.example",),
        (b"127.0.0.1",),
        (b"127.0.0.1:80",),
        (b"127.0.0.1:5055", b"evil.example"),
        (),
    ],
)
async def test_any_other_host_is_refused(hosts: tuple[bytes, ...]) -> None:
    first, *_ = await asked("http", *hosts)
    assert (first["type"], first["status"]) == ("http.response.start", 421)
    assert await asked("websocket", *hosts) == [{"type": "websocket.close", "code": 1008}]


async def test_what_is_no_request_passes() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent.append(scope["type"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    await answering_only(app, "127.0.0.1", 5055)({"type": "lifespan"}, nothing, nothing)
    assert sent == ["lifespan"]
