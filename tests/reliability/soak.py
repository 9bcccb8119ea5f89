"""A long run of the real command under steady load, its memory, open files and threads watched each second.

`make soak MINUTES=30`. Ends after so many minutes or records, whichever comes first. Results are checked and
deleted as they come, so the disk does not fill. Writes soak.csv and soak.svg; what grows shows there.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import pyarrow.parquet as pq

from tests.reliability.daemons import ROOT
from tests.reliability.feed import joined
from tests.reliability.handling import events, finish, say, wait_until
from tests.support import tiny

WAITING = 20  # files in the inbox at most
WARM = 0.05  # of the run, after which memory should have its final size
SETTINGS = """
[inbox]
on_success = "delete"
settle_seconds = 0
rescan_seconds = 1
[batching]
max_batch_tokens = 4096
[http]
address = "127.0.0.1:0"
[log]
format = "json"
"""


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon at one moment."""

    seconds: float
    records: int  # in results checked so far
    rss_mib: float
    fds: int
    threads: int
    waiting: int  # files


class Load:
    """Files of some thousand records, and the results that come of them."""

    def __init__(self, inbox: Path, outbox: Path, seed: int = 0) -> None:
        self.inbox = inbox
        self.outbox = outbox
        self.records = 0  # checked
        self.wrong: list[str] = []
        self._expected: dict[str, int] = {}  # file name -> records, not yet come out
        self._rng = random.Random(seed)
        self._serial = 0

    @property
    def under_way(self) -> int:
        return len(self._expected)

    def top_up(self) -> None:
        """Drop files until enough wait; one in ten is compressed, one record in a thousand is bad."""
        while self.under_way < WAITING:
            self._serial += 1
            lines = [text_record(self._serial, number) for number in range(self._rng.randint(2000, 5000))]
            for number in range(self._rng.randrange(1, 1000), len(lines), 1000):
                lines[number] = "{oops"
            packed = self._rng.random() < 0.1
            name = f"{self._serial:06}.jsonl{'.gz' if packed else ''}"
            raw = joined(lines)
            draft = self.inbox / ".draft"
            draft.write_bytes(gzip.compress(raw, 1) if packed else raw)
            self._expected[name] = len(lines)
            draft.rename(self.inbox / name)

    def withdraw(self) -> None:
        """Take back the files that nobody has begun."""
        for name in list(self._expected):
            with contextlib.suppress(FileNotFoundError):
                (self.inbox / name).unlink()
                del self._expected[name]

    def collect(self) -> None:
        """Check what was published, count it, and delete it."""
        for path in self.outbox.glob("[!.]*/manifest.json"):
            manifest = json.loads(path.read_bytes())
            name, records = manifest["input"]["name"], manifest["records"]
            rows = pq.read_metadata(path.parent / "metrics.parquet").num_rows
            rejects = (path.parent / "rejects.jsonl").read_bytes().count(b"\n")
            if (rows, rejects) != (manifest["rows"], manifest["rejects"]) or rows + rejects != records:
                self.wrong.append(f"{name}: {rows} rows + {rejects} rejects, manifest {manifest['rows']}")
            if records != (expected := self._expected.pop(name, None)):
                self.wrong.append(f"{name}: {records} records published, {expected} dropped")
            self.records += records
            shutil.rmtree(path.parent)
        self.wrong += [f"failed: {path.name}" for path in (self.inbox / "failed").glob("*.reason.json")]


def text_record(serial: int, number: int) -> str:
    """Unlike every other, and short: what is watched here is the service, not the model."""
    return f'{{"id": "{serial}-{number}", "text": "number {number} of {serial}"}}'


def look_at(pid: int, began: float, load: Load) -> Sample:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
    )
    return Sample(
        seconds=round(time.monotonic() - began, 2),
        records=load.records,
        rss_mib=round(int(status["VmRSS"].split()[0]) / 1024, 1),
        fds=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(status["Threads"]),
        waiting=load.under_way,
    )


def soak(
    process: subprocess.Popen[bytes], load: Load, url: str, minutes: float, records: int
) -> list[Sample]:
    """Feed and watch until it was long enough, then let the inbox drain."""
    began = time.monotonic()
    samples: list[Sample] = []
    feeding = True
    while feeding or load.under_way:
        if feeding and (load.records >= records or time.monotonic() - began > minutes * 60):
            feeding = False
            load.withdraw()
        if feeding:
            load.top_up()
        load.collect()
        if process.poll() is not None:
            load.wrong.append(f"the daemon ended with exit code {process.returncode}")
        if load.wrong:
            break
        if not samples or time.monotonic() - began >= samples[-1].seconds + 1:
            urllib.request.urlopen(f"{url}/metrics", timeout=30).close()
            samples.append(look_at(process.pid, began, load))
            if len(samples) % 60 == 0:
                say(str(samples[-1]))
        time.sleep(0.1)
    return samples


