"""Tells the service manager how the daemon is: sd_notify(3) over the socket that it named.

Where no manager listens ($NOTIFY_SOCKET is not set) every call does nothing. Knows nothing about files,
models or health; what is said, and when, is the service's business.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping

import structlog

from daemon.escaping import escape_control

SEND_SECONDS = 1.0  # a manager that does not read for so long misses the message

log = structlog.get_logger()


class Notify:
    """The way to the service manager. `environment` is what it set for this process."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._told = ""
        self._failing = False
        usec, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        self.watched = usec.isdecimal() and int(usec) > 0 and pid in ("", str(os.getpid()))

    def ready(self) -> None:
        """The model is loaded and the folders are open. Also ends a reload."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Settings are read again; `ready` says that this is over."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        """No more files are taken; those at hand are finished."""
        self._send("STOPPING=1")

    def status(self, text: str) -> None:
        """One line for people, as `systemctl status` shows it; sent where it differs from the last."""
        if text != self._told:
            self._told = text
            self._send("STATUS=" + escape_control(" ".join(text.split())))

    def alive(self) -> None:
        """Feed the watchdog, where there is one."""
        if self.watched:
            self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Ask for that much more time from now to start or to stop."""
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.settimeout(SEND_SECONDS)
                sender.sendto(os.fsencode(message), os.fsencode(self._address))
        except OSError as error:
            if not self._failing:  # once, not at every heartbeat
                log.warning("notify.failed", socket=self._address.replace("\0", "@"), error=str(error))
            self._failing = True
        else:
            self._failing = False


def status_line(
    condition: str, *, files: int, oldest_seconds: float, done: int, total: int, rate: float
) -> str:
    """How the daemon is, in one line: its condition, what waits, and how far it is with what it took up."""
    backlog = f"{files:,} waiting" + (f", the oldest for {oldest_seconds:.0f} s" if files else "")
    progress = f"{done:,} of {total:,} samples"
    if done < total:
        progress += f" at {rate:.1f}/s"
    return f"{condition}; {backlog}; {progress}"
