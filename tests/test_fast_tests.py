"""Fast tests are refused the processes that make tests slow."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.processes import NotInAFastTest, is_slow


@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, "-m", "daemon.cli", "run"],
        [sys.executable, "-m", "tests.reliability.daemons"],
        ["lensd", "status"],
        ["bash", "-c", 'exec "$@"', "bash", sys.executable, "-m", "daemon.cli"],
        ["bash", "-c", "python -m daemon.cli status | head"],
        ["bash", "-c", "lensd run --once"],
        ["unshare", "-m", "sh", "-c", "true"],
        ["mount", "-t", "tmpfs", "none", "/nowhere"],
        ["prometheus"],
        ["nginx"],
        ["java", "-version"],
    ],
    ids=" ".join,
)
def test_daemons_servers_and_mounts_are_refused(command):
    with pytest.raises(NotInAFastTest, match="mark the test as slow"):
        subprocess.run(command)


def test_a_fork_is_refused():
    with pytest.raises(NotInAFastTest):
        os.fork()


@pytest.mark.parametrize("command", [["git", "--version"], [sys.executable, "-c", "print('lensd')"]])
def test_a_command_that_does_one_thing_is_run(command):
    assert not is_slow(command)
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_slow_test_starts_what_it_needs():
    command = [sys.executable, "-m", "daemon.cli", "--help"]
    assert is_slow(command)
    assert subprocess.run(command, capture_output=True).returncode == 0
