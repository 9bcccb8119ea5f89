"""Runs a server on a thread and an event loop of its own. Knows nothing about what is served."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from typing import TypeVar

import structlog

T = TypeVar("T")

log = structlog.get_logger()


@contextlib.asynccontextmanager
async def threaded_server(
    serving: Callable[[], contextlib.AbstractAsyncContextManager[T]],
) -> AsyncIterator[T]:
    """Enter `serving()` on another thread's event loop, and yield the value that it yields.

    The server keeps answering while the caller's loop stalls. Raises what `serving()` raises on entering.
    """
    entered: Future[tuple[T, asyncio.AbstractEventLoop, asyncio.Event]] = Future()

    async def serve() -> None:
        leave = asyncio.Event()
        async with serving() as value:
            entered.set_result((value, asyncio.get_running_loop(), leave))
            await leave.wait()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:
            if entered.done():
                log.exception("http.failed")
            else:
                entered.set_exception(error)

    thread = threading.Thread(target=run, name="http", daemon=True)
    thread.start()
    value, loop, leave = await asyncio.wrap_future(entered)
    try:
        yield value
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it failed
            loop.call_soon_threadsafe(leave.set)
        await asyncio.to_thread(thread.join)
