"""Sockets that listen on an address, on as many of the machine's protocols as there are.

Knows nothing about HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import Any

from daemon.errors import ConfigError, MachineError

EVERYWHERE = "::"  # every address of the machine, of IPv4 too
FREE_PORT_TRIES = 10  # of a port that is free on every address
ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT)  # such an address is not here
OF_THE_MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# Family and what `bind` takes.
Place = tuple[socket.AddressFamily, tuple[Any, ...]]


async def listen(address: str) -> list[socket.socket]:
    """Listen on every address that HOST of `address` (HOST:PORT) has on this machine, on one port.

    Port 0 takes one that is free. `[::]` takes IPv4 too, and IPv4 alone where there is no IPv6. Raises
    ConfigError where the address can't be had, MachineError where the machine is the cause.
    """
    host, _, port = address.rpartition(":")
    places = await resolve(address, host.strip("[]"), int(port))
    for attempt in range(FREE_PORT_TRIES):
        try:
            return bind_all(places)
        except OSError as error:
            taken_meanwhile = error.errno == errno.EADDRINUSE and port == "0"
            if not taken_meanwhile or attempt == FREE_PORT_TRIES - 1:
                raise refusal(address, error) from None
    raise AssertionError("the last attempt returns or raises")


async def resolve(address: str, host: str, port: int) -> list[Place]:
    """Where a host and a port are, each place once."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        raise refusal(address, error) from None
    except ValueError:  # of UnicodeError too: no name of a host
        raise ConfigError(f"http.address = {address}: {host!r} is no name of a host") from None
    places: list[Place] = [(family, where) for family, _, _, _, where in found]
    if host == EVERYWHERE:
        places.append((socket.AF_INET, ("0.0.0.0", port)))
    return list(dict.fromkeys(places))


def refusal(address: str, error: OSError) -> ConfigError | MachineError:
    """Why the address can't be had, in one line."""
    said = f"http.address = {address}: can't listen there ({error.strerror or error})"
    if error.errno in OF_THE_MACHINE or error.errno == socket.EAI_AGAIN:
        return MachineError(said)
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigError(f"{said}: choose a port above 1023 with --http HOST:PORT, or --no-http")
    return ConfigError(f"{said}: choose another with --http HOST:PORT, or --no-http")


def bind_all(places: Sequence[Place]) -> list[socket.socket]:
    """Listen at every place that this machine has. Raises OSError where it has none, or one is refused."""
    absent: OSError | None = None
    with contextlib.ExitStack() as opened:
        listening: list[socket.socket] = []
        for place in places:
            port = listening[0].getsockname()[1] if listening else None
            if place[0] == socket.AF_INET and any(map(takes_ipv4, listening)):
                continue
            try:
                one = bind(place, port)
            except OSError as error:
                if error.errno not in ABSENT:
                    raise
                absent = absent or error
            else:
                listening.append(opened.enter_context(one))
        if not listening:
            raise absent or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
        opened.pop_all()
        return listening


def bind(place: Place, port: int | None) -> socket.socket:
    """Listen at one place; `port` in place of its own if given."""
    family, (host, own_port, *rest) = place
    where = (host, own_port if port is None else port, *rest)
    both = host == EVERYWHERE and socket.has_dualstack_ipv6()
    try:
        one = socket.create_server(where, family=family, dualstack_ipv6=both)
    except OSError as error:  # whose words repeat the address
        raise OSError(error.errno, os.strerror(error.errno or 0)) from None
    one.setblocking(False)
    return one


def takes_ipv4(listening: socket.socket) -> bool:
    """Whether a socket of IPv6 hears IPv4 as well."""
    return listening.family == socket.AF_INET6 and not listening.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    )
