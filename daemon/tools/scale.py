"""`python -m daemon.tools.scale`: how many samples a second so many workers would bring, and what binds.

Simulates daemons, workers and the store that they share, from costs measured on one worker and one daemon;
`deploy/ray/SCALE.md` says what it assumes. Runs no model and touches no files.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Sequence
from typing import NoReturn

from daemon.tools.scale_setup import WORKLOADS, ZERO_IS_FINE, Setup
from daemon.tools.scale_simulation import Simulation


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"scale: {message}\n")


def counts(text: str) -> list[int]:
    """Whole numbers above zero, with commas between them."""
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers above zero, e.g. 1,8,64, not {text!r}")
    return [int(part) for part in text.split(",")]


def arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Setup]:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="short")
    parser.add_argument("--workers", type=counts, default=[1, 2, 8, 64, 512, 4096, 10_000])
    parser.add_argument(
        "--daemons", type=counts, default=[1], help="on one inbox, each with a share of workers"
    )
    parser.add_argument(
        "--samples", type=int, help="of a job that is timed from the start; else the steady rate"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    group = parser.add_argument_group("costs and sizes, instead of the workload's (see SCALE.md)")
    for field in dataclasses.fields(Setup):
        group.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), metavar="N")
    args = parser.parse_args(argv)
    given = {
        name: value for name, value in vars(args).items() if name in Setup.__slots__ and value is not None
    }
    for name, value in {**given, "samples": args.samples or 1, "seed": args.seed + 1}.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in ZERO_IS_FINE):
            parser.error(f"--{name.replace('_', '-')} {value:g} is out of range")
    return args, dataclasses.replace(WORKLOADS[args.workload], **given)


def main(argv: Sequence[str] | None = None) -> int:
    args, setup = arguments(argv)
    form = "{:>8} {:>8} {:>13} {:>11} {:>8} {:>7} {:>7} {:>8}  {}\n"
    if not args.json:
        names = ("workers", "daemons", "samples/s", "efficiency", "loaded", "tail", "file", "held", "binds")
        sys.stdout.write(form.format(*names) + form.format(*("", "", "", "", "s", "s", "s", "GB", "")))
    for workers, daemons in itertools.product(args.workers, args.daemons):
        if daemons > workers:
            continue
        found = Simulation(setup, workers, daemons, args.samples, args.seed).run()
        line = (
            json.dumps(dataclasses.asdict(found)) + "\n"
            if args.json
            else form.format(
                workers,
                daemons,
                f"{found.samples_per_second:,.1f}",
                f"{found.efficiency:.3f}",
                f"{found.load_seconds:,.0f}",
                f"{found.tail_seconds:,.0f}",
                f"{found.file_seconds:,.0f}",
                f"{found.held_gb:,.2f}",
                f"{found.binds} ({max(found.busy.values()):.2f})",
            )
        )
        sys.stdout.write(line)
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
