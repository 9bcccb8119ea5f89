"""The files for a Ray cluster: that Ray, KubeRay, compose, systemd and lensd know what they name."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from prometheus_client import CollectorRegistry
from ray.scripts.scripts import cli as ray_command

from daemon.arguments import parser
from daemon.cli import COMMANDS
from daemon.config import ExecutorSection, load_config
from daemon.executor.worker import Build
from daemon.observe.metrics import Metrics
from daemon.records import PAUSE_REASONS
from daemon.rejects import REJECT_REASONS
from tests.deploy import test_containers as containers
from tests.deploy.test_systemd import PROGRAM, UNITS, analyze, environment, needs_systemd

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "ray"
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
COMPOSE: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text(encoding="utf-8"))
CLUSTER: dict[str, Any] = yaml.safe_load((FOLDER / "cluster.yaml").read_text(encoding="utf-8"))
OBJECTS: list[dict[str, Any]] = list(
    yaml.safe_load_all((FOLDER / "raycluster.yaml").read_text(encoding="utf-8"))
)
RAY_CLUSTER = OBJECTS[0]
HEAD = RAY_CLUSTER["spec"]["headGroupSpec"]
(WORKERS,) = RAY_CLUSTER["spec"]["workerGroupSpecs"]
(DEPLOYMENT,) = (entry for entry in OBJECTS if entry["kind"] == "Deployment")
PODS = {
    "head": HEAD["template"],
    "worker": WORKERS["template"],
    "lensd": DEPLOYMENT["spec"]["template"],
}
HTTP_PORT = int(load_config(None, {}).http.address.rpartition(":")[2])
DROP_IN = [
    line
    for line in (FOLDER / "lensd-ray.conf").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
TOKEN_VARIABLES = {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}

# The fields of KubeRay's API reference for ray.io/v1 that a RayCluster may have, as far as they matter here.
SPEC = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling"}
HEAD_GROUP = {"rayStartParams", "template", "serviceType"}
WORKER_GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
AUTH_OPTIONS = {"mode", "secretName", "enableK8sTokenAuth"}


def shell_lines(page: str) -> Iterator[str]:
    for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL):
        yield from block.splitlines()


def commands(page: str, program: str) -> list[list[str]]:
    """The arguments of each call of a program."""
    lines = (line for line in shell_lines(page) if line.startswith(f"{program} "))
    return [shlex.split(line.split(">")[0], comments=True)[1:] for line in lines]


def check_ray(arguments: list[str]) -> None:
    """Ray has the command, and each option of it."""
    command = ray_command.commands[arguments[0]]
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
    assert given <= known, given - known


def calls_of_ray(text: str) -> list[list[str]]:
    """The arguments of each `ray start` and `ray stop` in a script."""
    found = re.findall(r"(?:^|[\s/;])ray ((?:start|stop)\b[^;&>]*)", text.replace("\n", " ; "))
    return [shlex.split(call) for call in found]


def pod_containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


# The page.


@pytest.mark.parametrize("arguments", commands(PAGE, "lensd"), ids=" ".join)
def test_the_commands_are_ones_that_lensd_understands(arguments):
    assert parser().parse_args(arguments).command in COMMANDS


@pytest.mark.parametrize("arguments", commands(PAGE, "ray"), ids=" ".join)
def test_the_commands_are_ones_that_ray_understands(arguments):
    check_ray(arguments)


def test_the_options_of_ray_that_the_page_names_exist():
    options = set(re.findall(r"`(--(?:num|object|include|block|temp)[a-z-]*)", PAGE))
    assert options
    check_ray(["start", *options])


def test_the_settings_that_the_page_names_exist():
    named = set(re.findall(r"`(workers|worker_\w+)`", PAGE)) - {"worker_died"}
    assert named
    assert named <= set(ExecutorSection.model_fields)
    for section, field in re.findall(r"`(batching|http|model)\.(\w+)", PAGE):
        assert field in type(getattr(load_config(None, {}), section)).model_fields


def test_events_reasons_and_metrics_that_the_page_names_exist():
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "daemon").rglob("*.py"))
    events = set(re.findall(r"`((?:cluster|workers?|batch)\.[a-z_]+)`", PAGE)) - {"cluster.yaml"}
    assert events
    assert [event for event in sorted(events) if f'"{event}"' not in code] == []
    assert "worker_died" in REJECT_REASONS
    assert set(re.findall(r'lensd_paused\{reason="(\w+)"\}', PAGE)) <= set(PAUSE_REASONS)
    metrics = [described.name for described in Metrics(CollectorRegistry()).descriptions]
    for name in re.findall(r"`(lensd_(?!paused)\w+)\*?`", PAGE):
        assert any(metric.startswith(name) for metric in metrics), name


def test_builds_that_differ_are_told_as_the_page_says():
    said = re.findall(r"lensd [\d.]+ \(analysis \d+\) with torch [\d.]+\d", PAGE)
    assert len(said) == 2
    numbers = [re.findall(r"\d[\d.]*", one) for one in said]
    assert said == [str(Build(lensd, int(analysis), torch)) for lensd, analysis, torch in numbers]


def test_every_file_of_the_folder_is_on_the_page_and_every_file_of_the_page_is_there():
    (table,) = re.findall(r"^\| File \| Is \|\n\| --- .*\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = set(re.findall(r"^\| `(\S+)` \|", table, re.MULTILINE))
    assert rows == {path.name for path in FOLDER.iterdir()} - {"README.md", "data", "token", ".env"}
    named = re.findall(r"`((?:tests|deploy)/[\w./-]+)`|\]\((?!http)([\w./-]+)", PAGE)
    assert named
    missing = [a or b for a, b in named if not ((ROOT / a) if a else (FOLDER / b)).exists()]
    assert missing == []


def test_links_to_the_page_lead_to_its_headings():
    headings = re.findall(r"^#+ (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for path in (ROOT / "README.md", ROOT / "deploy" / "README.md", ROOT / "deploy" / "SECURITY.md"):
        assert set(re.findall(r"ray/README\.md#([\w-]+)", path.read_text(encoding="utf-8"))) <= anchors


def test_the_version_of_ray_is_the_one_that_is_tested():
    pinned = dict(
        line.split("==")
        for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    assert RAY_CLUSTER["spec"]["rayVersion"] == pinned["ray"]
    assert f"ray {pinned['ray']} is" in (ROOT / "deploy" / "SECURITY.md").read_text(encoding="utf-8")
    assert f"Ray {pinned['ray'].rpartition('.')[0]} " in PAGE


def test_ray_reads_the_variables_that_give_the_token():
    library = (Path(ray.__file__).parent / "_raylet.so").read_bytes()
    for name in TOKEN_VARIABLES - {"RAY_AUTH_MODE"}:
        assert name.encode() in library
    from ray._private.authentication.authentication_token_setup import AUTH_MODE_ENV_VAR

    assert AUTH_MODE_ENV_VAR == "RAY_AUTH_MODE"


# Machines by ssh.


def test_the_launchers_file_is_as_its_schema_says():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(CLUSTER, schema)
    from ray.autoscaler._private.local.config import prepare_local

    prepared, _ = prepare_local(CLUSTER)
    (node,) = prepared["available_node_types"].values()
    assert node["min_workers"] == node["max_workers"] == len(CLUSTER["provider"]["worker_ips"])


@pytest.mark.parametrize("role", ["head", "worker"])
def test_the_launcher_starts_ray_with_options_that_it_has(role):
    script = "\n".join(CLUSTER[f"{role}_start_ray_commands"])
    stop, start = calls_of_ray(script)
    check_ray(stop)
    check_ray(start)
    assert ("--head" in start) == (role == "head")
    assert "RAY_AUTH_MODE=token" in script


# Containers.


@pytest.mark.parametrize("service", COMPOSE["services"].values(), ids=list(COMPOSE["services"]))
def test_every_service_is_locked_down_and_asks_for_the_token(service):
    containers.test_every_service_is_locked_down_and_published_on_this_machine_alone(service)
    assert service["image"] == "lensd-ray"
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == f"/run/secrets/{service['secrets'][0]}"
    assert service["secrets"][0] in COMPOSE["secrets"]
    assert service["init"] is True


def test_compose_builds_the_image_with_ray():
    (build,) = [service["build"] for service in COMPOSE["services"].values() if "build" in service]
    assert (FOLDER / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    names = [rest.partition("=")[0] for name, rest in containers.instructions() if name == "ARG"]
    assert set(build["args"]) <= set(names)
    assert build["args"]["EXTRA"] == "ray"
    assert any("${EXTRA:+--extra=${EXTRA}}" in rest for _, rest in containers.instructions())


def test_the_services_start_nodes_of_one_cluster():
    services = COMPOSE["services"]
    head, worker = services["head"], services["worker"]
    beside = calls_of_ray(services["lensd"]["entrypoint"][2])[0]
    for arguments in (head["command"], worker["command"], beside):
        check_ray(arguments)
        assert "--block" in arguments
    (port,) = [text.partition("=")[2] for text in head["command"] if text.startswith("--port=")]
    assert f"--address=head:{port}" in worker["command"]
    assert f"--address=head:{port}" in beside
    assert "--num-cpus=0" in head["command"]
    assert "--num-cpus=0" in beside
    assert f"'127.0.0.1', {port}" in head["healthcheck"]["test"][3]


def test_lensd_in_compose_uses_the_cluster_and_is_heard():
    service = COMPOSE["services"]["lensd"]
    arguments = parser().parse_args(service["command"])
    assert getattr(arguments, "executor.address") == "head:6379"
    assert getattr(arguments, "executor.kind") == "ray"
    config = load_config(None, containers.settings(service["environment"]))
    assert config.http.address == f"0.0.0.0:{HTTP_PORT}"
    assert service["ports"] == [f"127.0.0.1:{HTTP_PORT}:{HTTP_PORT}"]
    script = service["entrypoint"][2]
    assert script.rstrip().endswith('exec lensd "$$@"')  # compose's $$ is the shell's $


# Kubernetes.


def test_the_fields_of_the_cluster_are_those_of_kuberay():
    spec = RAY_CLUSTER["spec"]
    assert (RAY_CLUSTER["apiVersion"], RAY_CLUSTER["kind"]) == ("ray.io/v1", "RayCluster")
    assert spec.keys() <= SPEC
    assert HEAD.keys() <= HEAD_GROUP
    assert WORKERS.keys() <= WORKER_GROUP
    assert spec["authOptions"].keys() <= AUTH_OPTIONS
    assert spec["authOptions"]["mode"] == "token"
    assert WORKERS["minReplicas"] <= WORKERS["replicas"] <= WORKERS["maxReplicas"]


@pytest.mark.parametrize("group", [HEAD, WORKERS], ids=["head", "workers"])
def test_kuberay_starts_ray_with_options_that_it_has(group):
    assert all(isinstance(text, str) for text in group["rayStartParams"].values())
    check_ray(["start", *(f"--{name}" for name in group["rayStartParams"])])


def test_the_node_beside_the_daemon_joins_the_cluster_and_has_no_work():
    (node,) = PODS["lensd"]["spec"]["initContainers"]
    assert node["command"] == ["ray"]
    check_ray(node["args"])
    assert f"--address={RAY_CLUSTER['metadata']['name']}-head-svc:6379" in node["args"]
    assert {"--num-cpus=0", "--num-gpus=0", "--block"} <= set(node["args"])
    assert node["restartPolicy"] == "Always"
    assert PODS["lensd"]["spec"]["shareProcessNamespace"] is True
    shared = [
        {(mount["name"], mount["mountPath"]) for mount in container["volumeMounts"]}
        for container in pod_containers(PODS["lensd"])
    ]
    assert ("tmp", "/tmp") in shared[0] & shared[1]


def test_the_daemon_has_the_token_that_kuberay_makes():
    for container in pod_containers(PODS["lensd"]):
        given = {entry["name"]: entry for entry in container["env"]}
        assert given["RAY_AUTH_MODE"]["value"] == "token"
        secret = given["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
        assert secret == {"name": RAY_CLUSTER["metadata"]["name"], "key": "auth_token"}


def test_the_configuration_is_valid_and_uses_the_cluster(tmp_path):
    (entry,) = (entry for entry in OBJECTS if entry["kind"] == "ConfigMap")
    (tmp_path / "lensd.toml").write_text(entry["data"]["lensd.toml"])
    (container,) = PODS["lensd"]["spec"]["containers"]
    config = load_config(tmp_path / "lensd.toml", {})
    assert config.executor.kind == "ray"
    assert config.executor.address == f"{RAY_CLUSTER['metadata']['name']}-head-svc:6379"
    assert config.executor.worker_cpus == int(
        WORKERS["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    )
    mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert config.inbox.path.parent == config.outbox.path.parent == mounts["data"]
    assert config.http.address == f"0.0.0.0:{container['ports'][0]['containerPort']}"
    assert parser().parse_args(container["args"]).config.parent == mounts["config"]


@pytest.mark.parametrize("pod", PODS.values(), ids=list(PODS))
def test_every_pod_is_locked_down_and_of_one_image(pod):
    spec = pod["spec"]
    assert spec["enableServiceLinks"] is False
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] is True
    user = f"{spec['securityContext']['runAsUser']}:{spec['securityContext']['runAsGroup']}"
    assert user == containers.last("USER")
    claims = {entry["metadata"]["name"] for entry in OBJECTS if entry["kind"] == "PersistentVolumeClaim"}
    maps = {entry["metadata"]["name"] for entry in OBJECTS if entry["kind"] == "ConfigMap"}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    mounted = set()
    for container in pod_containers(pod):
        assert container["image"] == HEAD["template"]["spec"]["containers"][0]["image"]
        inner = container["securityContext"]
        assert (inner["readOnlyRootFilesystem"], inner["allowPrivilegeEscalation"]) == (True, False)
        assert inner["capabilities"] == {"drop": ["ALL"]}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        mounted |= {mount["name"] for mount in container["volumeMounts"]}
    assert volumes.keys() == mounted
    for volume in volumes.values():
        assert volume.get("persistentVolumeClaim", {}).get("claimName") in claims | {None}
        assert volume.get("configMap", {}).get("name") in maps | {None}


def test_probes_ask_ports_that_something_listens_on():
    (head,) = PODS["head"]["spec"]["containers"]
    (worker,) = PODS["worker"]["spec"]["containers"]
    (lensd,) = PODS["lensd"]["spec"]["containers"]
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert head[probe]["tcpSocket"]["port"] == head["ports"][0]["containerPort"] == 6379
        assert str(worker[probe]["tcpSocket"]["port"]) == WORKERS["rayStartParams"]["node-manager-port"]
        path = "/readyz" if probe == "readinessProbe" else "/livez"
        assert lensd[probe]["httpGet"] == {"path": path, "port": "http"}


def test_nobody_else_reaches_the_clusters_ports():
    (policy,) = (entry["spec"] for entry in OBJECTS if entry["kind"] == "NetworkPolicy")
    selected = policy["podSelector"]["matchLabels"]
    for pod in PODS.values():
        assert selected.items() <= pod["metadata"]["labels"].items()
    inside, everyone = policy["ingress"]
    assert inside == {"from": [{"podSelector": {"matchLabels": selected}}]}
    assert everyone == {"ports": [{"port": HTTP_PORT}]}
    labels = PODS["lensd"]["metadata"]["labels"]
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"].items() <= labels.items()


# systemd.


def test_the_drop_in_makes_a_valid_configuration():
    pairs = (line.removeprefix("Environment=") for line in DROP_IN if line.startswith("Environment="))
    told = dict(pair.split("=", 1) for pair in pairs)
    config = load_config(UNITS / "lensd.toml", environment("lensd.service") | told, {})
    assert config.executor.kind == "ray"
    assert config.executor.address != "auto"
    assert told.keys() & TOKEN_VARIABLES == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"}


@needs_systemd
def test_systemd_finds_no_fault_with_the_drop_in(tmp_path):
    unit = tmp_path / "lensd.service"
    unit.write_text((UNITS / unit.name).read_text(encoding="utf-8").replace(PROGRAM, sys.executable))
    (tmp_path / "lensd.service.d").mkdir()
    (tmp_path / "lensd.service.d" / "ray.conf").write_text("\n".join(DROP_IN))
    assert str(tmp_path) not in analyze("verify", "--man=no", unit)
