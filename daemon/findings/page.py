"""Renders a report as one HTML file, which needs no network, no server and no script to be read.

The templates escape every value: texts, names and groups are written by others. The page's style and script
are within it, and its Content-Security-Policy names their hashes: a browser runs and loads nothing else.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from daemon.escaping import cut_short, escape_control
from daemon.findings import cautions, cells, figures, method_text, numbers, sentences, tables
from daemon.findings.results import Report

STATIC = Path(__file__).parent / "static"
MOST_BYTES = 5_000_000  # of a page: a browser opens it at once, and a mail takes it
MOST_CHARACTERS = 2000  # of any one value
MOST_NAME = 60  # of a name in a table
MOST_TITLE = 160


def page(report: Report) -> str:
    """Return the whole page, with examples of as many features as fit into MOST_BYTES."""
    drawn = figures.draw(report)
    shown = len(report.details)
    made = render(report, drawn, shown)
    if (size := len(made.encode())) > MOST_BYTES:
        bare = len(render(report, drawn, 0).encode())
        while size > MOST_BYTES and shown:
            shown = min(shown - 1, max(int(0.98 * shown * (MOST_BYTES - bare) / (size - bare)), 0))
            made = render(report, drawn, shown)
            size = len(made.encode())
    return made


def render(report: Report, drawn: figures.Figures, shown: int) -> str:
    """Return the page with examples of the first `shown` features."""
    template = environment().get_template("page.html")
    style, script = (asset(name) for name in ("report.css", "report.js"))
    return template.render(
        report=replace(report, details=report.details[:shown]),
        left_out=len(report.details) - shown,
        most_megabytes=MOST_BYTES // 1_000_000,
        run=report.run,
        figures=drawn,
        style=Markup(style),  # the project's own files, whose hashes the policy names
        script=Markup(script),
        policy=policy(style, script),
    )


@functools.cache
def asset(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def policy(style: str, script: str) -> str:
    """Return the Content-Security-Policy: this style, this script, and nothing from anywhere."""
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in (("style", style), ("script", script))
    }
    return (
        f"default-src 'none'; style-src 'sha256-{hashes['style']}'; script-src 'sha256-{hashes['script']}';"
        " img-src data:; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def environment() -> Environment:
    """Return the templates' environment: every value is escaped, and a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("daemon.findings"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
        finalize=visible,
    )
    environment.globals.update(
        cautions=cautions,
        cells=cells,
        method_text=method_text,
        numbers=numbers,
        sentences=sentences,
        tables=tables,
    )
    environment.filters["name"] = short_name
    environment.filters["title"] = lambda text: cut_short(escape_control(text), MOST_TITLE)
    environment.filters["column"] = column_name
    environment.filters["link"] = safe_link
    return environment


def visible(value: object) -> object:
    """Return a value fit for a page: control characters and those that turn the reading order as escapes."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return cut_short(escape_control(value[:MOST_CHARACTERS]), MOST_CHARACTERS)
    return value


def short_name(text: str, most: int = MOST_NAME) -> str:
    """Return a name, token or word, cut where it is long."""
    return cut_short(escape_control(text[: most + 1]), most)


def column_name(text: str) -> Markup:
    """Return a column's name, which may break after its underscores alone."""
    return Markup("_<wbr>").join(short_name(text).split("_"))


def safe_link(address: str | None) -> str | None:
    """Return an address that a click may open, None where it is of another kind."""
    return address if address is not None and address.startswith("https://") else None
