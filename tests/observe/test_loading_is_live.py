from __future__ import annotations

import time

import pytest

from daemon import service as service_module
from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.observe.http import LOADING, Health


class Device:
    busy_since: float | None = 0.0


def test_only_loading_may_take_longer_than_the_limit():
    now = [0.0]
    health = Health(Device(), stall_seconds=60.0, clock=lambda: now[0])
    health.unmet.add(LOADING)
    now[0] = 300.0
    health.beat()
    assert health.stalled() == []
    health.unmet.discard(LOADING)
    assert health.stalled() == ["device busy on one call for 300 s"]


async def test_the_service_is_live_while_its_model_loads(tmp_path, monkeypatch):
    """The service and the endpoints must mean the same by LOADING."""
    flags = {"inbox.path": tmp_path, "outbox.path": tmp_path, "http.enabled": False}
    service = service_module.Service(load_config(env={}, flags=flags), once=True, on_outcome=lambda _: None)
    service.health = Health(service.device, stall_seconds=60.0, clock=lambda: time.monotonic() + 1000.0)
    seen = []

    def load(_):
        seen.append((service.device.busy_since is not None, service.health.stalled()))
        raise ConfigError("enough")

    monkeypatch.setattr(service_module, "load_compute", load)
    with pytest.raises(ConfigError, match="enough"):
        await service.run()
    assert seen == [(True, [])]
