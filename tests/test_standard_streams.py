"""Commands whose standard input, output or error is closed, or whose reader is gone."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support import tiny

ROOT = Path(__file__).parents[1]
LENSD = (sys.executable, "-m", "daemon.cli")
CLOSED = [" ".join(some) for n in (1, 2, 3) for some in itertools.combinations(("<&-", ">&-", "2>&-"), n)]


def by_shell(redirections: str, *command: object, **env: str) -> subprocess.CompletedProcess[str]:
    """A command under a shell's redirections."""
    return subprocess.run(
        ["bash", "-c", f'exec "$@" {redirections}', "bash", *map(str, command)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        timeout=110,
    )


@pytest.fixture(scope="module")
def tiny_toml(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "lensd.toml"
    path.write_text(tiny.make_tiny(folder).toml() + "[inbox]\nsettle_seconds = 0\n")
    return path


@pytest.mark.parametrize("closed", CLOSED)
def test_no_file_gets_the_number_of_a_closed_stream(closed, tmp_path):
    program = (
        "import os, sys\n"
        "from daemon.streams import open_standard_streams\n"
        "open_standard_streams()\n"
        "with open(sys.argv[1], 'w') as file:\n"
        "    os.write(1, b'to standard output')\n"
        "    os.write(2, b'to standard error')\n"
        "    print('a line', file=sys.stdout, flush=True)\n"
        "    print('a line', file=sys.stderr, flush=True)\n"
        "    assert sys.stdin.read() == ''\n"
        "    file.write(f'{file.fileno()} {[os.get_inheritable(n) for n in (0, 1, 2)]}')\n"
    )
    result = by_shell(closed, sys.executable, "-c", program, tmp_path / "data")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "data").read_text() == "3 [True, True, True]"


@pytest.mark.slow
@pytest.mark.parametrize("closed", CLOSED)
def test_quick_commands_end_as_they_would(closed, tmp_path):
    (tmp_path / "inbox").mkdir()
    ends = {
        0: ("retry", "--list", "--inbox", tmp_path / "inbox"),
        2: ("run", "--once", "--max-batch-tokens", "many"),
        3: ("status", "--url", "http://127.0.0.1:1"),
    }
    for code, command in ends.items():
        result = by_shell(closed, *LENSD, *command)
        assert result.returncode == code, (command, result.stderr)
        assert "Traceback" not in result.stderr + result.stdout
        if code and "2>&-" not in closed:
            assert result.stderr.startswith("lensd: ")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_a_run_writes_what_it_would(closed, tiny_toml, tmp_path):
    (tmp_path / "inbox").mkdir()
    tiny.write_json(tmp_path / "inbox/a.json", tiny.contrast_records(100))
    folders = ("--inbox", tmp_path / "inbox", "--outbox", tmp_path / "outbox")
    result = by_shell(closed, *LENSD, "run", "--once", "--config", tiny_toml, *folders)
    assert result.returncode == 0, result.stderr
    (output,) = tmp_path.glob("outbox/a-*")
    assert len(pq.read_table(output / "metrics.parquet")) == 100
    for file in json.loads((output / "manifest.json").read_text())["files"]:
        assert hashlib.sha256((output / file["name"]).read_bytes()).hexdigest() == file["sha256"]


@pytest.mark.slow
def test_a_configuration_is_checked_without_any_of_them(tiny_toml, tmp_path):
    folders = ("--inbox", tmp_path / "inbox", "--outbox", tmp_path / "outbox")
    result = by_shell("<&- >&- 2>&-", *LENSD, "check-config", "--config", tiny_toml, *folders)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def failed_files(folder: Path, n: int) -> Path:
    """An inbox in whose failed/ so many files lie that their list fills no pipe."""
    (folder / "failed").mkdir(parents=True)
    for number in range(n):
        name = f"{number}-{'x' * 200}.json"
        (folder / "failed" / name).write_text("[")
        reason = {"name": name, "reason": "bad", "message": "because", "failed_at": "today"}
        (folder / "failed" / f"{name}.reason.json").write_text(json.dumps(reason))
    return folder


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_failure(tmp_path):
    inbox = failed_files(tmp_path / "inbox", 1000)
    command = f"set -o pipefail; {sys.executable} -m daemon.cli retry --list --inbox {inbox} | head -n 1"
    result = by_shell("", "bash", "-c", command)
    assert result.stdout.count("\n") == 1
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_complaints_to_a_reader_that_left_change_no_exit_code():
    command = f"{sys.executable} -m daemon.cli status --url nonsense 2> >(exec 0<&-; exit); exit $?"
    for _ in range(5):
        result = by_shell("", "bash", "-c", command)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", "")


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 200])
def test_output_that_a_full_disk_refuses_is_told_in_a_line(files, tmp_path):
    inbox = failed_files(tmp_path / "inbox", files)
    result = by_shell("> /dev/full", *LENSD, "retry", "--list", "--inbox", inbox)
    assert result.returncode == 3
    assert result.stderr == "lensd: standard output: No space left on device\n"


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_lines_come_as_they_are_whatever_the_buffering(unbuffered, tmp_path):
    inbox = failed_files(tmp_path / "inbox", 2)
    result = by_shell("", *LENSD, "retry", "--list", "--inbox", inbox, PYTHONUNBUFFERED=unbuffered)
    assert result.returncode == 0
    assert result.stdout.count("\n") == 2
