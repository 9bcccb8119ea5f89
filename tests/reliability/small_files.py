"""The rate at which many files of one sample go through, against the same samples in one file.

`make small-files`. Besides the two: two daemons on the one inbox. Counts from the loaded model to the end
of a `--once` run. All are interleaved, so that a slow minute of the machine hits each, and a ratio is the
median of the repetitions' ratios.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tests.reliability.daemons import Daemons, Job
from tests.reliability.feed import joined
from tests.reliability.handling import events, finish, say
from tests.reliability.ledger import Dropped, violations
from tests.support import tiny


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


@dataclass(frozen=True, slots=True)
class Variant:
    name: str
    drop: Callable[[Path, list[str]], dict[str, Dropped]]
    daemons: int = 1


ONE_FILE = Variant("one file", drop_one)
MANY_FILES = Variant("many files", drop_many)
VARIANTS = (
    ONE_FILE,
    MANY_FILES,
    Variant("many files, 2 daemons", drop_many, daemons=2),
)


def drain(daemons: Daemons, folder: Path, lines: list[str], variant: Variant) -> Run:
    """Daemons on a full inbox, until it is empty."""
    inbox, outbox = folder / "inbox", folder / "outbox"
    inbox.mkdir(parents=True)
    dropped = variant.drop(inbox, lines)
    logs = [folder / f"log-{number}" for number in range(variant.daemons)]
    flags = {"inbox.rescan_seconds": 5.0}  # as by default
    started = [daemons.start(Job(inbox, outbox, log, flags=flags)) for log in logs]
    codes = [daemons.wait(pid) for pid in started]
    seconds = time.time() - min(map(model_loaded_at, logs))
    wrong = [
        f"a daemon ended with exit code {code}: see {log}"
        for code, log in zip(codes, logs, strict=True)
        if code
    ]
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
    rates: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    wrong: list[str] = []
    with Daemons(folder / "tiny") as daemons:
        for number in range(args.repeat):
            for variant in VARIANTS:
                # Nothing is removed before the end: ext4 is slow to make files just after it removed many.
                run = drain(daemons, folder / str(number) / variant.name, lines, variant)
                rates[variant.name].append(run.rate)
                wrong += run.violations
                say(f"{variant.name}: {run.rate:.0f} samples/s")
            if wrong:
                break
    for name, of in rates.items():
        beside = [median_ratio(name, of, other, rates[other]) for other in (ONE_FILE.name, MANY_FILES.name)]
        say("  ".join([f"{name}: {statistics.median(of):.0f} samples/s", *filter(None, beside)]))
    return finish(wrong, folder)


def median_ratio(name: str, of: list[float], other: str, to: list[float]) -> str:
    if name == other:
        return ""
    return f"{statistics.median(a / b for a, b in zip(of, to, strict=True)):.2f} of {other}"


if __name__ == "__main__":
    sys.exit(main())
