"""A real Prometheus finds in a real daemon what the daemon's folders hold, and answers all that is asked.

All that needs the two is in this one file, since each process of tests starts its own.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from prometheus_client import CollectorRegistry

from daemon.observe.metrics import Metrics
from daemon.tools import metrics_table
from tests.deploy.asked import ALERTS, DASHBOARD, EXPRESSIONS, NAMES, OF_WORKERS, OTHERS, rules, substituted
from tests.deploy.monitored import BAD_RECORDS, FILE_RECORDS, FILES, UNUSABLE, WORKERS, Monitored


def manifests(pair: Monitored) -> list[tuple[Path, dict]]:
    paths = pair.outbox.glob("[!.]*/manifest.json")
    return [(path.parent, json.loads(path.read_bytes())) for path in paths]


def by_label(pair: Monitored, metric: str, label: str) -> dict[str, float]:
    return {labels[label]: value for labels, value in pair.query(metric) if value}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.endswith(".reason.json")}


def test_prometheus_counts_the_files_that_the_folders_hold(monitored):
    committed = len(manifests(monitored))
    done, failed = names(monitored.inbox / "done"), names(monitored.inbox / "failed")
    assert by_label(monitored, "lensd_files_total", "outcome") == {
        "committed": committed,
        "failed": len(failed),
        "duplicate": len(done) - committed,
    }
    assert (committed, failed, len(done)) == (FILES, set(UNUSABLE), FILES + 1)
    assert monitored.value("lensd_file_latency_seconds_count") == committed


def test_prometheus_counts_the_samples_that_the_outbox_holds(monitored):
    rows = sum(pq.read_metadata(folder / "metrics.parquet").num_rows for folder, _ in manifests(monitored))
    reasons = Counter(
        json.loads(line)["reason"]
        for path in monitored.outbox.glob("[!.]*/rejects.jsonl")
        for line in path.read_bytes().splitlines()
    )
    assert by_label(monitored, "lensd_samples_total", "outcome") == {
        "committed": rows,
        "rejected": reasons.total(),
    }
    assert by_label(monitored, "lensd_rejects_total", "reason") == reasons
    assert (rows + reasons.total(), reasons.total()) == (FILES * FILE_RECORDS, BAD_RECORDS)


def test_prometheus_counts_the_bytes_that_were_read_and_published(monitored):
    published = [content for _, content in manifests(monitored)]
    failed = [
        path for path in (monitored.inbox / "failed").iterdir() if not path.name.endswith(".reason.json")
    ]
    read = sum(path.stat().st_size for path in failed)
    assert monitored.value("lensd_input_bytes_total") == sum(c["input"]["bytes"] for c in published) + read
    sizes = [file["bytes"] for content in published for file in content["files"]]
    assert monitored.value("lensd_output_bytes_total") == sum(sizes)


def test_prometheus_counts_the_tokens_and_features_that_the_tables_hold(monitored):
    tokens, features = 0, Counter()
    for folder, _ in manifests(monitored):
        table = pq.read_table(folder / "metrics.parquet")
        columns = [name for name in table.column_names if name.startswith("n_tokens_")]
        tokens += sum(pc.sum(table[name]).as_py() for name in columns)
        sparse = pq.read_table(folder / "features.parquet", columns=["layer", "indices"])
        counts = pc.list_value_length(sparse["indices"]).to_pylist()
        for layer, count in zip(sparse["layer"].to_pylist(), counts, strict=True):
            features[str(layer)] += count
    assert monitored.value('lensd_tokens_total{kind="text"}') == tokens
    assert by_label(monitored, "lensd_feature_l0_sum", "layer") == features
    assert monitored.value("lensd_batch_tokens_sum") == monitored.value('lensd_tokens_total{kind="computed"}')


def test_every_metric_is_scraped_with_the_labels_that_are_described(monitored):
    for described in Metrics(CollectorRegistry()).descriptions:
        if described.name.startswith("lensd_worker_"):
            continue  # of one worker
        suffix = "_count" if described.kind == "histogram" else ""
        series = monitored.query(f"{described.name}{suffix}")
        assert series, described.name
        for labels, _ in series:
            wanted = {label.name for label in described.labels}
            assert labels.keys() - {"__name__", "job", "instance"} == wanted


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_prometheus_counts_what_each_worker_computed(monitored_workers):
    pair = monitored_workers
    for described in Metrics(CollectorRegistry()).descriptions:
        if described.name.startswith("lensd_worker_"):
            assert by_label(pair, f"{described.name} + 1", "worker").keys() == {"0", "1"}, described.name
    rows = sum(pq.read_metadata(folder / "metrics.parquet").num_rows for folder, _ in manifests(pair))
    assert rows == FILES * FILE_RECORDS - BAD_RECORDS
    assert pair.value("sum(lensd_worker_samples_total)") == rows
    assert pair.value("sum(lensd_worker_batches_total)") == pair.value("lensd_batches_total")
    assert pair.value("min(lensd_worker_busy_seconds_total)") > 0
    assert pair.value("min(lensd_worker_memory_bytes)") > 100 << 20
    assert pair.value("sum(lensd_worker_restarts_total)") == 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_gauges_of_an_executor_with_workers_fit_each_other(monitored_workers):
    pair = monitored_workers
    assert by_label(pair, "lensd_workers", "state") == {"ready": WORKERS}
    assert pair.value("lensd_workers_wanted") == WORKERS
    assert pair.value("lensd_executor_slots") == 2 * WORKERS
    assert pair.value("max_over_time(lensd_batches_in_flight[10m])") <= 2 * WORKERS
    assert 0 < pair.value("max_over_time(lensd_coordinator_busy_ratio[10m])") < 4
    assert pair.value("lensd_device_busy_ratio") == 0  # that is of the daemon's own


def test_a_daemon_that_computes_itself_has_no_workers(monitored):
    assert monitored.value("sum(lensd_workers)") == monitored.value("lensd_workers_wanted") == 0
    assert monitored.value("lensd_executor_slots") == 1
    assert monitored.value("lensd_coordinator_busy_ratio") > 0


def test_the_gauges_of_this_moment_are_those_of_a_daemon_that_is_idle(monitored):
    for metric in ("lensd_inbox_files", "lensd_inbox_bytes", "lensd_queue_tokens", "sum(lensd_queue_items)"):
        assert monitored.value(metric) == 0, metric
    resident = monitored.value('lensd_device_memory_bytes{kind="resident"}')
    assert resident == pytest.approx(monitored.value("process_resident_memory_bytes"), rel=0.5)
    assert monitored.value("lensd_buffer_pool_bytes") > 0
    assert 0 < monitored.value("max(lensd:disk_free:ratio)") < 1
    assert monitored.value("lensd_last_commit_timestamp_seconds - process_start_time_seconds") > 0


def test_no_label_holds_a_path_an_id_or_a_text(monitored):
    values = {
        value
        for labels in monitored.api("series", **{"match[]": '{job="lensd"}'})
        for name, value in labels.items()
        if name != "instance"
    }
    assert not [value for value in values if "/" in value or ".json" in value or "number after" in value]


def test_the_number_of_series_is_what_the_documentation_says(monitored):
    own = monitored.value('count({job="lensd", __name__=~"(lensd_|process_).*"})')
    text = metrics_table.README.read_text(encoding="utf-8")
    (said,) = re.findall(r"a daemon\s+has\s+about (\d+) series with three SAEs", text)
    assert own == pytest.approx(int(said), rel=0.1)


def test_the_table_of_metrics_in_the_documentation_is_up_to_date():
    text = metrics_table.README.read_text(encoding="utf-8")
    assert metrics_table.with_table(text) == text, "run: python -m daemon.tools.metrics_table"


@pytest.mark.parametrize("expression", [e for _, e in OTHERS], ids=[name for name, _ in OTHERS])
def test_every_expression_of_the_dashboard_returns_data(monitored, expression):
    assert monitored.query(substituted(expression))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("expression", [e for _, e in OF_WORKERS], ids=[name for name, _ in OF_WORKERS])
def test_every_expression_about_workers_tells_them_apart(monitored_workers, expression):
    series = monitored_workers.query(substituted(expression))
    assert {labels["worker"] for labels, _ in series} == set(map(str, range(WORKERS)))


def test_the_annotations_and_the_variable_ask_for_what_is_there(monitored):
    for annotation in DASHBOARD["annotations"]["list"]:
        monitored.query(substituted(annotation["expr"]))  # parses; a healthy run has no restart to mark
    _, variable = DASHBOARD["templating"]["list"]
    series = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
    assert all(series[2] in labels for labels, _ in monitored.query(series[1]))
    assert monitored.query(series[1])


def test_quantiles_and_ratios_of_the_dashboard_are_plausible(monitored):
    shown = dict(EXPRESSIONS)
    busy = monitored.value(f"max_over_time({substituted(shown['Device busy A'])}[10m])")
    assert 0 < busy <= 1
    ((_, shared),) = monitored.query(substituted(shown["Computed per text token A"]))
    assert 0 < shared < 1  # the three texts of a record begin alike
    p50, p99 = (
        {labels["stage"]: value for labels, value in monitored.query(substituted(shown[title]))}
        for title in ("Stage duration, p50 A", "Stage duration, p99 A")
    )
    assert {"read", "tokenize", "forward", "sae", "analysis", "write", "commit"} <= p50.keys()
    assert all(p50[stage] <= p99[stage] for stage in p50)


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_no_alert_holds_in_a_healthy_run(monitored, rule):
    usage = shutil.disk_usage(monitored.outbox)
    if rule["alert"] == "LensdDiskLow" and usage.free < 0.11 * usage.total:
        pytest.skip("the disk of this machine is low indeed")
    assert monitored.query(rule["expr"]) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_no_alert_holds_where_workers_are_well(monitored_workers, rule):
    if rule["alert"] != "LensdDiskLow":
        assert monitored_workers.query(rule["expr"]) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["LensdWorkersMissing", "LensdWorkerRestarting", "LensdCoordinatorBound"])
def test_alerts_about_workers_compare_what_is_there(monitored_workers, name):
    """The same with bounds that hold for a daemon that is well."""
    (expression,) = (rule["expr"] for rule in ALERTS if rule["alert"] == name)
    loose = re.sub(r"> (0|2|600|0\.85)(?=\s|$)", "> -1", expression).replace("< 0.8 *", "< 2 *")
    assert loose != expression
    found = monitored_workers.query(loose)
    assert len(found) == (WORKERS if name == "LensdWorkerRestarting" else 1)


def test_the_server_evaluates_every_rule_and_none_is_pending_or_firing(monitored):
    groups = monitored.api("rules")["groups"]
    evaluated = [rule for group in groups for rule in group["rules"]]
    assert {rule["name"] for rule in evaluated} == {*NAMES, *(r["record"] for r in rules("recording.yml"))}
    usage = shutil.disk_usage(monitored.outbox)
    low = {"LensdDiskLow"} if usage.free < 0.11 * usage.total else set()
    for rule in evaluated:
        assert (rule["health"], rule.get("lastError")) == ("ok", None), rule["name"]
        assert rule.get("state", "inactive") == "inactive" or rule["name"] in low, rule["name"]


@pytest.mark.parametrize("rule", rules("recording.yml"), ids=lambda rule: rule["record"])
def test_every_recording_rule_gives_numbers(monitored, rule):
    assert monitored.query(rule["record"])
