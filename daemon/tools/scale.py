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

from daemon.tools.scale_setup import WORKLOADS, ZERO_IS_FINE, Prediction, Setup
from daemon.tools.scale_simulation import TAIL_TO, Simulation

FORM = "{:>7} {:>7} {:>11} {:>10} {:>7} {:>6} {:>6} {:>7} {:>5}  {}\n"
HEAD = ("workers", "daemons", "samples/s", "efficiency", "loading", "tail", "file", "held", "busy", "binds")
UNITS = ("", "", "", "", "s", "s", "s", "GB", "", "")


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
    for name, value in {
        **given,
        "samples": 1 if args.samples is None else args.samples,
        "seed": args.seed + 1,
    }.items():
        if not math.isfinite(value) or value < 0 or (value == 0 and name not in ZERO_IS_FINE):
            parser.error(f"--{name.replace('_', '-')} {value:g} is out of range")
    setup = dataclasses.replace(WORKLOADS[args.workload], **given)
    if setup.tail > 1:
        parser.error(f"--tail {setup.tail:g} is out of range: it is a share")
    longest = TAIL_TO * setup.batch_samples / setup.worker_rate
    if 3600 * setup.mtbf_hours < setup.slots * longest:
        parser.error(
            f"--mtbf-hours {setup.mtbf_hours:g}: a batch may take {longest:.0f} s, and none would end"
        )
    if max(args.workers) < min(args.daemons):
        parser.error("more daemons than workers")
    return args, setup


def row(found: Prediction) -> str:
    return FORM.format(
        found.workers,
        found.daemons,
        f"{found.samples_per_second:,.1f}",
        f"{found.efficiency:.3f}",
        f"{found.load_seconds:,.0f}",
        f"{found.tail_seconds:,.0f}",
        f"{found.file_seconds:,.0f}",
        f"{found.held_gb:,.2f}",
        f"{max(found.busy.values()):.2f}",
        found.binds,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args, setup = arguments(argv)
    if not args.json:
        sys.stdout.write(FORM.format(*HEAD) + FORM.format(*UNITS))
    for workers, daemons in itertools.product(args.workers, args.daemons):
        if daemons <= workers:
            found = Simulation(setup, workers, daemons, args.samples, args.seed).run()
            sys.stdout.write(json.dumps(dataclasses.asdict(found)) + "\n" if args.json else row(found))
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
