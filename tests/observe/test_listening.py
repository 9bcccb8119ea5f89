"""The addresses that the daemon listens on: real sockets, in a network without IPv6 too."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.config import load_config
from daemon.errors import ConfigError, MachineError
from daemon.observe import listening
from daemon.observe.listening import listen
from daemon.tools.status import urls_of

ROOT = Path(__file__).parents[2]

# Loopback alone, without an address of IPv6; localhost is both, as in many a container's /etc/hosts.
WITHOUT_IPV6 = """
import fcntl, json, socket, struct, sys
with socket.socket() as control:
    fcntl.ioctl(control, 0x8914, struct.pack("16sh14x", b"lo", 0x49))
with open("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w") as switch:
    switch.write("1")
sys.stdout.write("ready\\n")
"""


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")


def without_ipv6(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a network of its own that has no IPv6, where localhost is ::1 and 127.0.0.1."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare (Debian: util-linux)")
    (folder / "hosts").write_text("::1 localhost\n127.0.0.1 localhost\n")
    (folder / "program.py").write_text(WITHOUT_IPV6 + program)
    script = 'mount --bind "$1/hosts" /etc/hosts && exec "$2" "$1/program.py"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--net", "--mount", "sh", "-c", script, "sh", folder, sys.executable],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    if not done.stdout.startswith("ready"):
        pytest.skip(f"no network of its own to be had: {done.stderr.strip()[-200:]}")
    return done


def reached(listener: socket.socket, host: str) -> bool:
    """Whether a client at `host` gets through."""
    port = listener.getsockname()[1]
    try:
        with socket.create_connection((host, port), timeout=10):
            return True
    except OSError:
        return False


def close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        one.close()


@needs_ipv6
async def test_every_address_takes_ipv4_and_ipv6():
    sockets = await listen("[::]:0")
    try:
        assert reached(sockets[0], "127.0.0.1")
        assert reached(sockets[0], "::1")
    finally:
        close(sockets)


@needs_ipv6
async def test_an_address_of_one_protocol_takes_that_alone():
    for address, own, other in (("[::1]:0", "::1", "127.0.0.1"), ("0.0.0.0:0", "127.0.0.1", "::1")):
        sockets = await listen(address)
        try:
            assert reached(sockets[0], own)
            assert not reached(sockets[0], other)
        finally:
            close(sockets)


async def test_a_name_of_several_addresses_has_one_port_on_all_of_them():
    sockets = await listen("localhost:0")
    try:
        assert len({one.getsockname()[1] for one in sockets}) == 1
        known = {info[4][0] for info in socket.getaddrinfo("localhost", None)}
        assert {one.getsockname()[0] for one in sockets} <= known
    finally:
        close(sockets)


@pytest.mark.slow
def test_without_ipv6_it_listens_on_what_there_is(tmp_path):
    program = (
        "import asyncio\n"
        "from daemon.observe.listening import listen\n"
        "found = {}\n"
        "for address in ('localhost:0', '[::]:0', '127.0.0.1:0', '0.0.0.0:0'):\n"
        "    sockets = asyncio.run(listen(address))\n"
        "    port = sockets[0].getsockname()[1]\n"
        "    with socket.create_connection(('127.0.0.1', port), timeout=10):\n"
        "        found[address] = len(sockets)\n"
        "try:\n"
        "    asyncio.run(listen('[::1]:0'))\n"
        "except Exception as error:\n"
        "    found['[::1]:0'] = f'{type(error).__name__}: {error}'\n"
        "print(json.dumps(found))\n"
    )
    found = json.loads(without_ipv6(program, tmp_path).stdout.splitlines()[1])
    refused = found.pop("[::1]:0")
    assert found == {"localhost:0": 1, "[::]:0": 1, "127.0.0.1:0": 1, "0.0.0.0:0": 1}
    assert refused.startswith("ConfigError: http.address = [::1]:0: can't listen there (Cannot assign")


def test_without_any_ipv6_in_the_kernel_every_address_is_ipv4s(monkeypatch):
    real = socket.socket

    def refusing(family: int = -1, *args: object, **options: object) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return real(family, *args, **options)

    monkeypatch.setattr(listening.socket, "socket", refusing)
    places = asyncio.run(listening.resolve("[::]:0", "::", 0))
    (one,) = listening.bind_all(places)
    with one:
        assert one.getsockname()[0] == "0.0.0.0"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("no-such-host.invalid:9478", "can't listen there"),
        ("192.0.2.1:9478", "can't listen there (Cannot assign requested address)"),
        (f"{'a' * 70}.example:9478", "is no name of a host"),
        ("a..b:9478", "is no name of a host"),
        ("a\0b:9478", "http.address"),
    ],
)
async def test_what_is_not_here_is_one_line(address, told):
    with pytest.raises((ConfigError, MachineError)) as refused:
        close(await listen(address))
    assert told in str(refused.value)
    assert str(refused.value).startswith(f"http.address = {address}: ")
    assert "\n" not in str(refused.value)


async def test_a_port_in_use_on_one_of_the_addresses_is_refused():
    sockets = await listen("127.0.0.1:0")
    port = sockets[0].getsockname()[1]
    try:
        for host in ("127.0.0.1", "localhost", "0.0.0.0", "[::]"):
            with pytest.raises(ConfigError, match=r"Address already in use.*: choose another"):
                close(await listen(f"{host}:{port}"))
    finally:
        close(sockets)


@pytest.mark.parametrize(
    ("error", "kind", "told"),
    [
        (PermissionError(errno.EACCES, "Permission denied"), ConfigError, "choose a port above 1023"),
        (OSError(errno.EMFILE, "Too many open files"), MachineError, "Too many open files"),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), MachineError, "Temporary failure"),
        (socket.gaierror(socket.EAI_NONAME, "Name not known"), ConfigError, "Name not known"),
    ],
)
def test_a_refusal_says_whose_it_is(error, kind, told):
    refused = listening.refusal("somewhere:80", error)
    assert type(refused) is kind
    assert told in str(refused)


def test_a_privileged_port_is_refused_in_a_line_to_who_may_not(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root, to drop its rights")
    start = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()
    if int(start) == 0:
        pytest.skip("every port is free for all here")
    program = (
        "import asyncio, os\n"
        "from daemon.observe.listening import listen\n"
        "asyncio.run(listen('127.0.0.1:0'))[0].close()\n"  # imports what others may not read
        "os.setuid(65534)\n"
        "try:\n"
        "    asyncio.run(listen('127.0.0.1:1'))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.stdout.startswith("ConfigError http.address = 127.0.0.1:1: can't listen there (Permission")


@pytest.mark.parametrize(
    ("address", "urls"),
    [
        ("127.0.0.1:9478", ["http://127.0.0.1:9478"]),
        ("localhost:9478", ["http://localhost:9478"]),
        ("0.0.0.0:80", ["http://127.0.0.1:80"]),
        ("[::]:80", ["http://[::1]:80", "http://127.0.0.1:80"]),
    ],
)
def test_the_status_command_asks_at_the_same_places(address, urls):
    assert urls_of(load_config(env={}, flags={"http.address": address})) == urls


@pytest.mark.slow
def test_the_status_command_finds_a_daemon_that_has_no_ipv6(tmp_path):
    program = (
        "import asyncio, threading\n"
        "from http.server import BaseHTTPRequestHandler, HTTPServer\n"
        "from daemon.cli import main\n"
        "class Answer(BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200)\n"
        "        self.end_headers()\n"
        "        self.wfile.write(b'no status')\n"
        "    def log_message(self, *args):\n"
        "        pass\n"
        "server = HTTPServer(('127.0.0.1', 0), Answer)\n"
        "threading.Thread(target=server.serve_forever, daemon=True).start()\n"
        "import os\n"
        "os.environ['LENSD_HTTP__ADDRESS'] = f'[::]:{server.server_port}'\n"
        "sys.exit(main(['status']))\n"
    )
    done = without_ipv6(program, tmp_path)
    assert done.returncode == 3
    assert "the answer is no status" in done.stderr
