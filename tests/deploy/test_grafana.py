"""The dashboard shows what operators expect, and its file is sound."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from daemon.observe.metrics import Metrics
from tests.deploy.asked import DASHBOARD, EXPRESSIONS, GRAFANA, PANELS

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
