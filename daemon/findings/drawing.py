"""Turns a figure of matplotlib into SVG that a page can hold: no inline style, colours by class, own ids.

Figures are drawn in stand-in colours, each of which becomes a class: so one drawing suits light, dark and
print, and a Content-Security-Policy without inline styles.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.figure import Figure

from daemon.escaping import cut_short, escape_control

INKS = ("page", "ink", "soft", "rule", "raw", "adjusted", "matched", "positive", "negative", "reference")
PALETTE = tuple(f"kind-{number}" for number in range(1, 9))
COLOURS = {name: f"#0a0b{number:02x}" for number, name in enumerate((*INKS, *PALETTE), 1)}
CLASSES = {colour: name for name, colour in COLOURS.items()}
LABEL_CHARACTERS = 34

SETTINGS: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["soft"],
    "axes.facecolor": "none",
    "axes.formatter.use_mathtext": False,
    "axes.grid": False,
    "axes.labelcolor": COLOURS["soft"],
    "axes.labelsize": 11,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 12,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "grid.color": COLOURS["rule"],
    "grid.linewidth": 0.8,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,  # a label is data: a dollar is a dollar
    "xtick.color": COLOURS["soft"],
    "xtick.labelcolor": COLOURS["ink"],
    "xtick.labelsize": 11,
    "ytick.color": COLOURS["soft"],
    "ytick.labelcolor": COLOURS["ink"],
    "ytick.labelsize": 11,
}
METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))
KEPT = ("stroke-width", "stroke-linecap", "stroke-linejoin", "stroke-dasharray", "opacity", "fill-opacity")
DECLARATION = re.compile(r'\s+style="([^"]*)"')
NAMED_GROUP = re.compile(r'<g id="[^"]*">')
REFERENCE = re.compile(r'(\bid="|url\(#|href="#)')
GEOMETRY = re.compile(r'\b(?:d|x|y|transform|width|height)="[^"]*"')  # not the text of a label
NUMBER = re.compile(r"-?\d+\.\d{3,}")


def label(text: str) -> str:
    """Return a text fit for a label."""
    return cut_short(escape_control(text), LABEL_CHARACTERS)


@contextmanager
def drawn_alike() -> Iterator[None]:
    """Draw every figure within in the same type, lines and stand-in colours."""
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a character that matplotlib's font lacks; the reader's has it
        yield


def svg(figure: Figure, name: str, alternative: str) -> Markup:
    """Return the figure as inline SVG. `name` is unique on the page, `alternative` has its numbers."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata=METADATA)
    text = buffer.getvalue().decode()
    width, height = (round(inches * 72) for inches in figure.get_size_inches())
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.DOTALL)
    body = DECLARATION.sub(_attributes, body.replace("xlink:href", "href"))
    body = NAMED_GROUP.sub("<g>", body)
    body = REFERENCE.sub(lambda found: found[1] + name + "-", body)
    body = GEOMETRY.sub(lambda found: NUMBER.sub(rounded, found[0]), body)
    body = re.sub(r"\s*\n\s*", " ", body)
    return Markup(
        f'<svg class="figure" role="img" aria-label="{escape(escape_control(alternative))}"'
        f' viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
    )


def rounded(found: re.Match[str]) -> str:
    return f"{float(found[0]):.2f}"


def _attributes(found: re.Match[str]) -> str:
    """Return a style as attributes and classes."""
    style = dict(part.strip().split(": ", 1) for part in found[1].split("; ") if ": " in part)
    classes, attributes = [], []
    for name, value in style.items():
        if name in ("fill", "stroke"):
            if value in CLASSES:
                classes.append(f"{name}-{CLASSES[value]}")
            else:
                attributes.append(f'{name}="{value}"')
        elif name == "font-size" or name in KEPT or name == "text-anchor":
            attributes.append(f'{name}="{value}"')
        elif name == "font":
            size = re.search(r"[\d.]+px", value)
            attributes.append(f'font-size="{size[0] if size else "11px"}"')
            if value.startswith(("bold", "700", "600")):
                attributes.append('font-weight="600"')
        elif name == "font-weight":
            attributes.append('font-weight="600"')
    if classes:
        attributes.insert(0, f'class="{" ".join(classes)}"')
    return " " + " ".join(attributes) if attributes else ""
