"""Tables for the terminal, out of published files. Knows nothing about how they were computed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from daemon.tools.verify import Verification

CONTRAST_COLUMNS = ("centroid_drift", "axis_twist", "stability", "entropy", "cross_layer_consistency")


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def domain_table(folder: Path) -> Table:
    """Means of the contrast metrics per domain: positive, negative, and their `_diff`."""
    metrics = pq.read_table(folder / "metrics.parquet")
    contrast = read_manifest(folder)["recipe"]["contrast"]
    texts = (contrast["positive"], contrast["negative"], "diff")
    columns = [f"{metric}_{text}" for metric in CONTRAST_COLUMNS for text in texts]
    table = Table(title="Means per domain: " + " / ".join(texts), title_justify="left")
    table.add_column("domain")
    table.add_column("samples", justify="right")
    for metric in CONTRAST_COLUMNS:
        table.add_column(metric.replace("_", " "), justify="right")
    domains = [name for name in pc.unique(metrics["domain"]).to_pylist() if name is not None]
    for name in [*sorted(domains), "all"]:
        rows = metrics if name == "all" else metrics.filter(pc.equal(metrics["domain"], name))
        if name == "all":
            table.add_section()
        means = [pc.mean(rows[column]).as_py() for column in columns]
        cells = [" / ".join(number(value) for value in means[i : i + 3]) for i in range(0, len(means), 3)]
        table.add_row(name, str(len(rows)), *cells)
    return table


def layer_table(folder: Path) -> Table:
    """What the manifest says of each SAE."""
    table = Table(title="Dictionaries on these texts", title_justify="left")
    for header in ("hook", "architecture", "d_sae", "mean L0", "FVU"):
        table.add_column(header, justify="left" if header in ("hook", "architecture") else "right")
    for sae in read_manifest(folder)["saes"]:
        table.add_row(
            sae["hook"], sae["architecture"], str(sae["d_sae"]), number(sae["mean_l0"]), number(sae["fvu"])
        )
    return table


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.3f}"


def print_published(console: Console, folder: Path) -> None:
    """The tables of one output folder and the paths of its files."""
    console.print(domain_table(folder))
    console.print(layer_table(folder))
    for file in read_manifest(folder)["files"]:
        console.print(
            f"{folder / file['name']}  {file['rows']} rows, {file['bytes'] / 1024:.0f} KiB", soft_wrap=True
        )
    console.print(folder / "manifest.json", soft_wrap=True)


def print_verification(console: Console, verification: Verification) -> None:
    """Every column with its largest difference at each batch size, and the verdict."""
    table = Table(
        title=f"{verification.samples} samples, {verification.model} in {verification.dtype}:"
        " largest difference from one text at a time",
        title_justify="left",
    )
    table.add_column("column")
    for report in verification.reports:
        for what in ("abs", "rel"):
            table.add_column(f"batch {report.batch_size} {what}", justify="right")
    for rows in zip(*(report.columns for report in verification.reports), strict=True):
        cells = [f"{value:.1e}" for row in rows for value in (row.absolute, row.relative)]
        mark = "" if all(map(verification.within, rows)) else " [red](over)[/red]"
        table.add_row(rows[0].column + mark, *cells)
    console.print(table)
    for report in verification.reports:
        console.print(
            f"batch size {report.batch_size}: {report.feature_flips} flips among {verification.activations}"
            f" active features, in {report.flipped_samples} samples; {report.set_flips} of"
            f" {verification.stability_values} stability values moved",
            soft_wrap=True,
        )
    verdict = "[green]agrees[/green]" if verification.passed else "[red]differs[/red]"
    console.print(f"{verdict} within the tolerance: {verification.tolerance}")
