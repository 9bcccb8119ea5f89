"""Tables for the terminal, at most 80 columns wide. Knows nothing about how the numbers were computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon.analysis.columns import CONTRAST_METRICS
from daemon.escaping import escape_control
from daemon.model_info import default_name

if TYPE_CHECKING:
    from daemon.tools.bits import BitsReport
    from daemon.tools.verify import Verification


def read_manifest(folder: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return manifest


def plain_table(title: str, *left: str, right: Sequence[str]) -> Table:
    """A table of these columns, by the side to which they are aligned."""
    table = Table(
        title=Text(escape_control(title), style="bold"),
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def domain_table(folder: Path) -> Table:
    """Mean contrast of each domain, then of all, then the two texts' own means."""
    metrics = pq.read_table(folder / "metrics.parquet")
    contrast = read_manifest(folder)["recipe"]["contrast"]
    positive, negative = contrast["positive"], contrast["negative"]
    reverse = " and ".join(metric.header for metric in CONTRAST_METRICS if metric.sign < 0)
    table = plain_table(
        f"Mean contrast: {negative} - {positive}; of {reverse} {positive} - {negative}",
        "domain",
        right=["samples", *(metric.header for metric in CONTRAST_METRICS)],
    )
    domains = sorted(name for name in pc.unique(metrics["domain"]).to_pylist() if name is not None)
    for name in domains:
        add_means(table, name, metrics.filter(pc.equal(metrics["domain"], name)), "diff", "+.3f")
    table.add_section()
    add_means(table, "all", metrics, "diff", "+.3f")
    for text in (positive, negative):
        add_means(table, f"{text} only", metrics, text, ".3f")
    return table


def add_means(table: Table, label: str, rows: pa.Table, which: str, style: str) -> None:
    means = [pc.mean(rows[f"{metric.name}_{which}"]).as_py() for metric in CONTRAST_METRICS]
    table.add_row(label, str(len(rows)), *("-" if mean is None else f"{mean:{style}}" for mean in means))


def layer_table(folder: Path) -> Table:
    """Rows of the manifest's SAEs."""
    saes = read_manifest(folder)["saes"]
    named = any(sae["name"] != default_name(sae["layer"]) for sae in saes)
    left = ("name", "hook") if named else ("hook",)
    table = plain_table(
        "Dictionaries on these texts", *left, "architecture", right=("d_sae", "mean L0", "FVU")
    )
    for sae in saes:
        fvu = "-" if sae["fvu"] is None else f"{sae['fvu']:.3f}"
        mean_l0 = "-" if sae["mean_l0"] is None else f"{sae['mean_l0']:.1f}"
        table.add_row(*(sae[key] for key in left), sae["architecture"], str(sae["d_sae"]), mean_l0, fvu)
    return table


def print_published(console: Console, folder: Path) -> None:
    """The tables of one output folder and the paths of its files."""
    console.print(domain_table(folder))
    console.print(layer_table(folder))
    for file in read_manifest(folder)["files"]:
        size = f"{file['rows']} rows, {file['bytes'] / 1024:.0f} KiB"
        console.print(Text(escape_control(f"{folder / file['name']}  {size}")), soft_wrap=True)
    console.print(Text(escape_control(str(folder / "manifest.json"))), soft_wrap=True)


def print_bits(console: Console, found: BitsReport) -> None:
    """Every way to batch with what differs from one batch, the layers that differ, and the verdict."""
    table = plain_table(
        f"{found.model} in {found.dtype}, {found.samples} samples: what differs in bits from one batch",
        "batches",
        right=("threads", f"of {found.cells:,} cells", f"of {found.feature_rows:,} feature rows"),
    )
    for one in found.groupings:
        differs = one.cells or one.feature_rows
        counts = str(one.threads), f"{one.cells:,}", f"{one.feature_rows:,}"
        table.add_row(one.name, *counts, style="red" if differs else None)
    console.print(table)
    for one in found.groupings:
        if one.columns:
            worst = sorted(one.columns.items(), key=lambda column: -column[1])[:8]
            names = ", ".join(f"{name} ({count})" for name, count in worst)
            console.print(f"{one.name}, {one.threads} threads: {names}", soft_wrap=True, highlight=False)
    differing = [one for one in found.layers if one.tokens]
    if differing:
        line = f"the first layer that differs: {differing[0].layer}, at {differing[0].tokens:,} tokens"
        console.print(line, highlight=False)
    elif found.layers:
        line = f"all {len(found.layers)} layers give each token the same bits in company and alone"
        console.print(line, highlight=False)
    console.print("[green]the same bits[/green]" if found.passed else "[red]differs[/red]")


def print_verification(console: Console, verification: Verification) -> None:
    """Every column with its largest difference at any batch size, and the verdict."""
    table = plain_table(
        f"{verification.model} in {verification.dtype}, {verification.samples} samples:"
        " largest difference from one text at a time",
        "column",
        right=("absolute", "relative", "mismatches"),
    )
    table.columns[0].no_wrap = True
    for rows in zip(*(report.columns for report in verification.reports), strict=True):
        mark = "" if all(map(verification.within, rows)) else " over"
        table.add_row(
            rows[0].column + mark,
            f"{max(row.absolute for row in rows):.1e}",
            f"{max(row.relative for row in rows):.1e}",
            str(max(row.mismatches for row in rows)),
            style="red" if mark else None,
        )
    console.print(table)
    for report in verification.reports:
        largest = max(report.columns, key=lambda row: row.absolute)
        console.print(
            f"batch size {report.batch_size}: at most {largest.absolute:.1e} ({largest.column});"
            f" {report.feature_flips} of {verification.activations} active features flipped,"
            f" in {report.flipped_samples} samples; {report.set_flips} of"
            f" {verification.stability_values} stability values moved",
            soft_wrap=True,
            highlight=False,
        )
    verdict = "[green]agrees[/green]" if verification.passed else "[red]differs[/red]"
    console.print(f"{verdict}: the tolerance in {verification.dtype} is {verification.tolerance}")
