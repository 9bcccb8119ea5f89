"""A connection to a Ray cluster: one that runs, or one that is started on this machine and ends with it.

Knows no batches. Functions block: call them in a thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from dataclasses import dataclass
from typing import Any, Literal

from daemon.errors import ConfigError, MachineError
from daemon.executor.worker import Worker
from daemon.platform_calls import usable_cores

try:
    import ray
except ImportError:
    raise ConfigError('executor.kind = "ray" needs Ray: pip install "lensd[ray]"') from None

ANSWER_SECONDS = 5.0  # that a cluster has to accept a connection
CLIENT = "ray://"
MESSAGE_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Needs:
    """The resources of a cluster that one worker takes."""

    cpus: int
    gpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU{'s' if self.gpus > 1 else ''}" if self.gpus else ""
        return f"{self.cpus} CPU{'s' if self.cpus > 1 else ''}{gpus}"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of a cluster, and how many workers it has room for, whatever else it runs."""

    name: str
    cpus: float
    gpus: float
    room: int

    def __str__(self) -> str:
        return f"{self.name}: CPUs {self.cpus:g}, GPUs {self.gpus:g}, room for {counted(self.room)}"


class Cluster:
    """One cluster, and how many workers it is to have."""

    def __init__(
        self,
        address: str,
        *,
        workers: int | Literal["auto"],
        cpus: int,
        gpus: float | Literal["auto"],
        may_use_gpus: bool,
    ) -> None:
        """`address` is the head's HOST:PORT, or "auto": that of RAY_ADDRESS, else one is started here."""
        self._address = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
        self._workers = workers
        self._cpus = cpus
        self._gpus = gpus
        self._may_use_gpus = may_use_gpus
        self._needs = Needs(cpus, 0.0)  # of a worker; known once there is a connection
        host, _, port = self._address.rpartition(":")
        key = "RAY_ADDRESS" if address == "auto" else "executor.address"
        if self._address and not (host and port.isdigit()):
            raise ConfigError(f"{key} = {self._address}: expected HOST:PORT, e.g. 10.0.0.1:6379")
        if self._address.startswith(CLIENT):
            raise ConfigError(
                f"{key} = {self._address}: addresses of Ray Client are not supported:"
                " give the head's HOST:PORT, from a machine of the cluster"
            )

    def __str__(self) -> str:
        return f"the Ray cluster at {self._address}" if self._address else "the Ray cluster on this machine"

    @property
    def is_own(self) -> bool:
        """Whether the cluster is started here and ends with this process."""
        return not self._address

    def connect(self) -> None:
        """Connect, after `disconnect` where there was a connection. Raises MachineError."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # reports nothing to anybody
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # its hints are for those who write Ray programs
        quiet = {"log_to_driver": False, "configure_logging": False, "include_dashboard": False}
        try:
            if self.is_own:
                self._start(quiet)
            else:
                self._check_answers()
                ray.init(address=self._address, log_to_driver=False, configure_logging=False)
            self._needs = self._find_needs()
        except (OSError, RuntimeError, ValueError, MachineError, ray.exceptions.RayError) as error:
            self.disconnect()  # else the next try is refused, for there would be two
            if isinstance(error, MachineError):
                raise
            raise MachineError(f"{self}: {one_line(error)}") from None

    def _start(self, quiet: dict[str, Any]) -> None:
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # Ray asks for a token: one that nobody else knows
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        cores = usable_cores()
        asked = self._cpus * (1 if self._workers == "auto" else self._workers)
        ray.init(address="local", num_cpus=max(cores, asked), **quiet)

    def _check_answers(self) -> None:
        """Raises MachineError where nobody listens, for which Ray itself would wait long."""
        host, _, port = self._address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
        except OSError as error:
            raise MachineError(
                f"{self}: no answer ({error.strerror or error}): start it with `ray start --head`, or leave"
                " executor.address out for a cluster on this machine"
            ) from None

    def disconnect(self) -> None:
        """Leave the cluster, and end it where it was started here. Safe to repeat."""
        with contextlib.suppress(Exception):  # of a cluster that is gone
            ray.shutdown()

    @property
    def is_alive(self) -> bool:
        """Whether the cluster answers and this process's node is part of it."""
        if not ray.is_initialized():
            return False
        try:
            context = ray.get_runtime_context()
            host, _, port = context.gcs_address.rpartition(":")
            socket.create_connection((host, int(port)), ANSWER_SECONDS).close()
            here = context.get_node_id()
            return any(node["NodeID"] == here for node in live_nodes())
        except (OSError, RuntimeError, ValueError, MachineError, ray.exceptions.RayError):
            return False

    @property
    def needs(self) -> Needs:
        """The resources that a worker takes here."""
        return self._needs

    def _find_needs(self) -> Needs:
        """A GPU for each worker where the cluster has some and they may be used."""
        if self._gpus != "auto":
            return Needs(self._cpus, self._gpus)
        has_some = any(node["Resources"].get("GPU", 0) >= 1 for node in live_nodes())
        return Needs(self._cpus, 1.0 if has_some and self._may_use_gpus else 0.0)

    def wanted(self) -> int:
        """How many workers there are to be: as configured, else as there is room for, one at least."""
        return max(1, self.room()) if self._workers == "auto" else self._workers

    def room(self) -> int:
        """How many workers all nodes that are alive have room for, whatever else they run."""
        return sum(node.room for node in self.nodes())

    def nodes(self) -> list[Node]:
        """The nodes that are alive, each with its room for workers."""
        needs = self._needs
        nodes = []
        for node in live_nodes():
            cpus, gpus = (node["Resources"].get(kind, 0.0) for kind in ("CPU", "GPU"))
            rooms = [cpus / needs.cpus, *([gpu_room(gpus, needs.gpus)] if needs.gpus else [])]
            name, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
            nodes.append(Node(f"{name} ({address})", cpus, gpus, int(min(rooms))))
        return nodes

    def worker(self) -> Any:
        """Have Ray start a worker as soon as it has a place for it; the actor's handle. Does not block."""
        needs = self._needs
        return (
            ray.remote(Worker)
            .options(num_cpus=needs.cpus, num_gpus=needs.gpus, max_restarts=0, max_task_retries=0)
            .remote(needs.cpus)
        )

    def kill(self, actor: Any) -> None:
        """End a worker's process, wherever it is. Safe to repeat."""
        with contextlib.suppress(Exception):  # it is gone, or the cluster is
            ray.kill(actor, no_restart=True)


def live_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that are alive, as Ray describes them. Raises MachineError."""
    try:
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]  # Ray's is not annotated
    except (RuntimeError, OSError, ray.exceptions.RayError) as error:  # it went while it was asked
        raise MachineError(f"the Ray cluster does not answer: {one_line(error)}") from None
    return [node for node in nodes if node["Alive"]]


def gpu_room(gpus: float, share: float) -> float:
    """How many workers so many GPUs hold; a share is of one GPU."""
    return gpus // share if share >= 1 else int(gpus) * int(1 / share)


def counted(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"


def one_line(error: BaseException | str) -> str:
    """A message of several lines as one, cut short."""
    words = " ".join(str(error).split())
    return f"{words[:MESSAGE_LENGTH]}..." if len(words) > MESSAGE_LENGTH else words or type(error).__name__
