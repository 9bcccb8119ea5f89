"""The container files: that what they name exists and what they set is what lensd and each other expect."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon.arguments import parser
from daemon.cli import COMMANDS
from daemon.config import load_config
from daemon.setting_layers import ENV_PREFIX

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "container"
TEXT = (FOLDER / "Containerfile").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
OBJECTS: dict[str, dict[str, Any]] = {
    entry["kind"]: entry
    for entry in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text(encoding="utf-8"))
}
POD = OBJECTS["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
MADE_BY_THE_USER = {"./data"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Containerfile, continued lines joined."""
    lines = [line for line in TEXT.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def last(name: str) -> str:
    return [rest for instruction, rest in instructions() if instruction == name][-1]


def image_environment() -> dict[str, str]:
    pairs = [pair for name, rest in instructions() if name == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def settings(environment: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in environment.items() if name.startswith(ENV_PREFIX)}


def test_everything_copied_is_there_and_in_the_context():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for name, rest in instructions():
        if name == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source}" in ignored, source
    assert ignored[next(i for i, line in enumerate(ignored) if not line.startswith("#"))] == "*"


def test_the_image_runs_without_privileges_and_drains_on_stop():
    assert last("USER") == "10001:10001"
    assert last("STOPSIGNAL") == "SIGTERM"
    entrypoint, command = ast.literal_eval(last("ENTRYPOINT")), ast.literal_eval(last("CMD"))
    assert entrypoint == ["lensd"]
    assert parser().parse_args(command).command in COMMANDS


def test_the_images_folders_are_on_its_one_volume():
    environment = image_environment()
    config = load_config(None, settings(environment))
    volume = Path(last("VOLUME"))
    folders = (config.inbox.path, config.outbox.path, environment["LENSD_CACHE_DIR"], environment["HF_HOME"])
    assert all(Path(folder).is_relative_to(volume) for folder in folders)


def test_the_health_check_asks_the_address_that_lensd_listens_on():
    (program,) = re.findall(r'"-c", "(.*)"\]', last("HEALTHCHECK"))
    compile(program, "HEALTHCHECK", "exec")
    port = load_config(None, {}).http.address.rpartition(":")[2]
    assert f"http://127.0.0.1:{port}/livez" in program
    assert last("EXPOSE") == port


def test_nothing_in_the_image_or_beside_it_is_of_no_stated_version():
    images = [service["image"] for service in COMPOSE["services"].values() if "build" not in service]
    base = next(rest.partition("=")[2] for name, rest in instructions() if name == "ARG")
    for image in (*images, base, CONTAINER["image"]):
        assert re.search(r":[\w.-]*\w+", image), image
        assert not image.endswith(":latest")


@pytest.mark.parametrize("service", COMPOSE["services"].values(), ids=list(COMPOSE["services"]))
def test_every_service_is_locked_down_and_published_on_this_machine_alone(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_what_compose_mounts_and_builds_is_there():
    build = COMPOSE["services"]["lensd"]["build"]
    context = (FOLDER / build["context"]).resolve()
    assert context == ROOT
    assert (context / build["dockerfile"]).is_file()
    arguments = [rest.partition("=")[0] for name, rest in instructions() if name == "ARG"]
    assert set(build["args"]) <= set(arguments)
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            if source in MADE_BY_THE_USER:
                continue
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]


def test_prometheus_in_compose_reads_what_is_mounted_and_scrapes_the_service():
    service = COMPOSE["services"]["prometheus"]
    (flag,) = [argument for argument in service["command"] if argument.startswith("--config.file=")]
    mounts = dict(volume.split(":")[1::-1] for volume in service["volumes"])
    inside = Path(flag.partition("=")[2])
    configuration = yaml.safe_load((FOLDER / mounts[str(inside)]).read_text())

    def mounted(pattern: str) -> list[Path]:
        """The files that a pattern of the configuration matches, on this side of the mounts."""
        path = inside.parent / pattern
        return sorted((FOLDER / mounts[str(path.parent)]).glob(path.name))

    assert all(mounted(pattern) for pattern in configuration["rule_files"])
    (job,) = configuration["scrape_configs"]
    (files,) = [entry["files"] for entry in job["file_sd_configs"]]
    (targets,) = [yaml.safe_load(path.read_text()) for pattern in files for path in mounted(pattern)]
    port = load_config(None, {}).http.address.rpartition(":")[2]
    assert targets == [{"targets": [f"lensd:{port}"]}]  # the service's name


def test_grafana_in_compose_asks_the_service_prometheus():
    (source,) = (ROOT / "deploy" / "grafana" / "provisioning" / "datasources").glob("*.yml")
    (datasource,) = yaml.safe_load(source.read_text())["datasources"]
    assert datasource["url"] == "http://prometheus:9090"
    assert "prometheus" in COMPOSE["services"]


def test_lensd_in_compose_and_kubernetes_is_heard_by_its_neighbours():
    compose = settings(COMPOSE["services"]["lensd"]["environment"])
    assert load_config(None, compose).http.address == "0.0.0.0:9478"


def test_the_configuration_in_kubernetes_is_valid_and_on_the_volume(tmp_path):
    (tmp_path / "lensd.toml").write_text(OBJECTS["ConfigMap"]["data"]["lensd.toml"])
    environment = {entry["name"]: entry["value"] for entry in CONTAINER["env"]}
    config = load_config(tmp_path / "lensd.toml", settings(environment))
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in CONTAINER["volumeMounts"]}
    assert config.inbox.path.parent == config.outbox.path.parent == mounts["data"]
    assert Path(environment["LENSD_CACHE_DIR"]) == mounts["cache"]
    (port,) = CONTAINER["ports"]
    assert config.http.address == f"0.0.0.0:{port['containerPort']}"
    arguments = parser().parse_args(CONTAINER["args"])
    assert arguments.config.parent == mounts["config"]


