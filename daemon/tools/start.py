"""`python -m daemon.tools.start`: how long `lensd run` takes until it is ready, and a drain of the demo.

Starts the command anew each time, in a folder of its own; the first start, which fills the cache, does not
count. Knows only what the log says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from daemon.config import PRESETS

READY = "model.loaded"
COMMAND = (sys.executable, "-m", "daemon.cli", "run", "--log-format", "json")


@dataclass(frozen=True, slots=True)
class Measured:
    """One start."""

    seconds: float  # from the command to what was waited for
    cpu_seconds: float  # of the whole process, its end included


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("options", nargs="*", help="of lensd run, after --")
    args = parser.parse_args(argv)
    for what, measure in (("to ready", to_ready), ("demo, --once", drained)):
        in_new_folders(measure, args.options)  # fills the cache
        starts = [in_new_folders(measure, args.options) for _ in range(args.repetitions)]
        sys.stdout.write(line(what, starts) + "\n")
    return 0


def line(what: str, starts: Sequence[Measured]) -> str:
    seconds = sorted(one.seconds for one in starts)
    cpu = statistics.median(one.cpu_seconds for one in starts)
    return (
        f"{what}: {statistics.median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f}),"
        f" {cpu:.1f} s of CPU: median of {len(starts)}"
    )


def in_new_folders(measure: Callable[[Path, Sequence[str]], Measured], options: Sequence[str]) -> Measured:
    with tempfile.TemporaryDirectory(prefix="lensd-start-") as folder:
        return measure(Path(folder), options)


def to_ready(folder: Path, options: Sequence[str]) -> Measured:
    """Start the daemon on an empty inbox and stop it once it is ready."""
    (folder / "inbox").mkdir()
    before, began = cpu_seconds(), time.perf_counter()
    with started(folder, [*options, "--http", "127.0.0.1:0"]) as daemon:
        assert daemon.stderr is not None
        seconds = wait_for(READY, daemon.stderr) - began
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate()
    return Measured(seconds, cpu_seconds() - before)


def drained(folder: Path, options: Sequence[str]) -> Measured:
    """Read the demo's 200 samples, from the command to its end."""
    (folder / "inbox").mkdir()
    shutil.copy(PRESETS / "demo.jsonl", folder / "inbox")
    before, began = cpu_seconds(), time.perf_counter()
    with started(folder, [*options, "--once"]) as daemon:
        _, said = daemon.communicate()
    seconds = time.perf_counter() - began
    if daemon.returncode:
        raise SystemExit(said)
    return Measured(seconds, cpu_seconds() - before)


def started(folder: Path, options: Sequence[str]) -> subprocess.Popen[str]:
    folders = ["--inbox", str(folder / "inbox"), "--outbox", str(folder / "outbox")]
    return subprocess.Popen([*COMMAND, *folders, *options], stderr=subprocess.PIPE, text=True, env=os.environ)


def wait_for(event: str, log: IO[str]) -> float:
    """The moment at which a log has an event. Raises SystemExit with what it said where it ends before."""
    said = []
    for entry in log:
        said.append(entry)
        if entry.startswith("{") and json.loads(entry).get("event") == event:
            return time.perf_counter()
    raise SystemExit("".join(said))


def cpu_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
