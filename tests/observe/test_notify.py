"""The service manager's view of the daemon, over a real datagram socket."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.observe.notify import Notify, status_line
from tests.reliability.daemons import Job
from tests.reliability.handling import running, wait_until
from tests.support import tiny

PATIENCE_SECONDS = 60.0
SILENCE_SECONDS = 0.5  # ten heartbeats of the hooked daemon


class Manager:
    """The service manager's end of the socket: every message so far."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.messages: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)

    def close(self) -> None:
        self._socket.close()

    def receive(self, seconds: float) -> str | None:
        self._socket.settimeout(seconds)
        try:
            message = self._socket.recv(65536).decode()
        except TimeoutError:
            return None
        self.messages.append(message)
        return message

    def until(self, condition: Callable[[str], bool]) -> str:
        """Receive until a message meets the condition; that message."""
        while (message := self.receive(PATIENCE_SECONDS)) is not None:
            if condition(message):
                return message
        raise AssertionError(f"waited in vain; last came {self.messages[-5:]}")

    def until_silent(self) -> None:
        while self.receive(SILENCE_SECONDS) is not None:
            pass


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path) -> Iterator[Manager]:
    address = f"@lensd-{uuid.uuid4()}" if request.param == "abstract" else str(tmp_path / "notify")
    manager = Manager(address)
    yield manager
    manager.close()


