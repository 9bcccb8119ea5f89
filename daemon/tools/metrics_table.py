"""`python -m daemon.tools.metrics_table`: writes the table of metrics into deploy/README.md.

Knows the descriptions that the metrics give of themselves, and no values.
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from daemon.observe.metrics import Description, Label, Metrics

README = Path(__file__).parents[2] / "deploy" / "README.md"
BEGIN = "<!-- metrics: written by python -m daemon.tools.metrics_table -->"
END = "<!-- end of metrics -->"


def table(descriptions: list[Description]) -> str:
    """Markdown, a row per metric."""
    rows = [
        f"| `{d.name}` | {d.kind} | {'; '.join(map(label_text, d.labels))} | {d.text}{bucket_text(d)} |"
        for d in descriptions
    ]
    return "\n".join(["| Metric | Type | Labels | What it says |", "| --- | --- | --- | --- |", *rows])


def label_text(label: Label) -> str:
    """A label with all its values, or what they are."""
    values = ", ".join(f"`{value}`" for value in label.values) or label.meaning
    return f"`{label.name}`: {values}" if values else f"`{label.name}`"


def bucket_text(described: Description) -> str:
    if not described.buckets:
        return ""
    first, *_, last = described.buckets
    return f" {len(described.buckets)} buckets from {first:g} to {last:g}, and all above."


def with_table(text: str) -> str:
    """The document with the table between its two marks brought up to date."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(Metrics(CollectorRegistry()).descriptions)}\n{END}{after}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
