"""The status page behind a reverse proxy, under prefixes of its own: a real nginx, a real Chromium."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urljoin

import aiohttp
import pytest

from daemon.observe.http import serve_http
from daemon.observe.page import status_routes
from daemon.observe.threaded_server import threaded_server
from tests.observe.browser import CHROMIUM, Page, chromium, tab
from tests.observe.test_status import INFO, Daemon

NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
SCREENSHOTS = os.environ.get("LENSD_SCREENSHOTS")
PATIENCE = 60.0

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian: nginx-light)"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]

CONFIGURATION = """
daemon off;
pid {folder}/pid;
error_log stderr;
events {{}}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location = / {{ return 200 "the proxy's own page"; }}
        location /lensd/ {{ proxy_pass {upstream}/; }}
        location /machines/gpu-2/lensd/ {{ proxy_pass {upstream}/; }}
        location /bare {{ proxy_pass {upstream}/; }}
        location / {{ return 404; }}
    }}
}}
"""
# As people type them. `/bare` reaches the daemon as `/`, and `/bare/x` as `//x`.
ADDRESSES = [
    "/lensd/",
    "/lensd",
    "/machines/gpu-2/lensd/",
    "/machines/gpu-2/lensd",
    "/bare",
    "/bare/",
    "/lensd/?a=b",
]


@pytest.fixture
def daemon() -> Daemon:
    daemon = Daemon()
    daemon.board.describe(INFO, 4096)
    daemon.run(20, samples=3, tokens=30)
    return daemon


@pytest.fixture
async def upstream(daemon) -> AsyncIterator[str]:
    routes = status_routes(daemon.status)
    async with threaded_server(
        lambda: serve_http("127.0.0.1:0", daemon.metrics.registry, daemon.health, routes)
    ) as url:
        yield url


@pytest.fixture
def proxy(upstream, tmp_path) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    text = CONFIGURATION.format(folder=tmp_path, port=port, upstream=upstream)
    (tmp_path / "nginx.conf").write_text(text)
    command = [NGINX, "-c", tmp_path / "nginx.conf", "-p", tmp_path, "-e", "stderr"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stderr=log)
    try:
        limit = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < limit, "nginx did not start"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def devtools(tmp_path_factory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def page(devtools) -> AsyncIterator[Page]:
    async with tab(devtools) as page:
        await page.show()
        yield page


@pytest.mark.parametrize("address", ADDRESSES)
async def test_it_is_styled_and_live_under_any_prefix(daemon, proxy, page, address):
    await page.goto(proxy + address)
    await page.until("location.pathname.endsWith('/')")
    await page.until("document.readyState === 'complete' && document.querySelector('main') != null")
    await page.until("[...document.styleSheets].some((sheet) => sheet.cssRules.length > 20)")
    await page.value("window.kept = true")
    daemon.board.refuse_settings("told while the page was open")
    await page.until("document.body.innerText.includes('told while the page was open')")
    assert await page.value("window.kept")
    assert await page.value("document.getElementById('silence').hidden")
    links = await page.value("[...document.querySelectorAll('a, link')].map((link) => link.href)")
    assert len(links) >= 6
    async with aiohttp.ClientSession() as session:
        for link in links:
            async with session.get(link) as answer:
                assert answer.status == 200, link
                assert answer.headers["Content-Type"].partition(";")[0] != "application/octet-stream"
    prefix = proxy + address.partition("?")[0].rstrip("/") + "/"
    elsewhere = {url for url in page.requests if not url.startswith(prefix)} - {proxy + address}
    if address == "/bare":  # the browser looks ahead of the line that adds the slash
        elsewhere -= {f"{proxy}/static/{name}" for name in ("style.css", "script.js")}
    assert elsewhere == set()
    if SCREENSHOTS:
        name = address.strip("/").replace("/", "-").replace("?", "-")
        await page.screenshot(Path(SCREENSHOTS) / f"proxy-{name}.png")


async def test_it_is_readable_without_a_script(proxy, page):
    await page.show(script=False)
    await page.tell("Page.navigate", url=f"{proxy}/lensd")
    async with aiohttp.ClientSession() as session, session.get(f"{proxy}/lensd") as answer:
        assert str(answer.url).endswith("/lensd/")
        text = await answer.text()
        assert '<noscript><meta http-equiv="refresh"' in text
        assert urljoin(str(answer.url), "static/style.css") == f"{proxy}/lensd/static/style.css"


async def test_a_daemon_that_is_gone_is_said_not_to_answer(daemon, proxy, page):
    """The page does not take the proxy's answer for the daemon's."""
    await page.goto(f"{proxy}/lensd/")
    daemon.board.status = lambda _: 1 / 0
    await page.until("document.body.innerText.includes('lensd does not answer')")
    del daemon.board.status
    await page.until("!document.body.innerText.includes('lensd does not answer')")


async def test_every_endpoint_takes_the_slashes_that_a_proxy_adds(upstream):
    async with aiohttp.ClientSession() as session:
        for path in ("/", "/metrics", "/livez", "/readyz", "/status.json", "/static/style.css"):
            async with session.get(f"{upstream}{path}") as plain:
                kind = plain.content_type
            for more in ("/", "//"):
                async with session.get(f"{upstream}{more}{path}") as answer:
                    assert (answer.status, answer.content_type) == (200, kind), more + path
        async with session.get(f"{upstream}//nothing") as answer:
            assert answer.status == 404


def test_no_file_that_is_served_names_a_path_of_the_root():
    static = Path(status_routes.__globals__["STATIC"])
    for file in (*static.iterdir(), *static.with_name("templates").iterdir()):
        text = file.read_text(encoding="utf-8")
        for root in ('fetch("/', "url(/", 'url("/', 'href="/', 'src="/'):
            assert root not in text, (file.name, root)
