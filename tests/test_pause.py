from __future__ import annotations

import asyncio
import errno
import resource

import pytest

from daemon.errors import MachineError
from daemon.pause import DISK, FOLDERS, Pause, describe


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def failing(times: int, code: int):
    """An operation that the machine refuses so many times."""
    calls = []

    async def attempt() -> int:
        calls.append(None)
        if len(calls) <= times:
            raise OSError(code, "refused", "/outbox/x")
        return len(calls)

    return attempt


@pytest.mark.parametrize(
    "code",
    [
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMLINK, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
        *(errno.EACCES, errno.EROFS, errno.ENOENT, errno.EXDEV, errno.ESTALE, errno.ETIMEDOUT, errno.ENOLCK),
        *(errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV),
    ],
)
async def test_what_the_machine_refuses_for_a_while_is_tried_again(code):
    pause = Pause(retry_seconds=0.001)
    assert await pause.outlast(failing(3, code), "write") == 4


async def test_every_repetition_is_told_with_its_stage():
    told = []
    await Pause(retry_seconds=0.001, on_retry=told.append).outlast(failing(3, errno.ENOSPC), "read")
    assert told == ["read", "read", "read"]


async def test_a_try_that_is_not_repeated_is_not_told():
    told = []
    pause = Pause(patient=False, on_retry=told.append)
    with pytest.raises(MachineError):
        await pause.outlast(failing(1, errno.ENOSPC), "read")
    assert await pause.outlast(failing(0, errno.ENOSPC), "read") == 1
    assert told == []


async def test_trouble_met_is_a_reason_until_it_lapses():
    clock = Clock()
    pause = Pause(retry_seconds=0.001, clock=clock)
    await pause.outlast(failing(1, errno.ENOSPC), "write")
    clock.now = 0.0019
    assert pause.reasons == {DISK: "/outbox/x: refused"}
    clock.now = 0.002
    assert pause.reasons == {}


@pytest.mark.parametrize(
    ("code", "error"),
    [(errno.EINVAL, OSError), (errno.EIO, MachineError), (errno.EUCLEAN, MachineError)],
)
async def test_what_no_waiting_helps_is_raised(code, error):
    attempt = failing(1, code)
    with pytest.raises(error, match="refused"):
        await Pause(retry_seconds=0.001).outlast(attempt, "write")
    assert await attempt() == 2  # tried once


@pytest.mark.parametrize(
    ("limit", "said"), [(4096, "no file of more than 4096 bytes"), (None, "takes no larger file")]
)
def test_a_file_that_is_too_large_is_told_with_the_limit(monkeypatch, limit, said):
    limits = (resource.RLIM_INFINITY if limit is None else limit, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)
    message = describe(OSError(errno.EFBIG, "File too large", "/outbox/x"))
    assert message.startswith("/outbox/x: File too large: ")
    assert said in message


async def test_a_run_that_can_not_wait_fails_at_once():
    with pytest.raises(MachineError, match="/outbox/x: refused"):
        await Pause(patient=False).outlast(failing(1, errno.ENOSPC), "write")


async def test_the_wait_ends_when_the_daemon_is_told_to_stop():
    pause = Pause(retry_seconds=3600.0)
    waiting = asyncio.create_task(pause.outlast(failing(1, errno.ENOSPC), "write"))
    while not pause.reasons:
        await asyncio.sleep(0)
    pause.give_up()
    assert await waiting == 2
    with pytest.raises(MachineError):
        await pause.outlast(failing(1, errno.ENOSPC), "write")


async def test_claiming_waits_while_a_reason_holds():
    pause = Pause(retry_seconds=0.001)
    pause.hold(FOLDERS, "gone")
    waiting = asyncio.create_task(pause.over())
    for _ in range(5):
        await asyncio.sleep(0.002)
    assert not waiting.done()
    pause.hold(FOLDERS, None)
    await waiting


async def test_a_run_that_can_not_wait_claims_nothing_while_a_reason_holds():
    pause = Pause(patient=False)
    await pause.over()
    pause.hold(DISK, "full")
    with pytest.raises(MachineError, match="full"):
        await pause.over()
