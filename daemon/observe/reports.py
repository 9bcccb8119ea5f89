"""Serves the pages of findings that lie in published folders. Knows nothing about what they say.

A page holds sample text: pages are served only while the configuration asks for them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from daemon.records import Outcome

if TYPE_CHECKING:
    from aiohttp import web

PREFIX = "reports"

# A page runs its own script on its own data: it can ask the daemon for nothing, and nobody frames it.
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline';"
    " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; sandbox allow-scripts",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def report_path(outcome: Outcome) -> str | None:
    """Return where the page of a file's findings is, seen from the status page; None where it has none."""
    if outcome.folder is None or outcome.report is None:
        return None
    return f"{PREFIX}/{quote(outcome.folder.name, safe='')}/{quote(outcome.report, safe='')}"


def report_routes(outbox: Path, *, name: str, enabled: Callable[[], bool]) -> list[web.RouteDef]:
    """Return the route of pages called `name` in folders of `outbox`; each request asks `enabled`."""
    from aiohttp import web

    async def page(request: web.Request) -> web.StreamResponse:
        folder = request.match_info["folder"]
        if not enabled() or "/" in folder or folder.startswith("."):
            raise web.HTTPNotFound
        path = outbox / folder / name
        if path.is_symlink() or not path.is_file():
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={**HEADERS, "Content-Type": "text/html; charset=utf-8"})

    return [web.get(f"/{PREFIX}/{{folder}}/{name}", page)]
