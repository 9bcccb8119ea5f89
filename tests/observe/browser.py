"""A real headless Chromium, driven over its DevTools protocol: one process, a page for each test."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PATIENCE = 60.0  # seconds before a wait on a condition gives up


@contextlib.contextmanager
def chromium(folder: Path) -> Iterator[str]:
    """A running Chromium with its profile in `folder`; gives the address of its DevTools."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--remote-debugging-port=0", f"--user-data-dir={folder}"]
    command += ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--hide-scrollbars"]
    command += ["--no-proxy-server", "--disable-dev-shm-usage"]
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # Chromium refuses to sandbox itself as root
    process = subprocess.Popen(
        [*command, "about:blank"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = folder / "DevToolsActivePort"
        limit = time.monotonic() + PATIENCE
        while not port_file.exists() or len(port_file.read_text().splitlines()) < 2:
            assert process.poll() is None, "chromium ended"
            assert time.monotonic() < limit, "chromium did not start"
            time.sleep(0.05)
        port, path = port_file.read_text().splitlines()
        yield f"ws://127.0.0.1:{port}{path}"
    finally:
        process.terminate()
        process.wait()


class Page:
    """One tab. `requests` and `complaints` (console errors, exceptions, violations) grow as they come."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._socket = socket
        self._session: str | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def listen(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._answers.pop(event["id"]).set_result(event)
            elif event.get("sessionId") == self._session:
                self._note(event["method"], event["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(params["entry"]["text"])

    async def tell(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._answers[number] = answer = asyncio.get_running_loop().create_future()
        session = {"sessionId": self._session} if self._session else {}
        await self._socket.send_json({"id": number, "method": method, "params": params, **session})
        reply = await asyncio.wait_for(answer, PATIENCE)
        assert "error" not in reply, (method, reply)
        result: dict[str, Any] = reply["result"]
        return result

    async def attach(self) -> None:
        context = (await self.tell("Target.createBrowserContext"))["browserContextId"]
        target = await self.tell("Target.createTarget", url="about:blank", browserContextId=context)
        attached = await self.tell("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.tell(f"{domain}.enable")

    async def show(
        self, width: int = 1200, height: int = 900, *, dark: bool = False, script: bool = True
    ) -> None:
        """Take the size of a screen, the colours its user prefers, and whether scripts run."""
        await self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.tell("Emulation.setEmulatedMedia", features=[scheme])
        await self.tell("Emulation.setScriptExecutionDisabled", value=not script)

    async def goto(self, url: str) -> None:
        await self.tell("Page.navigate", url=url)
        await self.until("document.readyState == 'complete' && document.querySelector('main') != null")

    async def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON."""
        reply = await self.tell(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in reply, (expression, reply["exceptionDetails"])
        return reply["result"].get("value")

    async def text(self, selector: str) -> str:
        """The text that a reader sees there."""
        return str(await self.value(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    async def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        limit = time.monotonic() + PATIENCE
        while not await self.value(f"!!({expression})"):
            assert time.monotonic() < limit, f"waited in vain for {expression}"
            await asyncio.sleep(0.05)

    async def screenshot(self, path: Path) -> Path:
        """The whole page, as long as it is."""
        size = (await self.tell("Page.getLayoutMetrics"))["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = await self.tell("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@contextlib.asynccontextmanager
async def tab(devtools: str) -> AsyncIterator[Page]:
    """A fresh tab with nothing of any other's in it."""
    async with (
        aiohttp.ClientSession() as session,
        session.ws_connect(devtools, max_msg_size=1 << 26, heartbeat=None) as socket,
    ):
        page = Page(socket)
        listening = asyncio.create_task(page.listen())
        try:
            await page.attach()
            yield page
        finally:
            listening.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await listening
