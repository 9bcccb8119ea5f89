"""Whether the daemon is alive and ready. Knows nothing about HTTP, files or models; it is told.

Read from any thread: the endpoints live on one of their own, so that they tell of a stalled event loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

EVENT_LOOP, DEVICE = "event_loop", "device"  # the loops that must make progress
HEARTBEAT_STALE_SECONDS = 15.0  # an event loop that is silent for longer is stalled
# What readiness waits for, in words.
LOADING = "loading the model"  # meanwhile one call may take as long as it takes
DRAINING = "draining"
PAUSED = "paused: "  # and why


class Device(Protocol):
    """The device as health needs it."""

    @property
    def busy_since(self) -> float | None:
        """Since when it has been at one call, None while idle."""

    @property
    def alive(self) -> bool:
        """False once it can run nothing any more."""


class Health:
    """Whether the daemon is alive and ready; written by the service, read by the endpoints.

    A device busy on one call for more than `stall_seconds` is stalled, except while LOADING is unmet; one
    whose thread died is so at once.
    """

    def __init__(
        self, device: Device, *, stall_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stall_seconds = stall_seconds
        # Conditions and pauses are replaced as a whole: other threads read them.
        self._conditions: frozenset[str] = frozenset()
        self._pauses: tuple[str, ...] = ()
        self._device = device
        self._clock = clock
        self._beat = self._device_seen = clock()

    def require(self, condition: str) -> None:
        """The daemon is not ready before this is met."""
        self._conditions |= {condition}

    def meet(self, condition: str) -> None:
        self._conditions -= {condition}

    def pause(self, messages: Iterable[str]) -> None:
        """The daemon is not ready for these reasons, and no others that were given here before."""
        self._pauses = tuple(f"{PAUSED}{message}" for message in messages)

    def unmet(self) -> list[str]:
        """List what readiness waits for, in words; empty while the daemon is ready."""
        return sorted((*self._conditions, *self._pauses))

    def beat(self) -> float:
        """The event loop is running; seconds since it last was seen so."""
        now = self._clock()
        silence = now - self._beat
        self._beat = now
        if self._device.alive:
            self._device_seen = now
        return silence

    def silence_seconds(self, loop: str) -> float:
        """For how long EVENT_LOOP or DEVICE made no progress. A device that is idle is well."""
        now = self._clock()
        if loop == EVENT_LOOP:
            return now - self._beat
        if not self._device.alive:
            return now - self._device_seen
        since = self._device.busy_since
        return 0.0 if since is None else now - since

    def stalled(self) -> list[str]:
        """List the loops that make no progress; empty while all is well."""
        reasons = []
        silence = self.silence_seconds(EVENT_LOOP)
        if silence > HEARTBEAT_STALE_SECONDS:
            reasons.append(f"event loop stalled for {silence:.0f} s")
        silence = self.silence_seconds(DEVICE)
        if not self._device.alive:
            reasons.append("device thread died")
        elif LOADING not in self._conditions and silence > self.stall_seconds:
            reasons.append(f"device busy on one call for {silence:.0f} s")
        return reasons