@pytest.fixture
def listening(tmp_path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


def watched_job(folder: Path, manager: Manager, hook: str = "quick_supervisor", **hook_args: str) -> Job:
    (folder / "inbox").mkdir()
    return Job(
        folder / "inbox",
        folder / "outbox",
        folder / "log",
        once=False,
        flags={"http.stall_seconds": 0.3},
        hook=f"tests.observe.notify_hooks:{hook}",
        hook_args=hook_args,
        environment={"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "60000000"},
    )


def test_messages_reach_the_socket_in_the_protocols_words(manager):
    notify = Notify(
        {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "1000", "WATCHDOG_PID": str(os.getpid())}
    )
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    for say in (notify.ready, notify.alive, notify.stopping, notify.reloading):
        say()
    notify.extend(1.5)
    notify.status("two\nlines")
    said = [manager.receive(PATIENCE_SECONDS) for _ in range(6)]
    assert said[:3] == ["READY=1", "WATCHDOG=1", "STOPPING=1"]
    first, _, usec = said[3].partition("\nMONOTONIC_USEC=")
    assert first == "RELOADING=1"
    assert before <= int(usec) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert said[4:] == ["EXTEND_TIMEOUT_USEC=1500000", "STATUS=two lines"]


def test_the_same_status_is_said_once(manager):
    notify = Notify({"NOTIFY_SOCKET": manager.address})
    for text in ("idle", "idle", "busy"):
        notify.status(text)
    notify.stopping()
    assert [manager.receive(PATIENCE_SECONDS) for _ in range(3)] == [
        "STATUS=idle",
        "STATUS=busy",
        "STOPPING=1",
    ]


@pytest.mark.parametrize(
    ("environment", "watched"),
    [
        ({}, False),
        ({"WATCHDOG_USEC": "0"}, False),
        ({"WATCHDOG_USEC": "5"}, True),
        ({"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}, False),
    ],
    ids=["without", "zero", "for any process", "for another process"],
)
def test_the_watchdog_is_fed_only_where_it_watches_this_process(environment, watched):
    assert Notify(environment).watched is watched


def test_without_a_manager_nothing_happens():
    notify = Notify({})
    notify.ready()
    notify.status("idle")


def test_a_manager_that_is_gone_is_reported_once(tmp_path, capsys):
    notify = Notify({"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    notify.ready()
    notify.stopping()
    assert capsys.readouterr().out.count("notify.failed") == 1


def test_the_status_says_what_waits_and_how_far_it_is():
    busy = status_line("running", files=1200, oldest_seconds=61.4, done=5, total=2000, rate=80.25)
    assert busy == "running; 1,200 waiting, the oldest for 61 s; 5 of 2,000 samples at 80.2/s"
    idle = status_line("running", files=0, oldest_seconds=0.0, done=7, total=7, rate=80.25)
    assert idle == "running; 0 waiting; 7 of 7 samples"


@pytest.mark.slow
def test_a_daemon_says_loading_ready_progress_and_stopping_in_order(daemons, listening, tmp_path):
    job = watched_job(tmp_path, listening)
    tiny.write_json(job.inbox / "a.json", tiny.contrast_records(4))
    with running(daemons, job):
        listening.until(lambda message: message.endswith("4 of 4 samples"))
    listening.until_silent()
    said = listening.messages
    loading = next(i for i, message in enumerate(said) if message.startswith("STATUS=loading the model"))
    ready, stopping = said.index("READY=1"), said.index("STOPPING=1")
    assert loading < ready < stopping
    assert said.count("READY=1") == 1
    assert "WATCHDOG=1" in said[ready:stopping]
    assert not any(message.startswith("EXTEND") for message in said[ready:stopping])


@pytest.mark.slow
def test_no_watchdog_message_while_the_device_hangs(daemons, listening, tmp_path):
    reached, go = tmp_path / "reached", tmp_path / "go"
    job = watched_job(tmp_path, listening, "hanging_device", reached=str(reached), go=str(go))
    with running(daemons, job) as pid:
        listening.until(lambda message: message == "WATCHDOG=1")
        tiny.write_json(job.inbox / "a.json", tiny.contrast_records(2))
        wait_until(reached.exists, "the device at its call", pid)
        listening.until(lambda message: message.startswith("STATUS=device busy on one call"))
        hanging = len(listening.messages)
        listening.until_silent()
        go.touch()
        listening.until(lambda message: message == "STATUS=running; 0 waiting; 2 of 2 samples")
        resumed = listening.messages[hanging:]
    first_well = next(i for i, message in enumerate(resumed) if message.startswith("STATUS=running"))
    first_fed = resumed.index("WATCHDOG=1")
    assert first_fed >= first_well - 1  # fed at the heartbeat that says that all is well, not before


@pytest.mark.slow
def test_no_watchdog_message_while_the_event_loop_stalls(daemons, listening, tmp_path):
    stall, reached = tmp_path / "stall", tmp_path / "reached"
    job = watched_job(tmp_path, listening, "stalling_loop", stall=str(stall), reached=str(reached))
    with running(daemons, job) as pid:
        listening.until(lambda message: message == "WATCHDOG=1")
        stall.touch()
        wait_until(reached.exists, "the event loop at its stall", pid)
        listening.until_silent()
        stalled = len(listening.messages)
        assert listening.receive(SILENCE_SECONDS) is None
        stall.unlink()
        listening.until(lambda message: message == "WATCHDOG=1")
        assert len(listening.messages) > stalled


@pytest.mark.slow
def test_a_drain_asks_for_time_only_as_long_as_it_makes_progress(daemons, listening, tmp_path):
    reached, go = tmp_path / "reached", tmp_path / "go"
    job = watched_job(tmp_path, listening, "hanging_device", reached=str(reached), go=str(go))
    tiny.write_json(job.inbox / "a.json", tiny.contrast_records(2))
    pid = daemons.start(job)
    try:
        wait_until(reached.exists, "the device at its call", pid)
        os.kill(pid, signal.SIGTERM)
        listening.until(lambda message: message == "STOPPING=1")
        listening.until(lambda message: message == "EXTEND_TIMEOUT_USEC=30000000")
        listening.until(lambda message: message.startswith("STATUS=device busy on one call"))
        hanging = len(listening.messages)
        listening.until_silent()
        assert not any(message.startswith("EXTEND") for message in listening.messages[hanging:])
        go.touch()
    except BaseException:
        daemons.kill(pid)
        raise
    assert daemons.wait(pid) == 0
