"""HTML and SVG that escapes whatever is put into it. Knows nothing about what is shown."""

from __future__ import annotations

from html import escape

VOID = frozenset({"br", "link", "meta"})


class Html(str):
    """Markup that is safe to send; made by `tag` alone, out of text that it escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str | None, **attributes: str | float | bool | None) -> Html:
    """One element. Children that are not Html are text; None and False leave a child or an attribute out.

    Of an attribute's name, underscores become hyphens and one at the end is dropped: `class_`, `aria_label`.
    """
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.removesuffix("_").replace("_", "-")
        parts.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    parts.append(">")
    if name in VOID:
        return Html("".join(parts))
    parts.append(join(*children))
    parts.append(f"</{name}>")
    return Html("".join(parts))


def join(*children: str | None) -> Html:
    """Elements and text one after the other."""
    return Html(
        "".join(
            child if isinstance(child, Html) else escape(child) for child in children if child is not None
        )
    )
