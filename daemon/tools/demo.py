"""`lensd demo`: the bundled 200 samples through the whole daemon, once, and the page of what they say."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from daemon.config import Config
from daemon.errors import LensdError, MachineError
from daemon.escaping import escape_control
from daemon.platform_calls import peak_bytes, usable_cores
from daemon.records import Outcome
from daemon.service import serve
from daemon.tools.report import print_published, read_manifest
from daemon.tools.samples import DEMO_SAMPLES, private_inbox


def demo(config: Config) -> int:
    """Process the samples into the outbox and show what came out. Returns the exit code.

    Stores what the page can say more with: log-probabilities, and what the dictionaries read. Run again, it
    shows what is already there: the same content is not computed twice.
    """
    config = config.model_copy(
        update={
            "analysis": config.analysis.model_copy(update={"log_probs": True}),
            "outbox": config.outbox.model_copy(update={"residuals": True}),
        }
    )
    console = Console(file=sys.stdout)
    outcomes: list[Outcome] = []
    with private_inbox(config, [DEMO_SAMPLES], config.outbox.path) as settings:
        began = time.monotonic()
        serve(settings, once=True, on_outcome=outcomes.append)
        total = time.monotonic() - began
    if not outcomes:
        raise MachineError("told to stop before the samples were read: run it again")
    (outcome,) = outcomes
    if outcome.folder is None:
        raise LensdError(f"the demo's samples failed: {outcome.message}")
    print_published(console, outcome.folder)
    manifest = read_manifest(outcome.folder)
    rate = manifest["rows"] / manifest["seconds"]
    peak = peak_bytes() / 1024**3
    if outcome.kind == "duplicate":
        console.print(
            f"Already there from an earlier run, at {rate:.1f} samples/sec: not computed again.",
            highlight=False,
        )
    else:
        console.print(
            f"{manifest['rows']} samples in {manifest['seconds']:.1f} s: {rate:.1f} samples/sec on"
            f" {usable_cores()} cores in {config.model.dtype};"
            f" {total:.1f} s with loading; peak memory {peak:.2f} GiB.",
            soft_wrap=True,
            highlight=False,
        )
    show_report(console, outcome.folder)
    return 0


def show_report(console: Console, folder: Path) -> None:
    """Make the page of the samples' findings where there is none; print the first, and its path."""
    from daemon.findings.command import REPORT, write_report
    from daemon.findings.report import ReportOptions
    from daemon.findings.sentences import findings

    page = folder / REPORT
    if not page.exists():
        report = write_report([folder], ReportOptions(), page)
        console.print(Text(escape_control(findings(report)[0])), soft_wrap=True)
    console.print(Text(escape_control(str(page))), soft_wrap=True)