def warm(samples: Sequence[Sample]) -> Sample:
    """The first sample past the warm-up, of records."""
    return next(sample for sample in samples if sample.records > WARM * samples[-1].records)


def write_csv(path: Path, samples: Sequence[Sample]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(field.name for field in fields(Sample))
        table.writerows(map(astuple, samples))


def write_svg(path: Path, samples: Sequence[Sample]) -> None:
    """Memory, rate, open files and threads over time, one below the other."""
    step = max(1, len(samples) // 600)
    thinned = samples[::step]
    window = 30
    rates = [
        (b.records - a.records) / max(b.seconds - a.seconds, 1e-9)
        for a, b in zip([thinned[0]] * window + list(thinned), thinned, strict=False)
    ]
    curves = {
        "resident memory, MiB": [sample.rss_mib for sample in thinned],
        f"records a second, over {window * step} s": rates,
        "open files": [float(sample.fds) for sample in thinned],
        "threads": [float(sample.threads) for sample in thinned],
    }
    seconds = [sample.seconds for sample in thinned]
    panels = [
        panel(name, seconds, values, top=20 + 170 * number)
        for number, (name, values) in enumerate(curves.items())
    ]
    height = 20 + 170 * len(panels)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="800" height="{height}" font-family="sans-serif"'
    path.write_text(f'{head} font-size="12">\n<rect width="100%" height="100%" fill="white"/>\n')
    with path.open("a") as file:
        file.writelines(panels)
        file.write("</svg>\n")


def panel(name: str, seconds: Sequence[float], values: Sequence[float], top: int) -> str:
    """One curve in a frame 120 high, from 0 to a little over its greatest value."""
    most = max(*values, 1e-9) * 1.1
    span = max(seconds[-1], 1e-9)
    points = " ".join(
        f"{60 + 720 * at / span:.1f},{top + 140 - 120 * value / most:.1f}"
        for at, value in zip(seconds, values, strict=True)
    )
    return (
        f'<text x="60" y="{top + 12}">{name}: first {values[0]:.0f}, greatest {max(values):.0f},'
        f" last {values[-1]:.0f}</text>\n"
        f'<rect x="60" y="{top + 20}" width="720" height="120" fill="none" stroke="#999"/>\n'
        f'<text x="4" y="{top + 30}">{most:.0f}</text><text x="4" y="{top + 140}">0</text>\n'
        f'<text x="780" y="{top + 154}" text-anchor="end">{span / 60:.1f} min</text>\n'
        f'<polyline points="{points}" fill="none" stroke="#1f6feb"/>\n'
    )


def summary(samples: Sequence[Sample]) -> str:
    start, last = warm(samples), samples[-1]
    rate = (last.records - start.records) / max(last.seconds - start.seconds, 1e-9)
    early = minute_median([s for s in samples if start.seconds <= s.seconds < start.seconds + 60])
    late = minute_median([s for s in samples if s.seconds > last.seconds - 60])
    return (
        f"records {last.records}  seconds {last.seconds:.0f}  records/s {rate:.0f}"
        f"  rss MiB {early:.0f} in the minute after {WARM:.0%}, {late:.0f} in the last (medians)"
        f"  ratio {late / early:.3f}  greatest {max(s.rss_mib for s in samples):.0f}"
        f"  fds {start.fds} -> {last.fds}  threads {start.threads} -> {last.threads}"
    )


def minute_median(samples: Sequence[Sample]) -> float:
    """Of resident memory, which from one second to the next moves by the batch that is under way."""
    return statistics.median(sample.rss_mib for sample in samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument(
        "--out", type=Path, default=Path(tempfile.gettempdir()), help="for the csv and the svg"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="lensd-soak-"))
    inbox, outbox, log = folder / "inbox", folder / "outbox", folder / "log"
    inbox.mkdir()
    toml = folder / "lensd.toml"
    toml.write_text(tiny.make_tiny(folder).toml() + SETTINGS)
    command = [sys.executable, "-m", "daemon.cli", "run", "--config", str(toml)]
    load = Load(inbox, outbox)
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "--inbox", str(inbox), "--outbox", str(outbox)], cwd=ROOT, stderr=stderr
        )
    try:
        wait_until(
            lambda: events(log, "model.loaded") or process.poll() is not None, "the model", seconds=120
        )
        url = events(log, "http.listening")[0]["url"]
        samples = soak(process, load, url, minutes=args.minutes, records=args.records)
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            load.wrong.append(f"the daemon ended with exit code {code}: see {log}")
    finally:
        process.kill()
        process.wait()
    write_csv(args.out / "soak.csv", samples)
    write_svg(args.out / "soak.svg", samples)
    say(summary(samples))
    say(f"{args.out / 'soak.csv'}  {args.out / 'soak.svg'}")
    return finish(load.wrong, folder)


if __name__ == "__main__":
    sys.exit(main())
