"""Settings that change while the daemon runs: where they are read again, and which of them may change.

Knows no signals and nothing of what a setting does. Functions block.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from daemon.config import Config
from daemon.errors import ConfigError

# What is loaded, opened or bound at the start. All else is taken up by the next pipeline.
AT_START = (
    "model",
    "sae",
    "analysis.positions",
    "analysis.log_probs",
    "batching.max_batch_tokens",
    "executor",
    "inbox.path",
    "outbox.path",
    "http.enabled",
    "http.address",
)
AT_ONCE = ("log", "http.stall_seconds", "outbox.min_free_bytes")  # these do not wait for it

Stamp = tuple[int, int, int, int]


class SettingsSource:
    """Where the settings come from. Make it before they are first read, so that no change is missed."""

    def __init__(self, read: Callable[[], Config], file: Path | None) -> None:
        """`read` gives all layers merged and checked; `file` is the one of them that may change."""
        self._read = read
        self._file = file
        self._known = self._seen = self._stamp()

    def _stamp(self) -> Stamp | None:
        """None where there is no file, as for a moment while it is replaced."""
        if self._file is None:
            return None
        try:
            status = self._file.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def changed(self) -> bool:
        """Whether the file is another than at the last reading, and the same at the last two looks."""
        seen, self._seen = self._seen, self._stamp()
        return self._seen is not None and self._seen == seen and self._seen != self._known

    def read(self, current: Config) -> Config:
        """The settings as they are now. Raises ConfigError where they are bad or need a restart."""
        self._known = self._seen = self._stamp()
        config = self._read()
        if fixed := [key for key in changes(current, config) if is_in(key, AT_START)]:
            raise ConfigError(f"{', '.join(fixed)}: can't change without a restart, so nothing was changed")
        return config


def changes(old: Config, new: Config) -> list[str]:
    """Keys, as in `inbox.path`, of the settings that differ."""
    keys = []
    for section in Config.model_fields:
        before, after = getattr(old, section), getattr(new, section)
        if before == after:
            continue
        fields = getattr(type(after), "model_fields", None)
        if fields is None or type(before) is not type(after):
            keys.append(section)
        else:
            keys += [
                f"{section}.{field}" for field in fields if getattr(before, field) != getattr(after, field)
            ]
    return keys


def is_in(key: str, keys: tuple[str, ...]) -> bool:
    """Whether a key is among others, by itself or with its section."""
    return key in keys or key.partition(".")[0] in keys
