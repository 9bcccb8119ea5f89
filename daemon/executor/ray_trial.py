"""Tries a Ray cluster: starts one worker, has it load the model, and ends it. Knows no batches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from daemon.errors import MachineError
from daemon.executor.ray_cluster import Cluster
from daemon.executor.remote_worker import Gone, RemoteWorker
from daemon.executor.worker import Loaded, Ready
from daemon.model_info import ModelInfo

PLACE_SECONDS = 60.0  # that a worker may take to begin, its imports included


async def try_worker(cluster: Cluster, load: Callable[[bool], Loaded]) -> tuple[ModelInfo, str]:
    """The model as a worker loads it, and the node on which it did. The cluster is connected.

    Raises ConfigError where the model or a dictionary is at fault, MachineError where the cluster is.
    """
    needs = cluster.needs
    if not await asyncio.to_thread(cluster.room):
        raise MachineError(
            f"{cluster} has no node for a worker, which takes {needs}:"
            " add one, or change executor.worker_cpus and executor.worker_gpus"
        )
    worker = RemoteWorker(0)
    worker.begin(cluster.worker())
    try:
        async with asyncio.timeout(PLACE_SECONDS):
            node = await worker.place()
        ready: Ready = await worker.call("load", partial(load, True))
    except TimeoutError:
        raise MachineError(
            f"{cluster}: no worker began within {PLACE_SECONDS:.0f} s: it takes {needs},"
            " which other programs may hold"
        ) from None
    except Gone as gone:
        raise MachineError(f"{cluster}: the worker was lost: {gone}") from None
    finally:
        cluster.kill(worker.actor)
    return ready.info, node
