"""Hooks inside a daemon whose settings change; named by `Job.hook`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from daemon import service, supervisor
from daemon.config import Config, load_config
from daemon.model_wiring import Compute
from daemon.settings import SettingsSource
from tests.reliability.hooks import gated

BEAT_SECONDS = 0.05
LOOK_SECONDS = 0.02


@contextlib.contextmanager
def reloading(file: str, reached: str = "", go: str = "") -> Iterator[None]:
    """A hook: what the job's settings leave open comes from `file`, which is followed.

    With `reached` and `go` the device is gated, as by the hook of that name.
    """

    def serve(told: Config, *, once: bool, load: Callable[[Config], Compute]) -> object:
        def read() -> Config:
            return load_config(Path(file), {}, given(told))

        source = SettingsSource(read, Path(file))
        return service.serve(read(), once=once, load=load, settings_source=source)

    with (
        mock.patch("__main__.serve", serve),
        mock.patch.object(supervisor, "LOOK_SECONDS", BEAT_SECONDS),
        mock.patch.object(service, "LOOK_SECONDS", LOOK_SECONDS),
        gated(reached, go) if go else contextlib.nullcontext(),
    ):
        yield


def given(config: Config) -> dict[str, Any]:
    """The settings of the job, as flags."""
    keys = ("model.name", "inbox.path", "outbox.path", "inbox.settle_seconds", "http.enabled", "http.address")
    flags = {
        key: getattr(getattr(config, section), field) for key in keys for section, field in [key.split(".")]
    }
    return {**flags, "sae": [entry.model_dump(exclude_none=True) for entry in config.sae]}
