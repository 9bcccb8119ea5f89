"""Each kind of device: what is chosen, what its memory is, how it says that there is none left."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from daemon import devices
from daemon.devices import device_bytes, exact_device, finish, is_out_of_memory, release_memory, to_device
from daemon.errors import OutOfMemory
from daemon.executor.autotune import CANDIDATES
from daemon.executor.device_thread import telling_out_of_memory
from daemon.model.buffers import memory_bytes, pool_bytes
from daemon.model.cuda_streams import Launch
from tests.support.mps_stand_in import mps_stand_in


@pytest.fixture
def mps_memory(monkeypatch) -> None:
    monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 1 << 20)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 2 << 20)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 3 << 20)


def test_the_memory_of_mps_is_torchs_count_and_what_metal_recommends(mps_memory):
    assert device_bytes("mps") == {"allocated": 1 << 20, "reserved": 2 << 20, "total": 3 << 20}
    assert memory_bytes("mps") == device_bytes("mps")
    assert pool_bytes("mps") == 2 << 20


def test_the_memory_of_a_cpu_is_the_process(monkeypatch):
    assert device_bytes("cpu") == {}
    monkeypatch.setattr("daemon.model.buffers.resident_bytes", lambda: None)
    assert memory_bytes("cpu") == {}


@pytest.mark.parametrize(
    "message",
    [
        "MPS backend out of memory (MPS allocated: 5.02 GB, other allocations: 9.11 GB, max allowed:"
        " 18.13 GB). Tried to allocate 8.00 GB on private pool.",
        "Invalid buffer size: 21.46 GiB",
    ],
)
def test_mps_says_in_words_that_memory_ran_out(message, monkeypatch):
    emptied = []
    monkeypatch.setattr("daemon.executor.device_thread.release_memory", lambda: emptied.append("all"))
    with (
        pytest.raises(OutOfMemory, match=message[:15]),
        telling_out_of_memory(),
    ):
        raise RuntimeError(message)
    assert emptied == ["all"]
    assert not is_out_of_memory(RuntimeError("MPS device type has no such operation"))


def test_memory_is_given_back_to_the_accelerator_that_is_there(monkeypatch):
    emptied = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("cuda"))
    release_memory()
    assert emptied == []
    with mps_stand_in():
        monkeypatch.setattr(torch.mps, "empty_cache", lambda: emptied.append("mps"))
        release_memory()
    assert emptied == ["mps"]


def test_the_time_of_a_pass_on_mps_ends_when_the_device_is_done(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("daemon.model.cuda_streams.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: now.__setitem__(0, 15.0))
    with Launch("mps") as launch:
        pass
    assert launch.seconds() == 5
    with launch.followed():
        pass
    with Launch("cpu") as launch:
        now[0] = 17.0
    now[0] = 100.0
    assert launch.seconds() == 2


def test_waiting_for_a_cpu_asks_no_device(monkeypatch):
    monkeypatch.setattr(torch.mps, "synchronize", lambda: pytest.fail("there is none"))
    finish("cpu")


def test_float64_is_computed_on_the_device_but_for_mps():
    assert {device: exact_device(device) for device in ("cpu", "cuda:1", "mps")} == {
        "cpu": "cpu",
        "cuda:1": "cuda:1",
        "mps": "cpu",
    }
    values = torch.zeros(2)
    assert devices.to_exact(values) is values
    assert devices.to_host(values) is values
    assert to_device(values, "cpu") is values
    assert to_device(np.arange(3), "cpu").tolist() == [0, 1, 2]


def test_every_kind_of_device_has_batch_sizes_to_try():
    assert CANDIDATES.keys() == {"cpu", "mps", "cuda"}
