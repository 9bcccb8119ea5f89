"""`lensd check-config`: loads what a configuration names, and says what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator

from daemon.config import Config
from daemon.machine import check_folders
from daemon.model_info import ModelInfo
from daemon.model_wiring import load_compute
from daemon.wiring import cluster_of, folders_of_use, loading_in_worker


def checked(config: Config) -> Iterator[str]:
    """A line for each thing that is as it should be. Raises ConfigError or MachineError for what is not."""
    check_folders(config.inbox.path, config.outbox.path, taken=folders_of_use(config), make=False)
    if config.executor.kind == "local":
        info, loader = load_compute(config).engine.info, ""
    else:
        info, node = yield from check_cluster(config)
        loader = f", loaded by a worker on {node}"
    yield (
        f"ok: {info.name} ({info.architecture}, {info.n_layers} layers, d_model {info.d_model})"
        f" in {info.dtype} on {info.device}{loader}"
    )
    for sae in info.saes:
        yield f"ok: {sae.where}: {sae.source} ({sae.architecture}, d_sae {sae.d_sae})"
    yield f"ok: inbox {config.inbox.path.resolve()}, outbox {config.outbox.path.resolve()}"


def check_cluster(config: Config) -> Generator[str, None, tuple[ModelInfo, str]]:
    """What the cluster has and which workers there would be; the model as one loads it, and its node."""
    cluster = cluster_of(config)
    from daemon.executor.ray_cluster import counted
    from daemon.executor.ray_trial import try_worker

    try:
        cluster.connect()
        for node in cluster.nodes():
            yield f"ok: node {node}"
        wanted, room = cluster.wanted(), cluster.room()
        others = f": {wanted - room} of them wait for nodes" if 0 < room < wanted else ""
        yield f"ok: {cluster}: {counted(wanted)} wanted, room for {room}; each takes {cluster.needs}{others}"
        return asyncio.run(try_worker(cluster, loading_in_worker(config)))
    finally:
        cluster.disconnect()
