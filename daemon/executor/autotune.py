"""Finds how many tokens a batch should have on this machine, by trying; remembers it.

Knows nothing about files: random texts stand in for real ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import structlog
import torch

from daemon.batching.splitting import piece_count
from daemon.devices import is_out_of_memory
from daemon.model.engine import Engine
from daemon.model_info import compute_devices
from daemon.native.library import library
from daemon.native.threads import side_by_side
from daemon.platform_calls import processor_name

CANDIDATES = {
    "cpu": (256, 512, 1024, 2048, 4096),
    "mps": (512, 1024, 2048, 4096, 8192),
    "cuda": (2048, 4096, 8192, 16384, 32768, 65536),
}
TEXT_TOKENS = 64  # of the texts that are tried
TRIES = 3  # of which the first finds nothing ready
MAX_SECONDS = 12.0  # after which nothing more is tried
MAX_TRY_SECONDS = 3.0  # of one try: a larger batch would gain little, and keep results waiting
STEADY = 1.15  # times the best try, that the next best takes on a machine with nothing else to do
OWN_CORES = (
    0.75  # of its cores' time, that an engine has where nothing else runs; with less, time alone cuts sizes
)
SHARE = 4  # of the best size that each of many workers is given: its rate is 3 % lower
ENOUGH = 0.95  # of the best rate: of the batches that reach it the largest shares the most, here unseen

log = structlog.get_logger()


def auto_batch_tokens(engine: Engine, vocabulary: int, cache_dir: Path, *, small: bool = False) -> int:
    """`max_batch_tokens` for this engine on this machine, out of the cache where it was measured before.

    With `small`, on a CPU, a share of it: results come sooner and are shared out more evenly among workers.
    """
    tokens = measured_batch_tokens(engine, vocabulary, cache_dir)
    return max(tokens // SHARE, candidates(engine)[0]) if small and engine.info.device == "cpu" else tokens


def measured_batch_tokens(engine: Engine, vocabulary: int, cache_dir: Path) -> int:
    cached = cache_dir / "batching" / f"{machine_key(engine)}.json"
    try:
        return int(json.loads(cached.read_text())["max_batch_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured here yet, or a file that something else wrote
    wall, cpu = time.perf_counter(), time.process_time()
    tries = measure(engine, vocabulary)
    used = (time.process_time() - cpu) / (time.perf_counter() - wall) / torch.get_num_threads()
    rates = {size: round(size / min(seconds)) for size, seconds in tries.items()}
    chosen = max(size for size, rate in rates.items() if rate >= ENOUGH * max(rates.values()))
    log.info("batching.measured", max_batch_tokens=chosen, tokens_per_second=rates)
    had_cores = used >= OWN_CORES or engine.info.device != "cpu"
    if steady(tries[chosen]) and (had_cores or max(tries) == max(candidates(engine))):
        remember(cached, {"max_batch_tokens": chosen, "tokens_per_second": rates})
    else:
        log.warning("batching.not_remembered", path=str(cached), reason="the machine is busy with other work")
    return chosen


def candidates(engine: Engine) -> tuple[int, ...]:
    """The sizes that are tried on its device."""
    return CANDIDATES[torch.device(compute_devices(engine.info.device)[0]).type]


def measure(engine: Engine, vocabulary: int) -> dict[int, list[float]]:
    """Seconds of each try by tokens of a batch.

    Every size has its turn before any has another, so that a slow moment of the machine hits one try of each.
    Leaves out what memory does not hold, and what takes too long.
    """
    generator = np.random.Generator(np.random.PCG64(0))
    sizes = candidates(engine)
    texts = {
        size: generator.integers(0, vocabulary, (size // TEXT_TOKENS, TEXT_TOKENS)).tolist() for size in sizes
    }
    tries: dict[int, list[float]] = {}
    deadline = time.perf_counter() + MAX_SECONDS
    engine.extract(as_read(engine, texts[sizes[0]]))  # the first run of all takes seconds on an accelerator
    for number in range(TRIES):
        for size in sizes if not number else list(tries):
            if tries and time.perf_counter() > deadline:
                return tries
            if size // 2 in tries and 2 * tries[size // 2][0] > MAX_TRY_SECONDS:
                break
            try:
                began = time.perf_counter()
                extract(engine, texts[size])
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or not tries:
                    raise
                break
            tries.setdefault(size, []).append(time.perf_counter() - began)
    return tries


def extract(engine: Engine, texts: Sequence[Sequence[int]]) -> None:
    """Read the texts as a batch is read: where the engine allows it, in pieces side by side."""
    n = piece_count(sum(map(len, texts)), torch.get_num_threads()) if engine.concurrent else 1
    side_by_side(engine.extract, [as_read(engine, texts[first::n]) for first in range(n)])


def as_read(engine: Engine, texts: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The texts; half of them, with their first token and without, where SAEs read texts both ways."""
    if not engine.info.reads_both_ways:
        return texts
    half = texts[: max(1, len(texts) // 2)]
    return [*half, *(text[1:] for text in half)]


def steady(seconds: list[float]) -> bool:
    """Whether the best two tries of one size took about as long as each other."""
    return len(seconds) > 1 and sorted(seconds)[1] <= STEADY * min(seconds)


def machine_key(engine: Engine) -> str:
    """Stands for all that a measured rate depends on."""
    identity = [
        processor_name(),
        torch.get_num_threads(),
        torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        version("torch"),
        version("lensd"),
        library() is not None,
        dataclasses.astuple(engine.info),
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def remember(path: Path, content: dict[str, object]) -> None:
    """Write the cache; where that fails it is measured again next time."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(content))
        draft.replace(path)
    except OSError as error:
        log.warning("batching.not_remembered", path=str(path), reason=error.strerror)
