"""Every alert fires in its unit test, stays quiet in a healthy run, and says what to do."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.monitored import DEPLOY, PROMETHEUS, WORKERS

UNIT_TESTS = PROMETHEUS / "tests" / "alerts.yml"
SEVERITIES = ("critical", "warning", "info")


def rules(file: str) -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((PROMETHEUS / "rules" / file).read_text())["groups"]
    return group["rules"]


ALERTS = rules("alerts.yml")
NAMES = [rule["alert"] for rule in ALERTS]


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
