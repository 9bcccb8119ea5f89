"""One worker process of an executor: a model of its own, and batches on its device.

Knows no cluster and no files. Its methods are called from another process; what they return is pickled.
"""

from __future__ import annotations

import asyncio
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

import torch

from daemon.analysis.column_inputs import StudySettings
from daemon.analysis.columns import ANALYSIS_VERSION
from daemon.executor.device_thread import DeviceThread
from daemon.executor.local import LocalExecutor
from daemon.executor.runner import BatchRunner
from daemon.model_info import ModelInfo
from daemon.platform_calls import peak_bytes
from daemon.ports import Tokenizer
from daemon.records import BatchResult, SampleBatch


class Loaded(Protocol):
    """A model with its dictionaries, ready to run."""

    @property
    def runner(self) -> BatchRunner: ...

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def max_batch_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Ready:
    """A worker that has loaded its model."""

    info: ModelInfo
    shares_prefixes: bool
    slots: int  # batches that it takes at a time, one of which waits beside its device
    tokenizer: Tokenizer
    max_batch_tokens: int
    busy_seconds: float = 0.0  # of its device, for loading


@dataclass(frozen=True, slots=True)
class Computed:
    """The result of a batch, and how its worker does."""

    result: BatchResult
    busy_seconds: float  # of its device, since the worker began
    memory_bytes: int  # of its process, at most so far


@dataclass(frozen=True, slots=True)
class Build:
    """The code that a process runs; results of two that differ must not be mixed."""

    lensd: str
    analysis: int
    torch: str

    @classmethod
    def here(cls) -> Build:
        return cls(version("lensd"), ANALYSIS_VERSION, torch.__version__)

    def __str__(self) -> str:
        return f"lensd {self.lensd} (analysis {self.analysis}) with torch {self.torch}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker runs."""

    node: str
    build: Build


class Worker:
    """Loads a model once, then computes batches, each while the next one waits beside the device."""

    def __init__(self, cores: int) -> None:
        """`cores` are this worker's share of its machine."""
        self._cores = cores
        self._device = DeviceThread()
        self._executor: LocalExecutor | None = None

    async def place(self) -> Place:
        return Place(platform.node(), Build.here())

    async def load(self, load: Callable[[], Loaded]) -> Ready:
        """Load the model by `load`, on the device thread. Raises ConfigError or MachineError."""

        def on_cores() -> Loaded:
            torch.set_num_threads(self._cores)
            return load()

        loaded = await self._device.call(on_cores)
        self._executor = LocalExecutor(self._device, loaded.runner)
        return Ready(
            info=loaded.runner.info,
            shares_prefixes=self._executor.shares_prefixes,
            slots=self._executor.slots + 1,
            tokenizer=loaded.tokenizer,
            max_batch_tokens=loaded.max_batch_tokens,
            busy_seconds=self._device.busy_seconds,
        )

    async def run(self, batch: SampleBatch) -> Computed:
        """Compute a batch. Raises OutOfMemory."""
        assert self._executor is not None, "load comes first"
        result = await self._executor.compute(batch)
        return Computed(result, self._device.busy_seconds, peak_bytes())

    async def live(self) -> None:
        """Never return: whoever waits for this hears at once that the process is gone."""
        await asyncio.Event().wait()

    async def restudy(self, settings: StudySettings) -> None:
        """Analyse the next batches under other settings."""
        assert self._executor is not None, "load comes first"
        await self._executor.restudy(settings)
