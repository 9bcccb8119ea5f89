"""A real cluster of Ray on this machine, whose workers run a tiny model."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("ray")

from tests.reliability.daemons import ROOT
from tests.reliability.handling import events
from tests.reliability.ray_head import RayHead, all_processes, free_port
from tests.support import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WAIT_SECONDS = 240  # of a busy machine


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    head = RayHead(cpus=1)
    head.start()
    yield head
    head.kill()


class Run:
    """`lensd run` on two folders, in a process of its own."""

    def __init__(self, folder: Path, toml: Path, *flags: str, **environment: str) -> None:
        self.inbox, self.outbox, self.log = folder / "inbox", folder / "outbox", folder / "log"
        self.inbox.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "daemon.cli", "run", "--no-http", "--log-format", "json"]
        command += ["--config", str(toml), "--inbox", str(self.inbox), "--outbox", str(self.outbox), *flags]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "LENSD_INBOX__SETTLE_SECONDS": "0"}
                | {"PYTHONPATH": os.pathsep.join(sys.path)}
                | environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def until(self, condition: Callable[[], object]) -> None:
        limit = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < limit, self.log.read_text()
            time.sleep(0.05)

    def told(self, event: str) -> list[dict]:
        return events(self.log, event)

    def ended(self) -> int:
        code = self.process.wait(WAIT_SECONDS)
        assert "Traceback" not in self.log.read_text()
        return code

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def tables(self) -> dict[str, list[list[dict]]]:
        """The rows of each published file, by the name of its input."""
        return {
            json.loads((folder / "manifest.json").read_text())["input"]["name"]: [
                pq.read_table(folder / name).to_pylist() for name in ("metrics.parquet", "features.parquet")
            ]
            for folder in self.outbox.iterdir()
            if not folder.name.startswith(".")
        }


@contextlib.contextmanager
def running(*args: object, **environment: str) -> Iterator[Run]:
    run = Run(*args, **environment)  # type: ignore[arg-type]
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()


def on(head: RayHead, workers: str = "1") -> list[str]:
    return ["--executor", "ray", "--workers", workers, "--ray-address", head.address]


def drop(folder: Path, files: int = 3) -> None:
    (folder / "inbox").mkdir(parents=True)
    for number in range(files):
        records = tiny.contrast_records(40)
        for record in records:
            record["prompt"] = f"{number} {record['prompt']}"
        tiny.write_json(folder / "inbox" / f"{number}.json", records)


def test_rows_are_those_of_the_local_executor(head, tiny_toml, tmp_path):
    for name in ("ray", "local"):
        drop(tmp_path / name)
    with running(tmp_path / "ray", tiny_toml, "--once", *on(head), **head.environment) as ray:
        assert ray.ended() == 0
    with running(tmp_path / "local", tiny_toml, "--once") as local:
        assert local.ended() == 0
    assert len(ray.tables()) == 3
    assert ray.tables() == local.tables()  # to the last bit


def test_a_cluster_of_its_own_ends_with_it(tiny_toml, tmp_path):
    drop(tmp_path, 1)
    with running(tmp_path, tiny_toml, "--executor", "ray", "--workers", "2") as run:
        run.until(lambda: len(run.told("worker.ready")) == 2)
        run.until(lambda: run.tables())
        assert any("raylet" in command for command in processes_of_cluster(run))
        assert run.stop() == 0
    limit = time.monotonic() + WAIT_SECONDS
    while processes_of_cluster(run):
        assert time.monotonic() < limit, processes_of_cluster(run)
        time.sleep(0.05)
    assert not [line for line in run.log.read_text().splitlines() if not line.startswith("{")]


def processes_of_cluster(run: Run) -> list[str]:
    """The command lines of Ray's processes that this daemon started: Ray names its session by the daemon."""
    return [command for _, _, command in all_processes() if f"_{run.process.pid}/" in command]


def test_workers_are_replaced_and_join_and_leave_with_their_nodes(head, tiny_toml, tmp_path):
    with running(tmp_path, tiny_toml, *on(head, "auto"), **head.environment) as run:
        run.until(lambda: run.told("worker.ready"))
        (worker,) = head.workers()
        os.kill(worker, signal.SIGKILL)
        run.until(lambda: len(run.told("worker.ready")) == 2)
        assert [event["worker"] for event in run.told("worker.restarting")] == [0]
        node = head.add_node(cpus=1)
        run.until(lambda: len(run.told("worker.ready")) == 3)
        assert {event["worker"] for event in run.told("worker.ready")} == {0, 1}
        drop_late(tmp_path, 0)
        run.until(lambda: len(run.tables()) == 1)
        head.remove_node(node)
        drop_late(tmp_path, 1)
        run.until(lambda: len(run.tables()) == 2)
        assert run.stop() == 0
    assert len(run.tables()["1.json"][0]) == 40


def drop_late(folder: Path, number: int) -> None:
    records = tiny.contrast_records(40)
    for record in records:
        record["prompt"] = f"{number} {record['prompt']}"
    tiny.write_json(folder / "draft", records)
    (folder / "draft").rename(folder / "inbox" / f"{number}.json")


@pytest.mark.parametrize(
    ("address", "code", "said"),
    [
        ("127.0.0.1:{port}", 3, "lensd: the Ray cluster at 127.0.0.1:{port}: no answer"),
        ("nowhere", 2, "lensd: executor.address = nowhere: expected HOST:PORT"),
        (
            "ray://127.0.0.1:10001",
            2,
            "lensd: executor.address = ray://127.0.0.1:10001: addresses of Ray Client",
        ),
    ],
)
def test_a_cluster_that_cannot_be_had_ends_a_drain_in_one_line(tiny_toml, tmp_path, address, code, said):
    port = free_port()
    (tmp_path / "inbox").mkdir()
    command = [sys.executable, "-m", "daemon.cli", "run", "--once", "--config", str(tiny_toml)]
    command += ["--inbox", str(tmp_path / "inbox"), "--outbox", str(tmp_path / "outbox"), "--executor", "ray"]
    command += ["--log-format", "console", "--ray-address", address.format(port=port)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lensd: ")]
    assert line.startswith(said.format(port=port))
    assert "Traceback" not in done.stderr + done.stdout


def test_a_daemon_waits_for_its_cluster(tiny_toml, tmp_path):
    late = RayHead(cpus=1)
    with running(tmp_path, tiny_toml, *on(late), **late.environment) as run:
        run.until(lambda: run.told("workers.missing"))
        late.start()
        try:
            drop_late(tmp_path, 0)
            run.until(lambda: run.tables())
            assert run.stop() == 0
        finally:
            late.kill()
