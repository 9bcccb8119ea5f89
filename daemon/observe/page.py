"""The status page: `/` as HTML that needs no script, `/status.json`, and the page's own style and script.

The server draws everything. The script fetches the page again now and then and puts in what changed, so there
is one rendering, and one place where what others wrote (file names) is escaped. Every address in it is
relative, so that it works under any prefix that a reverse proxy takes away. Knows the status, no more.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from daemon.observe.markup import Html, tag
from daemon.observe.sections import SECTIONS, announcement, footer, header
from daemon.observe.status import HEALTHY, Status, to_json

STATIC = Path(__file__).parent / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
REFRESH_SECONDS = 5  # where scripts are off

SCRIPT = "script.js"


def status_headers(script: str) -> dict[str, str]:
    """Of everything that is served. The browser runs this one script and loads what the daemon serves."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
        f" script-src-elem 'sha256-{digest}'",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


@functools.cache
def page_script() -> str:
    return (STATIC / SCRIPT).read_text(encoding="utf-8")


def status_routes(status: Callable[[], Status]) -> list[web.RouteDef]:
    """The page's routes; `status` is asked at each request."""
    files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}
    revision = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
    headers = status_headers(page_script())

    async def index(_: web.Request) -> web.Response:
        text = document(status(), revision)
        return web.Response(text=text, content_type="text/html", charset="utf-8", headers=headers)

    async def as_json(_: web.Request) -> web.Response:
        return web.Response(body=to_json(status()), content_type="application/json", headers=headers)

    async def static(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in files:
            raise web.HTTPNotFound
        content_type = TYPES[Path(name).suffix]
        return web.Response(body=files[name], content_type=content_type, charset="utf-8", headers=headers)

    return [
        web.get("/", index),
        web.get("/status.json", as_json),
        web.get("/static/{name}", static),
    ]


def document(status: Status, revision: str) -> str:
    """The whole page. `revision` names the style and script that belong to it."""
    return "<!doctype html>\n" + tag(
        "html",
        head(status),
        tag(
            "body",
            tag("p", id="silence", role="alert", hidden=True),
            header(status),
            announcement(status),
            tag("main", *(section(status) for section in SECTIONS)),
            footer(),
            tag(
                "script", Html(page_script())
            ),  # inline: without a slash at its end a prefix has no other files
        ),
        lang="en",
        data_revision=revision,
        data_instance=status.instance,
    )


def head(status: Status) -> Html:
    grave = sum(alert.level != "note" for alert in status.alerts)
    count = f"({grave}) " if grave else ""
    icon = "icon.svg" if status.state in HEALTHY and not grave else "icon-alert.svg"
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("title", f"{count}{status.state} · lensd {status.host}"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href=f"static/{icon}"),
        tag("link", rel="stylesheet", href="static/style.css"),
        tag("noscript", tag("meta", http_equiv="refresh", content=REFRESH_SECONDS)),
    )
