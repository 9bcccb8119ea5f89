"""What is asked of Prometheus: the dashboard's expressions, and the rules of alerts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml

from tests.deploy.monitored import DEPLOY, PROMETHEUS

GRAFANA = DEPLOY / "grafana"
DASHBOARD = json.loads((GRAFANA / "dashboards" / "lensd.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
VARIABLES = {"instance": ".*", "__rate_interval": "10m"}  # wide enough for the whole run


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


def rules(file: str) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "rules" / file).read_text())["groups"]
    return group["rules"]


ALERTS = rules("alerts.yml")
NAMES = [rule["alert"] for rule in ALERTS]
