"""The model of scale: its limits by hand, and what must hold whatever the costs are."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest

from daemon.tools.scale import main
from daemon.tools.scale_setup import WORKLOADS, Prediction, Setup
from daemon.tools.scale_simulation import FILE_OPERATIONS, Simulation

PAGE = Path(__file__).parents[2] / "deploy" / "ray" / "SCALE.md"
EVEN = dataclasses.replace(
    Setup(), spread=0.0, tail=0.0, mtbf_hours=1e9
)  # no chance but the order of samples
FREE = dataclasses.replace(  # all costs nothing but workers
    EVEN, sample_ms=0, mb_ms=0, file_ms=0, batch_ms=0, worker_us=0, op_ms=0, sync_ms=0, latency_ms=0,
    link_gbps=1e6, store_ops=1e9, store_gbps=1e6,
)  # fmt: skip


def predict(setup: Setup, workers: int, daemons: int = 1, samples: int | None = None) -> Prediction:
    return Simulation(setup, workers, daemons, samples, seed=0).run()


def rate(setup: Setup, workers: int, daemons: int = 1, **changes: float) -> float:
    return predict(dataclasses.replace(setup, **changes), workers, daemons).samples_per_second


def test_one_worker_that_never_waits_computes_its_samples_and_nothing_else():
    found = predict(FREE, 1)
    assert found.samples_per_second == pytest.approx(1000 / 26, rel=0.01)
    assert found.efficiency == pytest.approx(1, rel=0.01)
    assert found.binds == "workers"


def test_the_slot_that_waits_hides_the_way_to_a_worker_and_back():
    assert rate(FREE, 1, latency_ms=500) == pytest.approx(1000 / 26, rel=0.01)
    # One batch at a time waits for both ways.
    alone = 140 / (140 * 0.026 + 2 * 0.5)
    assert rate(FREE, 1, latency_ms=500, slots=1, file_samples=140) == pytest.approx(alone, rel=0.01)


def test_workers_multiply_under_a_daemon_that_costs_nothing():
    assert rate(FREE, 64) == pytest.approx(64 * 1000 / 26, rel=0.01)


@pytest.mark.parametrize("workers", [300, 600])
def test_a_daemon_s_core_bounds_what_any_number_of_workers_brings(workers):
    found = predict(dataclasses.replace(FREE, sample_ms=0.25), workers)
    assert found.samples_per_second == pytest.approx(4000, rel=0.02)
    assert found.binds == "daemon's core"


def test_the_daemon_s_cost_adds_up_from_samples_results_files_batches_and_workers():
    costs = {"sample_ms": 0.2, "mb_ms": 100, "parquet_kb": 1, "file_ms": 10, "batch_ms": 1.4, "worker_us": 10}
    ms = 0.2 + 0.1 + 10 / 140 + 1.4 / 140 + 0.01 * 512 / 140
    assert rate(FREE, 512, file_samples=140, **costs) == pytest.approx(1000 / ms, rel=0.02)


def test_cores_and_daemons_multiply_what_a_core_bounds():
    assert rate(FREE, 512, sample_ms=0.25, cores=2) == pytest.approx(8000, rel=0.02)
    assert rate(FREE, 512, daemons=2, sample_ms=0.25) == pytest.approx(8000, rel=0.02)


def test_the_store_s_operations_bound_all_daemons_together():
    bound = 1000 / (FILE_OPERATIONS + 1)
    for daemons in (1, 4):
        found = predict(dataclasses.replace(FREE, file_samples=1, store_ops=1000), 64, daemons)
        assert found.samples_per_second == pytest.approx(bound, rel=0.02)
        assert found.binds == "store operations"


def test_renames_under_the_lock_between_daemons_do_not_overlap():
    setup = dataclasses.replace(FREE, file_samples=1, op_ms=10)
    assert predict(setup, 64, 1).samples_per_second == pytest.approx(1000 / 30, rel=0.02)  # and one to done/
    found = predict(setup, 64, 8)
    assert found.samples_per_second == pytest.approx(1000 / 20, rel=0.02)
    assert found.binds == "publishing lock"


def test_syncs_of_a_group_s_files_overlap():
    ms = 100 * (4 / 16 + 3 / 256)
    assert rate(FREE, 64, file_samples=1, sync_ms=100) == pytest.approx(1000 / ms, rel=0.05)


def test_the_network_and_the_store_bound_by_their_bytes():
    assert rate(FREE, 64, back_kb=1000, link_gbps=0.1) == pytest.approx(100, rel=0.02)
    assert rate(FREE, 64, parquet_kb=1000, store_gbps=0.1) == pytest.approx(100, rel=0.02)


def test_a_job_of_one_batch_for_each_worker_gains_nothing_from_more_of_them():
    setup = dataclasses.replace(FREE, slots=1, file_samples=140, load_seconds=0.0, model_gb=0.0)
    seconds = {n: 64 * 140 / predict(setup, n, samples=64 * 140).samples_per_second for n in (1, 32, 64, 640)}
    batch = 140 * 0.026
    assert seconds[1] == pytest.approx(64 * batch, rel=0.01)
    assert seconds[32] == pytest.approx(2 * batch, rel=0.01)
    assert seconds[64] == pytest.approx(batch, rel=0.01)
    assert seconds[640] == pytest.approx(batch, rel=0.01)
    assert predict(setup, 640, samples=64 * 140).binds == "tail"


def test_all_workers_of_a_job_load_over_the_same_store():
    setup = dataclasses.replace(FREE, store_gbps=2.0, model_gb=10.0, per_node=1, file_samples=140)
    found = predict(setup, 100, samples=100 * 140)
    assert found.load_seconds == pytest.approx(20 + 100 * 10 / 2)
    assert found.binds == "loading"
    assert predict(dataclasses.replace(setup, load_gbps=1.0), 100, samples=100 * 140).load_seconds == 1020


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_same_seed_gives_the_same_prediction(workload):
    first, again, other = (Simulation(WORKLOADS[workload], 16, 2, None, seed).run() for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("workload", WORKLOADS)
def test_more_workers_bring_no_less_and_never_more_than_each_of_them_alone(workload):
    setup = dataclasses.replace(WORKLOADS[workload], spread=0.0, tail=0.0, worker_us=0.0)
    found = [predict(setup, workers) for workers in (1, 2, 4, 16, 64, 256)]
    rates = [one.samples_per_second for one in found]
    assert all(more >= 0.98 * fewer for fewer, more in itertools.pairwise(rates))
    assert all(one.efficiency < 1.02 and max(one.busy.values()) < 1.02 for one in found)


def test_dearer_is_never_faster():
    fast = rate(EVEN, 64)
    for name in ("worker_sample_ms", "sample_ms", "mb_ms", "file_ms", "back_kb"):
        assert rate(EVEN, 64, **{name: 8 * getattr(EVEN, name)}) <= 1.05 * fast, name


def test_every_file_is_published_though_workers_are_lost():
    setup = dataclasses.replace(EVEN, mtbf_hours=0.05)
    simulation = Simulation(setup, 16, 2, 50_000, seed=0)
    slower = simulation.run()
    assert (simulation.published > simulation.claimed).all()
    assert slower.samples_per_second < predict(EVEN, 16, 2, 50_000).samples_per_second


def test_a_large_file_is_computed_in_parts():
    large = predict(dataclasses.replace(FREE, file_samples=10_000), 64)
    assert large.samples_per_second == pytest.approx(64 * 1000 / 26, rel=0.02)


def test_stragglers_leave_the_mean_and_lengthen_the_tail():
    setup = dataclasses.replace(FREE, spread=0.2, tail=0.02)
    simulation = Simulation(setup, 1, 1, None, seed=0)
    assert sum(simulation.slowness() for _ in range(100_000)) / 100_000 == pytest.approx(1, abs=0.02)
    assert predict(setup, 64).tail_seconds > 2 * predict(FREE, 64).tail_seconds


@pytest.mark.parametrize(
    "bad",
    [
        "--workers 0", "--workers 1,x", "--workers -3", "--workload none", "--samples 0", "--cores 0",
        "--cores nan", "--slots 1.5", "--tail 2", "--mtbf-hours 0.001", "--store-ops -1", "--seed -2",
        "--workers 2 --daemons 4", "--no-such",
    ],
)  # fmt: skip
def test_a_bad_argument_is_told_in_one_line(bad, capsys):
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(bad))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"scale: .+\n", err)


def test_it_prints_a_table_or_a_line_of_json_for_each(capsys):
    assert main(["--workers", "1,2", "--daemons", "1,2", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["workers"], line["daemons"]) for line in lines] == [(1, 1), (2, 1), (2, 2)]
    assert set(lines[0]) == {field.name for field in dataclasses.fields(Prediction)}
    assert main(["--workers", "1,2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def tables() -> list[tuple[str, list[str]]]:
    """The commands of the page, and the rows below each that take no long time to compute."""
    blocks = re.findall(
        r"```text\n\$ python -m daemon\.tools\.scale (.*)\n(.*\n.*\n(?:.*\n)+?)```", PAGE.read_text()
    )
    return [
        (command, [row for row in rows.splitlines()[2:] if int(row.split()[0]) <= 64])
        for command, rows in blocks
    ]


@pytest.mark.parametrize(("command", "rows"), [(command, rows) for command, rows in tables() if rows])
def test_the_page_has_what_the_command_prints(command, rows, capsys):
    arguments = dict(itertools.pairwise(shlex.split(command)))
    arguments["--workers"] = ",".join(dict.fromkeys(row.split()[0] for row in rows))
    assert main([part for option in arguments.items() if option[0].startswith("--") for part in option]) == 0
    printed = capsys.readouterr().out.splitlines()[2:]
    assert len(printed) == len(rows) > 0
    for now, then in zip(printed, rows, strict=True):
        assert now.split()[:2] == then.split()[:2]
        rates = [float(row.split()[2].replace(",", "")) for row in (now, then)]
        assert rates[0] == pytest.approx(rates[1], rel=0.05)
        assert now.split()[9:] == then.split()[9:]
