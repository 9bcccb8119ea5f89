"""`lensd check-config` tries a cluster: one worker loads the model, and is gone then."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray")

from daemon.errors import ConfigError, MachineError
from daemon.executor import ray_trial
from daemon.executor.ray_trial import try_worker
from daemon.executor.worker import Build, Loaded
from tests.reliability.daemons import ROOT
from tests.reliability.ray_head import free_port
from tests.support.fakes import INFO
from tests.support.ray_cluster import FakeActor, FakeCluster, Reference


def load(measures: bool) -> Loaded:
    pytest.fail("nothing is loaded in this process")


async def test_one_worker_loads_the_model_and_ends():
    cluster = FakeCluster(8)
    assert await try_worker(cluster, load) == (INFO, "node0")  # type: ignore[arg-type]
    assert len(cluster.actors) == 1
    assert cluster.living == []


@pytest.mark.parametrize("error", [ConfigError("no such model"), MachineError("the device is too small")])
async def test_it_raises_what_the_worker_says_of_the_model(error):
    cluster = FakeCluster()
    cluster.errors["load"] = error
    with pytest.raises(type(error), match=str(error)):
        await try_worker(cluster, load)  # type: ignore[arg-type]
    assert cluster.living == []


async def test_a_worker_of_another_build_is_named():
    cluster = FakeCluster()
    cluster.build = dataclasses.replace(Build.here(), lensd="0.0.1")
    with pytest.raises(MachineError, match=r"node0 runs lensd 0\.0\.1 .*: install the same"):
        await try_worker(cluster, load)  # type: ignore[arg-type]
    assert cluster.living == []


async def test_a_cluster_without_room_for_a_worker_is_told_at_once():
    cluster = FakeCluster()
    cluster.rooms = 0
    with pytest.raises(MachineError, match="has no node for a worker, which takes 1 CPU: add one"):
        await try_worker(cluster, load)  # type: ignore[arg-type]
    assert cluster.actors == []


async def test_a_cluster_whose_places_are_taken_is_told_after_a_while(monkeypatch):
    monkeypatch.setattr(ray_trial, "PLACE_SECONDS", 0.01)
    cluster = FakeCluster()
    monkeypatch.setattr(FakeActor, "_call", lambda *_: Reference())
    with pytest.raises(MachineError, match="no worker began within 0 s: it takes 1 CPU, which other"):
        await try_worker(cluster, load)  # type: ignore[arg-type]


async def test_a_worker_that_dies_is_told(monkeypatch):
    cluster = FakeCluster()
    start = cluster.worker

    def dead() -> FakeActor:
        actor = start()
        actor.die()
        return actor

    cluster.worker = dead  # type: ignore[method-assign]
    with pytest.raises(MachineError, match="the fake cluster: the worker was lost: it is dead"):
        await try_worker(cluster, load)  # type: ignore[arg-type]


def check_config(folder: Path, toml: Path, *flags: str, before: str = "") -> subprocess.CompletedProcess[str]:
    program = f"import sys\n{before}\nfrom daemon.cli import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "check-config", "--config", str(toml), "--executor", "ray"]
    command += ["--inbox", str(folder / "inbox"), "--outbox", str(folder / "outbox"), *flags]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_check_config_says_what_it_would_start(tiny_toml, tmp_path):
    result = check_config(tmp_path, tiny_toml, "--workers", "3")
    assert result.returncode == 0, result.stderr
    node, cluster, model, *saes, folders = result.stdout.splitlines()
    assert re.fullmatch(r"ok: node \S+ \(\S+\): CPUs \d+, GPUs \d+, room for \d+ workers?", node)
    expected = r"ok: the Ray cluster on this machine: 3 workers wanted, room for \d+; each takes 1 CPU\b.*"
    assert re.fullmatch(expected, cluster)
    assert re.fullmatch(r"ok: model \(.* d_model 32\) in float32 on \S+, loaded by a worker on \S+", model)
    assert "ok: blocks.1.hook_resid_post: sae-1 (jumprelu, d_sae 96)" in saes
    assert folders.startswith("ok: inbox ")
    assert not [line for line in result.stderr.splitlines() if "Traceback" in line]


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line_and_exits_3(tiny_toml, tmp_path):
    address = f"127.0.0.1:{free_port()}"
    result = check_config(tmp_path, tiny_toml, "--ray-address", address)
    assert (result.returncode, result.stdout) == (3, "")
    assert result.stderr.startswith(f"lensd: the Ray cluster at {address}: no answer")
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_machine_without_ray_is_one_line_and_exits_2(tiny_toml, tmp_path):
    result = check_config(tmp_path, tiny_toml, before="sys.modules['ray'] = None")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == 'lensd: executor.kind = "ray" needs Ray: pip install "lensd[ray]"\n'


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_no_worker_finds_is_one_line_and_exits_2(tiny_toml, tmp_path):
    result = check_config(tmp_path, tiny_toml, "--model", str(tmp_path / "nowhere"))
    assert result.returncode == 2
    assert [line.startswith("lensd: ") for line in result.stderr.splitlines()] == [True]
