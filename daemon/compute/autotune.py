"""Finds how many tokens a batch should have on this machine, by trying; remembers it.

Knows nothing about files: random texts stand in for real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import structlog
import torch

from daemon.compute.device import is_out_of_memory
from daemon.compute.engine import Engine

CANDIDATES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (2048, 4096, 8192, 16384, 32768, 65536)}
TEXT_TOKENS = 64  # of the texts that are tried
TRIES = 3
MAX_SECONDS = 8.0  # after which no further size is tried
CLEARLY_SLOWER = 0.9  # than the best: larger batches will not be faster
ENOUGH = 0.97  # of the best rate: of the batches that reach it the largest shares the most, here unseen

log = structlog.get_logger()


def auto_batch_tokens(engine: Engine, vocabulary: int, cache_dir: Path) -> int:
    """`max_batch_tokens` for this engine on this machine, out of the cache where it was measured before."""
    cached = cache_dir / "batching" / f"{machine_key(engine)}.json"
    try:
        return int(json.loads(cached.read_text())["max_batch_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured here yet, or a file that something else wrote
    rates = measure(engine, vocabulary)
    chosen = max(size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    log.info("batching.measured", max_batch_tokens=chosen, tokens_per_second=rates)
    remember(cached, {"max_batch_tokens": chosen, "tokens_per_second": rates})
    return chosen


def measure(engine: Engine, vocabulary: int) -> dict[int, int]:
    """Tokens per second by tokens of a batch.

    Ends at the first that memory does not hold or that is clearly slower, and when enough time was spent.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    rates: dict[int, int] = {}
    deadline = time.perf_counter() + MAX_SECONDS
    for size in CANDIDATES[torch.device(engine.info.device).type]:
        texts = generator.integers(0, vocabulary, (size // TEXT_TOKENS, TEXT_TOKENS)).tolist()
        try:
            if not rates:
                engine.extract(texts)  # the first run of all pays for what later ones find ready
            rates[size] = round(size / quickest(engine, texts, deadline))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or not rates:
                raise
            break
        if rates[size] < CLEARLY_SLOWER * max(rates.values()) or time.perf_counter() > deadline:
            break
    return rates


def quickest(engine: Engine, texts: list[list[int]], deadline: float) -> float:
    """Seconds of the best of a few runs, one at least."""
    seconds = []
    for _ in range(TRIES):
        began = time.perf_counter()
        engine.extract(texts)
        seconds.append(time.perf_counter() - began)
        if time.perf_counter() > deadline:
            break
    return min(seconds)


def machine_key(engine: Engine) -> str:
    """Stands for all that a measured rate depends on."""
    identity = [
        processor(),
        torch.get_num_threads(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        version("torch"),
        version("lensd"),
        dataclasses.astuple(engine.info),
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def processor() -> str:
    """The CPU's name as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def remember(path: Path, content: dict[str, object]) -> None:
    """Write the cache; where that fails it is measured again next time."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(content))
        draft.replace(path)
    except OSError as error:
        log.warning("batching.not_remembered", path=str(path), reason=error.strerror)
