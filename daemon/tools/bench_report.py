"""Shows the figures of `lensd bench`: a table, and a plot of speed and memory by batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from daemon.tools.bench import BenchReport
from daemon.tools.bench_worker import AUTO
from daemon.tools.report import plain_table

MEMORY_GIB = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 80, 141)


def print_bench(console: Console, report: BenchReport) -> None:
    table = plain_table(
        f"{report.model}, {report.dtype}, {report.device}, {report.cores} cores of {report.machine}",
        "",
        right=("samples/s", "text tokens/s", "speedup", "peak GiB"),
    )
    for variant in report.variants:
        table.add_row(
            variant.name,
            f"{variant.samples_per_second:.1f}",
            f"{variant.tokens_per_second:,.0f}",
            f"{variant.speedup:.1f}",
            f"{variant.peak_bytes / 2**30:.2f}",
        )
    console.print(table)
    for line in conclusions(report):
        console.print(line, highlight=False, soft_wrap=True)


def conclusions(report: BenchReport) -> list[str]:
    """Describe the figures in sentences."""
    fastest, own = report.fastest_product_flops / 1e9, report.torch_product_flops / 1e9
    lines = [
        f"{report.samples} samples, {report.text_tokens:,} tokens of text, {report.unique_tokens:,} different"
        f" ones, positions {report.positions}; medians of {report.repetitions} interleaved repetitions.",
        f"Of the limit, which is the arithmetic at {fastest:.0f} GFLOP/s, the fastest matrix product here:"
        f" {report.fraction_of_fastest:.2f}.",
        f"At {own:.0f} GFLOP/s, the rate of torch's own product: {report.fraction_of_torch:.2f}.",
        f"Whole runs over the engine alone: {report.pipeline_over_bare:.2f}.",
    ]
    lines += [
        f"lensd auto over {name}: {ratio:.1f}"
        for name, ratio in report.over.items()
        if not name.startswith(("lensd", "bare"))
    ]
    return [*lines, *recommendations(report)]


def recommendations(report: BenchReport) -> list[str]:
    """Recommend settings for such a device, by the memory that lensd may take."""
    lines: list[str] = []
    last = None
    for gib in MEMORY_GIB:
        best = report.recommended(gib * 2**30)
        if best is not None and best != last:
            rate = f"{best.samples_per_second:.1f} samples/s"
            lines.append(f"Recommended with {gib} GiB on {report.device}: {report.setting(best)} ({rate})")
            last = best
    return lines


def plot(report: BenchReport, path: Path) -> None:
    """Draw speed and peak memory by samples per batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = [v for v in report.variants if v.name.startswith("lensd ") and v.name != AUTO]
    labels = [v.name.split()[1] for v in sizes] + ["auto"]
    shown = [*sizes, report.variant(AUTO)]
    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    speed.bar(labels, [v.samples_per_second for v in shown], color="#30638e")
    others = [v for v in report.variants if not v.name.startswith(("lensd", "bare"))]
    for number, v in enumerate(sorted(others, key=lambda v: v.samples_per_second)):
        speed.axhline(v.samples_per_second, color="#d1495b", linewidth=1)
        beside: Any = ("axes fraction", "data")
        speed.annotate(
            v.name,
            (1, v.samples_per_second),
            xycoords=beside,
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="bottom" if number % 2 else "top",  # two that are close stay apart
        )
    speed.set(xlabel="samples per batch", ylabel="samples/s", title="speed")
    memory.bar(labels, [v.peak_bytes / 2**30 for v in shown], color="#edae49")
    memory.set(xlabel="samples per batch", ylabel="GiB", title="peak resident memory")
    figure.suptitle(f"{report.model}, {report.dtype}, {report.cores} cores, {report.machine}", fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
