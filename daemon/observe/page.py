"""The status page: `/` as HTML that needs no script, `/status.json`, and the page's own style and script.

The server renders everything from `templates/`, which escape every value: file names, for one, are written by
others. The script fetches the page again now and then and replaces the parts that changed. Every address is
relative, so that the page works under any prefix that a reverse proxy removes. Knows the status only.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path

from aiohttp import web
from jinja2 import Environment, PackageLoader, StrictUndefined

from daemon.observe import charts, formatting, sections, summary
from daemon.observe.status import Status, to_json

STATIC = Path(__file__).parent / "static"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
REFRESH_SECONDS = 5  # where scripts are off

SCRIPT = "script.js"


def status_headers(script: str) -> dict[str, str]:
    """Return every response's headers: a browser runs this one script and loads from the daemon only."""
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


@functools.cache
def environment() -> Environment:
    """Return the templates' environment, in which every value is escaped and a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("daemon.observe"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.globals.update(charts=charts, formatting=formatting, sections=sections, summary=summary)
    for name in environment.list_templates():  # before an upgrade replaces the files under a running daemon
        environment.get_template(name)
    return environment


def status_routes(status: Callable[[], Status]) -> list[web.RouteDef]:
    """Return the page's routes; each request calls `status`."""
    files = {path.name: path.read_bytes() for path in sorted(STATIC.iterdir()) if path.suffix in TYPES}
    revision = hashlib.sha256(b"".join(files.values())).hexdigest()[:12]
    headers = status_headers(page_script())
    environment()

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
    """Return the whole page. `revision` names the style and script that belong to it."""
    template = environment().get_template("page.html")
    return template.render(
        status=status,
        revision=revision,
        script=page_script(),
        refresh_seconds=REFRESH_SECONDS,
    )