def test_kubernetes_puts_no_variables_that_lensd_refuses_into_the_pod():
    """A Service named lensd would give LENSD_PORT=tcp://... to every pod of its namespace."""
    assert OBJECTS["Service"]["metadata"]["name"] == "lensd"
    assert POD["enableServiceLinks"] is False


def test_the_pod_is_probed_and_locked_down():
    paths = {probe: CONTAINER[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe")}
    assert paths == {"livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert CONTAINER["startupProbe"]["httpGet"]["path"] == "/livez"  # /readyz waits for disks and folders too
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert f"{POD['securityContext']['runAsUser']}:{POD['securityContext']['runAsGroup']}" == last("USER")
    inner = CONTAINER["securityContext"]
    assert (inner["readOnlyRootFilesystem"], inner["allowPrivilegeEscalation"]) == (True, False)
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert CONTAINER["resources"]["requests"].keys() >= {"cpu", "memory"}


def test_every_volume_of_the_pod_is_mounted_and_every_claim_is_made():
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in CONTAINER["volumeMounts"]}
    assert (
        volumes["data"]["persistentVolumeClaim"]["claimName"]
        == OBJECTS["PersistentVolumeClaim"]["metadata"]["name"]
    )
    assert volumes["config"]["configMap"]["name"] == OBJECTS["ConfigMap"]["metadata"]["name"]
    assert OBJECTS["PersistentVolumeClaim"]["spec"]["accessModes"] == ["ReadWriteMany"]


def test_labels_select_the_pod():
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert OBJECTS["Service"]["spec"]["selector"].items() <= labels.items()


def test_grafana_in_compose_finds_the_dashboards_where_its_provisioning_looks():
    mounts = [volume.split(":")[1] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    folder = ROOT / "deploy" / "grafana" / "provisioning" / "dashboards"
    providers = [
        entry for path in folder.glob("*.y*ml") for entry in yaml.safe_load(path.read_text())["providers"]
    ]
    assert providers
    for provider in providers:
        path = Path(provider["options"]["path"])
        assert any(path.is_relative_to(mount) for mount in mounts), path
