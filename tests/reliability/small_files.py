"""The rate at which many files of one sample go through, against the same samples in one file.

`make small-files`. Counts from the loaded model to the end of a `--once` run; the two are interleaved, so
that a slow minute of the machine hits both, and the ratio is the median of the repetitions' ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests import tiny
from tests.reliability.daemons import Daemons, Job
from tests.reliability.feed import joined
from tests.reliability.handling import events, finish, say
from tests.reliability.ledger import Dropped, violations


@dataclass(frozen=True, slots=True)
class Run:
    samples: int
    seconds: float
    violations: list[str]

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds


def drop_one(inbox: Path, lines: list[str]) -> dict[str, Dropped]:
    """All records in one file."""
    return {"all.jsonl": written(inbox / "all.jsonl", joined(lines), len(lines))}


def drop_many(inbox: Path, lines: list[str]) -> dict[str, Dropped]:
    """Each record in a file of its own."""
    names = [f"{number:06}.json" for number in range(len(lines))]
    return {
        name: written(inbox / name, f"[{line}]".encode(), 1) for name, line in zip(names, lines, strict=True)
    }


def written(path: Path, raw: bytes, records: int) -> Dropped:
    path.write_bytes(raw)
    return Dropped(records, hashlib.sha256(raw).hexdigest())


def drain(daemons: Daemons, folder: Path, lines: list[str], *, many: bool) -> Run:
    """One daemon on a full inbox, until it is empty."""
    inbox, outbox, log = folder / "inbox", folder / "outbox", folder / "log"
    inbox.mkdir(parents=True)
    dropped = (drop_many if many else drop_one)(inbox, lines)
    code = daemons.run(Job(inbox, outbox, log, flags={"inbox.rescan_seconds": 5.0}))  # as by default
    seconds = time.time() - model_loaded_at(log)
    wrong = [] if code == 0 else [f"the daemon ended with exit code {code}: see {log}"]
    return Run(len(lines), seconds, wrong + violations(inbox, outbox, dropped))


def model_loaded_at(log: Path) -> float:
    """Unix time of the moment from which a daemon could work."""
    stamp = events(log, "model.loaded")[0]["timestamp"]
    return datetime.fromisoformat(stamp).timestamp()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    lines = [json.dumps(record) for record in tiny.contrast_records(args.files)]
    folder = Path(tempfile.mkdtemp(prefix="lensd-small-files-"))
    ratios = []
    wrong: list[str] = []
    with Daemons(folder / "tiny") as daemons:
        for number in range(args.repeat):
            place = folder / str(number)
            one = drain(daemons, place / "one", lines, many=False)
            many = drain(daemons, place / "many", lines, many=True)
            ratios.append(many.rate / one.rate)
            wrong += one.violations + many.violations
            say(
                f"one file {one.rate:.0f} samples/s  {args.files} files {many.rate:.0f} samples/s"
                f"  ratio {ratios[-1]:.2f}"
            )
            if (
                wrong
            ):  # nothing is removed before the end: ext4 is slow to make files just after it removed many
                break
    say(f"median ratio {statistics.median(ratios):.2f} of {len(ratios)}")
    return finish(wrong, folder)


if __name__ == "__main__":
    sys.exit(main())
