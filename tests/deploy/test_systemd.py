"""The units: what systemd says of them, and that what they name exists."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.arguments import parser
from daemon.cli import COMMANDS
from daemon.config import load_config
from daemon.observe.health import HEARTBEAT_STALE_SECONDS
from daemon.supervisor import EXTEND_SECONDS, LOOK_SECONDS

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
NAMES = ("lensd.service", "lensd@.service")
OF_THE_INSTANCE = {
    "Description=lensd on GPU %i: SAE features of the texts dropped into its inbox",
    "Environment=CUDA_VISIBLE_DEVICES=%i",
    "Environment=LENSD_MODEL__DEVICE=cuda",
    "Environment=LENSD_HTTP__ADDRESS=127.0.0.1:948%i",
    "EnvironmentFile=-/etc/lensd/lensd-%i.env",
    "SyslogIdentifier=lensd-%i",
}
PROGRAM = "/opt/lensd/bin/lensd"

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: systemd)"
)


def settings(name: str) -> list[str]:
    """The unit's lines without comments."""
    lines = (UNITS / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def value(name: str, key: str) -> str:
    (found,) = [line.partition("=")[2] for line in settings(name) if line.startswith(f"{key}=")]
    return found


def environment(name: str) -> dict[str, str]:
    pairs = [line.removeprefix("Environment=") for line in settings(name) if line.startswith("Environment=")]
    return dict(pair.split("=", 1) for pair in pairs)


@pytest.fixture
def installed(tmp_path) -> Path:
    """The units with a program that exists here."""
    for name in NAMES:
        text = (UNITS / name).read_text(encoding="utf-8").replace(PROGRAM, sys.executable)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def analyze(*arguments: object) -> str:
    done = subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_systemd
@pytest.mark.parametrize("name", ["lensd.service", "lensd@0.service"])
def test_systemd_finds_no_fault_with_the_units(installed, name):
    assert str(installed) not in analyze("verify", "--man=no", installed / name)


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
def test_little_is_exposed(installed, name):
    said = analyze("security", "--offline=true", "--no-pager", installed / name)
    found = re.search(r"Overall exposure level for \S+ ([\d.]+)", said)
    if found is None:
        pytest.skip("this systemd-analyze knows no security --offline")
    assert float(found[1]) < 3
    stated = re.search(r"Exposure ([\d.]+) of 10", (UNITS.parent / "README.md").read_text())
    assert stated is not None
    assert float(found[1]) == pytest.approx(float(stated[1]), abs=0.35), "deploy/README.md states another"


def test_an_instance_differs_only_where_it_names_itself():
    one, each = set(settings("lensd.service")), set(settings("lensd@.service"))
    assert each - one == OF_THE_INSTANCE
    assert {line.partition("=")[0] for line in one - each} == {"Description", "SyslogIdentifier"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["ExecStartPre", "ExecStart"])
def test_the_commands_are_ones_that_lensd_understands(name, key):
    program, *arguments = value(name, key).split()
    assert program == PROGRAM
    assert parser().parse_args(arguments).command in COMMANDS


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_and_the_example_are_a_valid_configuration(name):
    told = {key: text.replace("%i", "0") for key, text in environment(name).items()}
    config = load_config(UNITS / "lensd.toml", told, {})
    state = f"/var/lib/{value(name, 'StateDirectory')}"
    assert config.inbox.path.parent == config.outbox.path.parent == Path(state)  # one file system, writable
    assert told["LENSD_CACHE_DIR"] == f"/var/cache/{value(name, 'CacheDirectory')}"
    assert config.log.format == "json"
    assert config.http.address.startswith("127.0.0.1:")


@pytest.mark.parametrize("name", NAMES)
def test_a_reload_is_a_sighup_to_the_daemon(name):
    assert value(name, "ExecReload") == "/bin/kill -HUP $MAINPID"


def test_the_table_of_events_in_the_documentation_is_that_of_the_code():
    page = (UNITS.parent / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| Event \| Level .*\n\| --- .*\n((?:\|.*\n)+)", page, re.MULTILINE)
    said = {
        name: level
        for names, levels in (line.split("|")[1:3] for line in table.splitlines())
        for name, level in zip(*spread(re.findall(r"`(\S+?)`", names), levels), strict=True)
    }
    code = "".join(path.read_text(encoding="utf-8") for path in (UNITS.parents[1] / "daemon").rglob("*.py"))
    logged = re.findall(r"\blogs?\.(debug|info|warning|error|exception)(?:_each)?\(\s*\"([a-z_.]+)\"", code)
    assert said == {name: level.replace("exception", "error") for level, name in logged}


def spread(names: list[str], levels: str) -> tuple[list[str], list[str]]:
    """Names with their levels, of which one may be said for all."""
    told = [level.strip() for level in levels.split(",")]
    return names, told if len(told) == len(names) else told * len(names)


def test_instances_do_not_share_a_port_with_each_other_or_the_one():
    template = environment("lensd@.service")["LENSD_HTTP__ADDRESS"]
    taken = [load_config(None, {}).http.address]
    taken += [
        load_config(None, {"LENSD_HTTP__ADDRESS": template.replace("%i", str(n))}).http.address
        for n in range(10)
    ]
    assert len(set(taken)) == 11


@pytest.mark.parametrize("name", NAMES)
def test_the_times_fit_the_daemons(name):
    assert float(value(name, "WatchdogSec")) > HEARTBEAT_STALE_SECONDS > LOOK_SECONDS
    assert float(value(name, "TimeoutStopSec")) > EXTEND_SECONDS > HEARTBEAT_STALE_SECONDS
    assert int(value(name, "StartLimitBurst")) > load_config(None, {}).inbox.max_attempts
    assert value(name, "LimitCORE") == "0"


def test_folders_are_made_for_the_user_that_the_unit_runs_as():
    user = value("lensd.service", "User")
    assert f"u {user} " in (UNITS / "lensd.sysusers.conf").read_text()
    config = load_config(UNITS / "lensd.toml", {}, {})
    lines = (UNITS / "lensd.tmpfiles.conf").read_text().splitlines()
    made = {fields[1]: fields for fields in map(str.split, lines) if fields and fields[0] == "d"}
    for folder in (config.inbox.path, config.outbox.path):
        assert made[str(folder)][3:5] == [user, value("lensd.service", "Group")]
        assert made[str(folder)][2].startswith("2")  # dropped files get the daemon's group


def test_every_file_that_the_installation_names_is_there():
    page = (UNITS.parent / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"deploy/(?:systemd|container)/[\w.@-]+\w|deploy/constraints\.txt", page)
    assert {f"deploy/systemd/{name}" for name in NAMES} <= set(named)
    assert [name for name in named if not (UNITS.parents[1] / name).exists()] == []
