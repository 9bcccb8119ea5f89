"""Reads settings again at SIGHUP and when their file changed, and has them taken up. Knows no pipeline."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import structlog

from daemon.config import Config
from daemon.errors import ConfigError
from daemon.observe.metrics import Metrics
from daemon.observe.notify import Notify
from daemon.settings import SettingsSource, changes

LOOK_SECONDS = 1.0  # between two looks at the file

log = structlog.get_logger()


class Reload:
    """The settings that hold, and where they are read again; without a source they never change."""

    def __init__(
        self,
        config: Config,
        source: SettingsSource | None,
        *,
        metrics: Metrics,
        on_change: Callable[[Config, list[str]], None],
        on_refused: Callable[[str | None], None],
    ) -> None:
        """`on_change` takes up settings, and is told the keys of those that changed.

        `on_refused` is told why changed settings were not taken up, and None once some were."""
        self.config = config
        self.source = source
        self.asked = asyncio.Event()  # by SIGHUP
        self._metrics = metrics
        self._on_change = on_change
        self._on_refused = on_refused

    async def follow(self, stop: asyncio.Event, notify: Notify) -> None:
        """Read settings again whenever they change, until the run stops."""
        while self.source is not None and not stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.asked.wait(), LOOK_SECONDS)
            if self.asked.is_set() or await asyncio.to_thread(self.source.changed):
                self.asked.clear()
                notify.reloading()
                await self._read_again(self.source)
                notify.ready()

    async def _read_again(self, source: SettingsSource) -> None:
        """Take up changed settings, or none of them."""
        before = self.config
        try:
            config = await asyncio.to_thread(source.read, before)
        except ConfigError as error:
            log.error("settings.rejected", message=str(error))
            self._metrics.config_reloads_total.labels("rejected").inc()
            self._on_refused(str(error))
            return
        changed = changes(before, config)
        self.config = config
        self._on_change(config, changed)
        log.info("settings.applied", changed=changed)
        self._metrics.config_reloads_total.labels("applied").inc()
        self._on_refused(None)
