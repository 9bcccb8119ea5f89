"""The dashboard asks for what is there: every expression of it, on a real Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from daemon.observe.metrics import Metrics
from tests.deploy.monitored import DEPLOY, WORKERS

GRAFANA = DEPLOY / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "lensd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"instance": ".*", "__rate_interval": "10m"}  # wide enough for the whole run
WANTED = {  # what operators expect to see -> metrics that show it
    "backlog and oldest age": {"lensd_inbox_files", "lensd_oldest_pending_seconds"},
    "files and samples by outcome": {"lensd_files_total", "lensd_samples_total"},
    "tokens, computed against text": {"lensd_tokens_total"},
    "stages": {"lensd_stage_duration_seconds_bucket"},
    "queue depths": {"lensd_queue_items", "lensd_queue_tokens"},
    "device": {"lensd_device_busy_ratio", "lensd_device_memory_bytes", "lensd_buffer_pool_bytes"},
    "batch sizes": {"lensd_batch_tokens_bucket"},
    "L0 and FVU": {"lensd_feature_l0_sum", "lensd_sae_fvu"},
    "disk": {"lensd_disk_free_bytes", "lensd_disk_size_bytes"},
    "workers": {
        "lensd_workers",
        "lensd_workers_wanted",
        "lensd_worker_samples_total",
        "lensd_worker_busy_seconds_total",
        "lensd_worker_restarts_total",
        "lensd_coordinator_busy_ratio",
    },
    "restarts and version": {"process_start_time_seconds", "lensd_build_info", "lensd_model_info"},
}


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]


EXPRESSIONS = list(expressions())
OF_WORKERS = [entry for entry in EXPRESSIONS if "lensd_worker_" in entry[1]]  # nothing without any
OTHERS = [entry for entry in EXPRESSIONS if entry not in OF_WORKERS]


def substituted(expression: str) -> str:
    """With Grafana's variables replaced, all of which must be known."""
    return re.sub(r"\$(\w+)", lambda match: VARIABLES[match[1]], expression)


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
    (busy,) = [value for _, value in monitored.query(substituted(shown["Device busy A"]))]
    assert 0 < busy <= 1
    ((_, shared),) = monitored.query(substituted(shown["Computed per text token A"]))
    assert 0 < shared < 1  # the three texts of a record begin alike
    p50, p99 = (
        {labels["stage"]: value for labels, value in monitored.query(substituted(shown[title]))}
        for title in ("Stage duration, p50 A", "Stage duration, p99 A")
    )
    assert {"read", "tokenize", "forward", "sae", "analysis", "write", "commit"} <= p50.keys()
    assert all(p50[stage] <= p99[stage] for stage in p50)


@pytest.mark.parametrize("what", WANTED)
def test_the_dashboard_shows_what_operators_expect(what):
    asked = " ".join(expression for _, expression in EXPRESSIONS)
    assert all(re.search(rf"\b{metric}\b", asked) for metric in WANTED[what])


def test_every_metric_is_on_the_dashboard():
    asked = " ".join(expression for _, expression in EXPRESSIONS)
    for described in Metrics(CollectorRegistry()).descriptions:
        assert described.name in asked or described.name.startswith("process_"), described.name


def test_every_panel_has_a_title_and_asks_the_chosen_data_source():
    titles = [panel["title"] for panel in PANELS]
    assert len(set(titles)) == len(titles)
    for panel in PANELS:
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    chosen = DASHBOARD["templating"]["list"][0]
    assert (chosen["name"], chosen["type"], chosen["query"]) == ("datasource", "datasource", "prometheus")


def test_no_two_panels_overlap_and_identifiers_are_unique():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at: dict[str, Any] = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_the_provisioning_names_the_data_source_and_the_folder_of_dashboards():
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["uid"], source["isDefault"]) == ("prometheus", "prometheus", True)
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/lensd.yml").read_text())["providers"]
    assert provider["options"]["path"].startswith("/")
