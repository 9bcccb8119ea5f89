"""A daemon and a real Prometheus that scrapes it, both on loopback, and a load to watch.

Each is a process of its own, ended by its id. The configuration is the one in deploy/prometheus, but for the
address that is scraped and the intervals.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.reliability.daemons import ROOT, Daemons, Job
from tests.reliability.handling import running, wait_until
from tests.support import tiny

DEPLOY = Path(__file__).parents[2] / "deploy"
PROMETHEUS = DEPLOY / "prometheus"

FILES, FILE_RECORDS = 250, 8
BAD_RECORDS = 12
WORKERS = 2
UNUSABLE = {"broken.json": b'[{"prompt": "cut', "picture.json": b"\x89PNG\0"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class Monitored:
    """The running pair, once every dropped file has its outcome and the last scrape shows it."""

    inbox: Path
    outbox: Path
    prometheus: str  # base URL

    def api(self, path: str, **parameters: str) -> Any:
        """The `data` of an answer. Raises HTTPError where Prometheus refuses the question."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.prometheus}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def query(self, expression: str) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series of an instant vector, without those that are no number."""
        data = self.api("query", query=expression)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        series = [(entry["metric"], float(entry["value"][1])) for entry in data["result"]]
        return [(labels, value) for labels, value in series if not math.isnan(value)]

    def value(self, expression: str) -> float | None:
        """Of the one series that the expression gives, None where it gives none."""
        answer = self.query(expression)
        assert len(answer) <= 1, answer
        return answer[0][1] if answer else None


def drop_files(inbox: Path, *, unusable: bool = True) -> int:
    """2,000 samples, 12 of them bad, two files that are none, and one that is there twice; how many files.

    Unless `unusable`, without those two.
    """
    records = [json.dumps(record) for record in tiny.contrast_records(FILES * FILE_RECORDS)]
    step = len(records) // BAD_RECORDS
    for number in range(BAD_RECORDS):
        records[number * step + 1] = '{"prompt": "no more"}' if number % 3 else "{oops"
    contents = dict(UNUSABLE) if unusable else {}
    for number in range(FILES):
        lines = records[number * FILE_RECORDS : (number + 1) * FILE_RECORDS]
        contents[f"{number:03}.jsonl"] = "".join(f"{line}\n" for line in lines).encode()
    contents["again.jsonl"] = contents["007.jsonl"]
    for name, content in contents.items():
        draft = inbox / ".draft"
        draft.write_bytes(content)
        draft.rename(inbox / name)
    return len(contents)


def configure(folder: Path, target: str) -> None:
    """deploy/prometheus in a new folder, scraping one target every second."""
    shutil.copytree(PROMETHEUS, folder)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    targets = folder / "targets" / "lensd.yml"
    targets.write_text(targets.read_text().replace("localhost:9478", target))


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[str]:
    """A Prometheus server within the context; its base URL."""
    configure(folder, target)
    address = f"127.0.0.1:{free_port()}"
    with (
        (folder / "log").open("wb") as log,
        subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder / 'prometheus.yml'}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            yield f"http://{address}"
        finally:
            process.terminate()


@contextlib.contextmanager
def running_workers(folder: Path) -> Iterator[Monitored]:
    """A daemon with workers on a Ray cluster of its own, and a Prometheus that saw what they computed."""
    pytest.importorskip("ray")
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on this machine (Debian: apt install prometheus)")
    inbox, outbox, toml = folder / "inbox", folder / "outbox", folder / "lensd.toml"
    toml.write_text(tiny.make_tiny(folder).toml())
    inbox.mkdir()
    target = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "daemon.cli", "run", "--config", toml, "--http", target]
    command += ["--inbox", inbox, "--outbox", outbox, "--executor", "ray", "--workers", str(WORKERS)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"LENSD_INBOX__SETTLE_SECONDS": "0", "LENSD_BATCHING__MAX_BATCH_TOKENS": "512"}
    with (
        prometheus(folder / "prometheus", target) as url,
        (folder / "daemon.log").open("wb") as log,
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        pair = Monitored(inbox, outbox, url)

        def wait_for(expression: str, wanted: float, what: str) -> None:
            wait_until(
                lambda: answers(pair) and pair.value(expression) == wanted, what, process.pid, seconds=240
            )

        try:
            wait_for('lensd_workers{state="ready"}', WORKERS, "the workers")
            files = drop_files(inbox, unusable=False)
            wait_for("sum(lensd_files_total)", files, "every file's outcome")
            wait_for("lensd_batches_in_flight", 0, "the gauges of the end")
            yield pair
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


@contextlib.contextmanager
def running_pair(folder: Path, daemons: Daemons) -> Iterator[Monitored]:
    """Start both, drop the files while Prometheus looks on, and wait until it saw their outcomes."""
    if shutil.which("prometheus") is None:
        pytest.skip("no prometheus on this machine (Debian: apt install prometheus)")
    inbox, outbox = folder / "inbox", folder / "outbox"
    inbox.mkdir()
    target = f"127.0.0.1:{free_port()}"
    flags = {"http.enabled": True, "http.address": target}
    job = Job(inbox, outbox, folder / "daemon.log", once=False, flags=flags)
    with prometheus(folder / "prometheus", target) as url, running(daemons, job) as pid:
        pair = Monitored(inbox, outbox, url)
        wait_until(lambda: answers(pair) and pair.value("lensd_max_batch_tokens"), "the first scrape", pid)
        files = drop_files(inbox)
        wait_until(lambda: pair.value("sum(lensd_files_total)") == files, "every file's outcome", pid)
        wait_until(lambda: pair.value("lensd_inbox_files") == 0, "the gauges of the end", pid)
        seen = pair.value("time()")
        assert seen is not None
        wait_until(  # twice, since alerts may be evaluated ahead of what is recorded
            lambda: (pair.value("timestamp(lensd:files_failed:ratio1h)") or 0) > seen + 2,
            "the rules' evaluation of what was seen",
            pid,
        )
        yield pair


def answers(pair: Monitored) -> bool:
    try:
        return bool(pair.api("query", query="up"))
    except OSError:  # not listening yet, or not ready
        return False
