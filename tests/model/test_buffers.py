"""After the first batches, a daemon asks the system for no more memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from daemon import platform_calls
from daemon.model.onednn import works
from tests.support import tiny

ROOT = Path(__file__).parents[2]
BATCHES = """
import resource, sys
from pathlib import Path
import numpy as np
import torch
from daemon.model_wiring import load_compute
from daemon.model.buffers import keep_memory, pool_bytes
from daemon.config import load_config

keep_memory()
torch.set_num_threads(1)
engine = load_compute(load_config(Path(sys.argv[1]), {}, {})).engine
texts = np.random.default_rng(0).integers(0, 250, (100, 60)).tolist()
batches = int(sys.argv[2])
marks = []
with torch.inference_mode():
    for number in range(2 * batches):
        different = [*texts[: number // 2], texts[-1][: 9 + number % 2]]
        engine.extract(texts if sys.argv[3] == "alike" else different)
        if number in (batches - 1, 2 * batches - 1):
            marks.append((pool_bytes("cpu"), resource.getrusage(resource.RUSAGE_SELF).ru_minflt))
(pool, faults), (later_pool, later_faults) = marks
print(pool, later_pool - pool, later_faults - faults)
"""

LOADED = """
import os, sys
from pathlib import Path
import torch
from daemon.model import onednn
onednn.faster = lambda dtype: sys.argv[2] == "onednn"
from daemon.executor.preparing import prepare_all
from daemon.model_wiring import load_compute
from daemon.config import load_config
from tests.batching.test_splitting import batch_of

torch.set_num_threads(2)
with torch.inference_mode():
    compute = load_compute(load_config(Path(sys.argv[1]), {}, {}))
    prepare_all(compute.preparations)
    os.write(1, f"mapped: {Path('/proc/self/maps').read_text().count('model.safetensors')}\\n".encode())
    for lengths in ([300, 290], [40] * 30, [9] * 250, [20] * 90, [7, 400, 31, 90, 150, 210, 500]):
        texts = [(n, *(token % 250 for token in range(1, length))) for n, length in enumerate(lengths)]
        compute.runner.run(batch_of([(text,) for text in texts]))
"""

HEAP = """
from daemon.model.buffers import keep_memory, lasting
from daemon.platform_calls import heap_info
import numpy as np

keep_memory()
with lasting():
    before = heap_info()
    kept = [np.ones(100_000) for _ in range(100)][::2]
    after = heap_info()
print(after.arena - before.arena, after.hblkhd - before.hblkhd)
kept.append(np.ones(100_000))
print(heap_info().hblkhd - after.hblkhd)
"""

ALLOCATORS = """
import io
from daemon.cli import share_heap

share_heap()
import numpy as np
import pyarrow as pa, pyarrow.parquet

table = pa.table({"a": np.random.default_rng(0).random(100_000)})
pyarrow.parquet.write_table(table, io.BytesIO(), compression="zstd")
others = [pa.jemalloc_memory_pool, pa.mimalloc_memory_pool]
names = pa.supported_memory_backends()
used = [pool().max_memory() for pool in others if pool.__name__.split("_")[0] in names]
print(pa.default_memory_pool().backend_name, sum(used))
"""

COUNTED = pytest.mark.skipif(
    platform_calls.heap_info() is None, reason="the C library does not count its heap (mallinfo2)"
)


def ran(tmp_path: Path, batches: int, sizes: str) -> tuple[int, int, int]:
    """The heap after so many batches, by how much it grew in as many more, and the page faults of these."""
    toml = tmp_path / "lensd.toml"
    toml.write_text(
        tiny.make_tiny(tmp_path).toml() + '[analysis]\npositions = "all"\n[batching]\nmax_batch_tokens = 64\n'
    )
    done = subprocess.run(
        [sys.executable, "-c", BATCHES, str(toml), str(batches), sizes],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    pool, grown, faults = map(int, done.stdout.splitlines()[-1].split())
    return pool, grown, faults


@pytest.mark.slow
@COUNTED
def test_batches_after_the_first_take_no_new_memory(tmp_path):
    batches, residuals = 60, 100 * 60 * tiny.D_MODEL * 4  # bytes of one batch's residual stream
    pool, grown, faults = ran(tmp_path, batches, "alike")
    assert pool > 0
    # A heap goes on to settle in rarer and rarer steps of some MB: what would show is a part of each batch.
    assert grown <= 0.1 * batches * residuals
    assert 4096 * faults <= 0.1 * batches * residuals


@pytest.mark.slow
@COUNTED
def test_batches_of_many_sizes_take_no_memory_for_each_size(tmp_path):
    _, grown, _ = ran(tmp_path, 100, "different")
    assert grown < 100 * (1 << 20)


@pytest.mark.slow
@pytest.mark.skipif(not works(torch.float32), reason="needs oneDNN's packed products")
@pytest.mark.skipif(not platform_calls.OWN_STATM.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("products", ["onednn", "torch"])
def test_once_loaded_no_kernel_is_made_and_no_weight_file_is_mapped(products, tmp_path):
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.make_tiny(tmp_path).toml() + "[batching]\nmax_batch_tokens = 4096\n")
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(toml), products],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"ONEDNN_VERBOSE": "profile_create"},
    )
    loading, _, running = done.stdout.partition("mapped: ")
    assert ("create:cache_miss" in loading) == (products == "onednn")
    assert running.startswith("0\n")
    assert ("create:cache_hit" in running) == (products == "onednn")
    assert "create:cache_miss" not in running


@COUNTED
def test_what_lasts_is_mapped_by_itself_and_leaves_no_holes():
    done = subprocess.run([sys.executable, "-c", HEAP], cwd=ROOT, capture_output=True, text=True, check=True)
    heap, mapped, later = map(int, done.stdout.split())
    assert heap < 800_000  # of a hundred times that
    assert mapped == pytest.approx(50 * 800_000, rel=0.1)  # what was let go is gone
    assert later == 0


def test_arrows_tables_come_from_the_heap_that_is_kept():
    environment = {key: value for key, value in os.environ.items() if key != "ARROW_DEFAULT_MEMORY_POOL"}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATORS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert done.stdout == "system 0\n"
