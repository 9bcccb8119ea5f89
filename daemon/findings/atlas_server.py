"""Runs embedding-atlas's command so that its server answers only those who call it by its own address.

A page of another site can have a browser ask loopback, by a name of its own that it lets point there (DNS
rebinding), and read the texts. Such a request names the other site as its host, and is refused.
"""

from __future__ import annotations

import importlib
import runpy
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

SAID = b"lensd explore answers at its own address alone\n"


def answering_only(app: App, host: str, port: int) -> App:
    """Return an ASGI application that refuses requests for any other host than this one or localhost."""
    known = {f"{name}:{port}".encode() for name in (host, "localhost")}

    async def answer(scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or hosts_of(scope) <= known:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 421, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": SAID})

    return answer


def hosts_of(scope: Message) -> set[bytes]:
    """Return every host that a request names, one that is empty where it names none."""
    return {value.lower() for name, value in scope["headers"] if name.lower() == b"host"} or {b""}


def main() -> None:
    """Run `embedding-atlas` with the arguments of this process."""
    uvicorn: Any = importlib.import_module("uvicorn")
    serve = uvicorn.run

    def run(app: App, *, host: str, port: int, **options: Any) -> None:
        serve(answering_only(app, host, port), host=host, port=port, **options)

    uvicorn.run = run
    runpy.run_module("embedding_atlas.cli", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
