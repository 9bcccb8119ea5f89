"""Every alert fires in its unit test, and says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.asked import ALERTS, NAMES
from tests.deploy.monitored import DEPLOY, PROMETHEUS

UNIT_TESTS = PROMETHEUS / "tests" / "alerts.yml"
SEVERITIES = ("critical", "warning", "info")


def promtool(*arguments: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on this machine (Debian: apt install prometheus)")
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_configuration():
    promtool("check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.parametrize("file", ["alerts.yml", "recording.yml"])
def test_promtool_accepts_the_rules(file):
    promtool("check", "rules", "--lint-fatal", PROMETHEUS / "rules" / file)


def test_every_alert_fires_in_trouble_and_stays_quiet_short_of_it():
    promtool("test", "rules", UNIT_TESTS)


def expectations() -> list[tuple[str, bool]]:
    """Of every unit test: what is looked at, and whether it is expected to be there."""
    found = []
    for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        for look in test.get("promql_expr_test", []):
            found += [(sample["labels"], True) for sample in look["exp_samples"]]
            if not look["exp_samples"]:
                found.append((test["name"], False))
        for look in test.get("alert_rule_test", []):
            found.append((f'alertname="{look["alertname"]}"', bool(look["exp_alerts"])))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_tests_expect_every_alert_to_fire(name):
    assert any(f'alertname="{name}"' in what and fires for what, fires in expectations())


def test_the_unit_tests_give_each_alert_its_own_quiet_neighbour():
    """A test of one alert has a series that must not fire, beside the one that must."""
    for test in yaml.safe_load(UNIT_TESTS.read_text())["tests"]:
        instances = re.findall(r'instance="(\w+):', " ".join(s["series"] for s in test["input_series"]))
        assert "good" in instances or "knows no daemon" in test["name"], test["name"]


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule):
    assert rule["labels"]["severity"] in SEVERITIES
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert DEPLOY.parent / file == DEPLOY / "README.md"
    runbook = (DEPLOY / "README.md").read_text().partition("\n### Alerts and what to do\n")[2]
    runbook = re.split(r"^##? ", runbook, flags=re.MULTILINE)[0]
    sections = dict(re.findall(r"^#### (\w+)\n(.*?)(?=^#|\Z)", runbook, re.MULTILINE | re.DOTALL))
    assert anchor == rule["alert"].lower()
    assert len(sections[rule["alert"]].split()) > 20
