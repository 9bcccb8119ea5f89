from __future__ import annotations

import json

import pytest
import torch

from daemon.executor import autotune
from daemon.executor.autotune import auto_batch_tokens
from daemon.model.loading import ModelInfo
from tests.support import tiny
from tests.support.engines import packed


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    made = tiny.make_tiny(tmp_path_factory.mktemp("tiny"))
    return packed(made.model, made.saes, torch.float32)


LARGEST = max(autotune.CANDIDATES["cpu"])


def of_rates(rates: dict[int, int]) -> dict[int, list[float]]:
    """Two tries of each size, as long as each other; the largest of all is slow, unless it is given."""
    return {size: [size / rate] * 2 for size, rate in ({LARGEST: 1} | rates).items()}


def test_what_was_measured_beside_other_work_is_not_remembered(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *_: {256: [1.0, 1.0], 512: [1.0, 1.9]})
    assert auto_batch_tokens(engine, 256, tmp_path) == 512
    monkeypatch.setattr(autotune, "measure", lambda *_: of_rates({256: 10}))
    assert auto_batch_tokens(engine, 256, tmp_path) == 256
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
    assert auto_batch_tokens(engine, 256, tmp_path) == 256


@pytest.mark.parametrize(("cores", "remembered"), [(0.5, False), (0.9, True)])
def test_sizes_that_took_too_long_count_only_where_the_cores_were_its_own(
    engine, tmp_path, monkeypatch, cores, remembered
):
    now = [0.0, 0.0]  # by the clock, and of the process

    def measure(*_):
        now[0] += 10
        now[1] += 10 * cores * torch.get_num_threads()
        return {256: [2.0, 2.0]}  # 512 would have taken more than MAX_TRY_SECONDS

    monkeypatch.setattr(autotune.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(autotune.time, "process_time", lambda: now[1])
    monkeypatch.setattr(autotune, "measure", measure)
    assert auto_batch_tokens(engine, 256, tmp_path) == 256
    assert any(tmp_path.rglob("*.json")) == remembered


def test_it_is_measured_once_and_then_remembered(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "STEADY", 1e9)  # whatever else the machine does
    chosen = auto_batch_tokens(engine, 256, tmp_path)
    assert chosen in autotune.CANDIDATES["cpu"]
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
    assert auto_batch_tokens(engine, 256, tmp_path) == chosen


def test_the_largest_batch_that_is_fast_enough_is_chosen(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *_: of_rates({256: 50, 512: 100, 1024: 96, 2048: 94}))
    assert auto_batch_tokens(engine, 256, tmp_path) == 1024


def test_each_of_many_workers_has_a_share_of_the_best_batch(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *_: of_rates({512: 50, 1024: 90, 2048: 98, LARGEST: 100}))
    assert auto_batch_tokens(engine, 256, tmp_path, small=True) == LARGEST // 4
    monkeypatch.setattr(autotune, "measure", lambda *_: pytest.fail("measured again"))
    assert auto_batch_tokens(engine, 256, tmp_path) == LARGEST


def test_a_cache_that_cannot_be_read_or_written_is_done_without(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *_: of_rates({256: 10}))
    (tmp_path / "batching").write_text("a file where a folder should be")
    assert auto_batch_tokens(engine, 256, tmp_path) == 256


def test_a_broken_cache_is_measured_anew(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "measure", lambda *_: of_rates({512: 10}))
    auto_batch_tokens(engine, 256, tmp_path)
    (file,) = (tmp_path / "batching").iterdir()
    file.write_text("{")
    assert auto_batch_tokens(engine, 256, tmp_path) == 512
    assert json.loads(file.read_text())["max_batch_tokens"] == 512


class SmallMemory:
    """An engine that holds no more than so many tokens."""

    info: ModelInfo
    concurrent = False

    def __init__(self, info: ModelInfo, tokens: int) -> None:
        self.info = info
        self._tokens = tokens

    def extract(self, texts):
        if sum(map(len, texts)) > self._tokens:
            raise MemoryError


def test_what_memory_does_not_hold_is_not_chosen(engine):
    assert max(autotune.measure(SmallMemory(engine.info, 1024), 256)) == 1024
    with pytest.raises(MemoryError):
        autotune.measure(SmallMemory(engine.info, 0), 256)
