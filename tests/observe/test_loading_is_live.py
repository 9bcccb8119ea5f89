from __future__ import annotations

import time
from typing import NoReturn

import pytest

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.observe.health import LOADING, Health
from daemon.service import Service


class Device:
    busy_since: float | None = 0.0
    alive = True


def test_only_loading_may_take_longer_than_the_limit():
    now = [0.0]
    health = Health(Device(), stall_seconds=60.0, clock=lambda: now[0])
    health.require(LOADING)
    now[0] = 300.0
    health.beat()
    assert health.stalled() == []
    health.meet(LOADING)
    assert health.stalled() == ["device busy on one call for 300 s"]


async def test_the_service_is_live_while_its_model_loads(tmp_path):
    """The service and the endpoints must mean the same by LOADING."""
    flags = {"inbox.path": tmp_path, "outbox.path": tmp_path, "http.enabled": False}
    config = load_config(env={}, flags=flags)
    service = Service(config, once=True, on_outcome=lambda _: None, load=lambda _: load())
    service.health = Health(service.device, stall_seconds=60.0, clock=lambda: time.monotonic() + 1000.0)
    seen = []

    def load() -> NoReturn:
        seen.append((service.device.busy_since is not None, service.health.stalled()))
        raise ConfigError("enough")

    with pytest.raises(ConfigError, match="enough"):
        await service.run()
    assert seen == [(True, [])]
