"""`lensd status` beside a real daemon: the same numbers, and exit codes that a script can use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

from daemon.config import load_config
from daemon.errors import ConfigError, MachineError
from daemon.tools.status import fetch, healthy, sparkline, urls_of
from tests.reliability.daemons import ROOT, Job
from tests.reliability.handling import events, running, wait_until
from tests.support import tiny

pytestmark = pytest.mark.slow  # starts processes


def lensd_status(*args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "daemon.cli", "status", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    (tmp_path / "inbox").mkdir()

    def make(**flags: object) -> Job:
        serving = {"http.enabled": True, "http.address": "127.0.0.1:0"}
        settings = {name.replace("__", "."): value for name, value in flags.items()}
        folders = (tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log")
        return Job(*folders, once=False, flags={**serving, **settings})

    return make


def url(job: Job, pid: int) -> str:
    wait_until(lambda: events(job.log, "http.listening"), "the address", pid)
    return str(events(job.log, "http.listening")[0]["url"])


def test_it_shows_what_a_ready_daemon_did_and_exits_0(daemons, job, tmp_path):
    job = job()
    tiny.write_json(job.inbox / "study.json", [*tiny.contrast_records(9), {"id": "no text"}])
    (job.inbox / "bad\x1b[31m.json").write_text("[{")
    with running(daemons, job) as pid:
        address = url(job, pid)
        wait_until(lambda: len(fetch(address).files) == 2 and healthy(fetch(address)), "both files", pid)
        text, as_json = lensd_status("--url", address), lensd_status("--url", address, "--json")
        config = tmp_path / "lensd.toml"
        config.write_text(f'[http]\naddress = "{address.removeprefix("http://")}"\n')
        by_config = lensd_status("--config", config)
    assert (text.returncode, as_json.returncode, by_config.returncode) == (0, 0, 0), text.stderr
    for shown in (
        "idle",
        "9 samples",
        "1 reject",
        "study.json",
        "committed",
        "bad\\x1b[31m.json",
        "not valid",
    ):
        assert shown in text.stdout
    assert "\x1b" not in text.stdout
    totals = json.loads(as_json.stdout)["totals"]
    assert (totals["rows"], totals["rejects"], totals["committed"], totals["failed"]) == (9, 1, 1, 1)
    assert by_config.stdout.splitlines()[0] == text.stdout.splitlines()[0]


def test_a_paused_daemon_exits_1_and_says_why(daemons, job):
    job = job(outbox__min_free_bytes=1 << 60)
    with running(daemons, job) as pid:
        address = url(job, pid)
        wait_until(lambda: fetch(address).state == "paused", "the pause", pid)
        result = lensd_status("--url", address)
    assert result.returncode == 1
    assert "paused" in result.stdout.splitlines()[0]
    assert "outbox.min_free_bytes" in result.stdout


def test_what_was_lost_with_a_folder_is_no_work_at_hand(daemons, job, tmp_path):
    gate = {"reached": str(tmp_path / "reached"), "go": str(tmp_path / "go")}
    job = replace(job(), hook="tests.reliability.hooks:gated", hook_args=gate)
    tiny.write_json(job.inbox / "study.json", tiny.contrast_records(9))
    with running(daemons, job) as pid:
        address = url(job, pid)
        wait_until((tmp_path / "reached").exists, "the first batch", pid)
        wait_until(lambda: fetch(address).backlog.samples_under_way == 9, "samples under way", pid)
        shutil.rmtree(job.inbox)
        job.inbox.mkdir()
        wait_until(lambda: events(job.log, "service.folders_lost"), "the loss to be found", pid)
        (tmp_path / "go").touch()
        wait_until(lambda: fetch(address).state == "idle", "idleness", pid)
        assert fetch(address).backlog.samples_under_way == 0


def test_a_daemon_that_is_not_there_is_one_line_and_exits_3():
    result = lensd_status("--url", "http://127.0.0.1:9")
    assert result.returncode == 3
    assert result.stdout == ""
    assert result.stderr.startswith("lensd: http://127.0.0.1:9: no answer (")
    assert result.stderr.count("\n") == 1


def test_what_is_no_url_is_one_line_and_exits_2():
    result = lensd_status("--url", "localhost")
    assert (result.returncode, result.stderr) == (2, "lensd: --url localhost: expected http://HOST:PORT\n")


@pytest.fixture
def someone_else() -> Iterator[str]:
    """A server that is no lensd."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.startswith("/here") else 404)
            self.end_headers()
            self.wfile.write(b'{"hello": "world"}')

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_answer_of_someone_else_is_said_to_be_one(someone_else):
    with pytest.raises(MachineError, match="the answer is no status"):
        fetch(f"{someone_else}/here")
    with pytest.raises(MachineError, match="answered 404: is that lensd"):
        fetch(someone_else)


@pytest.mark.parametrize(
    ("address", "url"),
    [
        ("127.0.0.1:9478", "http://127.0.0.1:9478"),
        ("0.0.0.0:80", "http://127.0.0.1:80"),
        ("[::]:80", "http://[::1]:80"),
    ],
)
def test_it_asks_where_the_configuration_listens(address, url):
    assert urls_of(load_config(env={}, flags={"http.address": address}))[0] == url


@pytest.mark.parametrize("flags", [{"http.enabled": False}, {"http.address": "127.0.0.1:0"}])
def test_a_configuration_without_an_address_is_one_clear_line(flags):
    with pytest.raises(ConfigError, match=r"^http\.(enabled|address) .*: (such|give)"):
        urls_of(load_config(env={}, flags=flags))


def test_a_sparkline_never_hides_a_value():
    assert sparkline([0, 1, 4, 8]) == "▁▁▄█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == ""
