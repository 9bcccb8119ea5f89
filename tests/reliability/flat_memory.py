"""Peak memory of a run over a file and over one ten times as long, with the bundled model.

`make flat-memory`. Each run is a process of its own; the peak is the kernel's high-water mark of its memory.
A run before them converts the model and measures the batch size, if no earlier one on this machine did, so
that both start alike.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.reliability.daemons import ROOT
from tests.reliability.handling import say

DEMO_SAMPLES = ROOT / "daemon" / "presets" / "demo.jsonl"


def peak_mib(folder: Path, records: list[dict[str, object]], flags: list[str]) -> float:
    """Of one `lensd run --once` over these records."""
    inbox = folder / "inbox"
    inbox.mkdir(parents=True)
    (inbox / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = [sys.executable, "-m", "daemon.cli", "run", "--once", *flags]
    process = subprocess.Popen(
        [*command, "--inbox", str(inbox), "--outbox", str(folder / "outbox")],
        cwd=ROOT,
        env=os.environ | {"LENSD_INBOX__SETTLE_SECONDS": "0"},
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the run over {len(records)} records failed: see above")
    return usage.ru_maxrss / 1024


def numbered(record: dict[str, object], number: int) -> dict[str, object]:
    """A record like no other."""
    return record | {"id": f"r{number}", "prompt": f"{number}. {record['prompt']}"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1000, help="of the short file")
    parser.add_argument("--times", type=int, default=10, help="of that, the long file")
    args, flags = parser.parse_known_args()
    demo = [json.loads(line) for line in DEMO_SAMPLES.read_text().splitlines()]
    peaks = []
    with tempfile.TemporaryDirectory(prefix="lensd-flat-memory-") as folder:
        peak_mib(Path(folder) / "first", demo[:1], flags)
        for n in (args.records, args.times * args.records):
            records = [numbered(demo[number % len(demo)], number) for number in range(n)]
            peaks.append(peak_mib(Path(folder) / str(n), records, flags))
            say(f"{len(records)} records: peak {peaks[-1]:.0f} MiB")
    say(f"ratio {peaks[1] / peaks[0]:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
