"""`lensd status` asked of what is no daemon, or of one that answers nonsense: one line, never a traceback."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from rich.console import Console

from daemon.cli import main
from daemon.observe.status import to_json
from daemon.tools.status import fetch, print_status
from tests.observe.test_status import INFO, Daemon

Answering = Callable[[bytes], str]


@pytest.fixture
def answering() -> Iterator[Answering]:
    """Starts a server that answers everything with these bytes; gives its URL."""
    running = []

    def start(body: bytes) -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Answer)
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def status() -> dict:
    daemon = Daemon()
    daemon.board.describe(INFO, 4096)
    daemon.run(20, samples=3, tokens=30)
    return json.loads(to_json(daemon.status()))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 400])
@pytest.mark.parametrize("field", ["at", "started_at"])
def test_a_number_that_is_none_is_no_status(answering, field, number, capsys):
    body = json.dumps(status() | {field: "HERE"}).replace('"HERE"', number)
    assert main(["status", "--url", answering(body.encode())]) == 3
    said = capsys.readouterr().err
    assert "the answer is no status" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("width", [1, 5, 20, 200])
@pytest.mark.parametrize("number", [1e300, -1e300, 1e18, -5])
def test_any_other_number_is_shown_at_any_width(answering, number, width):
    answer = status() | {"at": number}
    answer["backlog"]["oldest_seconds"] = answer["pace"]["eta_seconds"] = number
    written = io.StringIO()
    print_status(Console(file=written, width=width), fetch(answering(json.dumps(answer).encode())))
    assert written.getvalue()


@pytest.mark.parametrize("body", [b"", b"{}", b"[" * 100_000, b"\xff\xfe", b"0" * (17 << 20), b"null"])
def test_what_is_no_status_is_one_line(answering, body, capsys):
    assert main(["status", "--url", answering(body)]) == 3
    said = capsys.readouterr().err
    assert "the answer is no status" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "url",
    ["", "http://", "http://[", "http://h:99999", "http://h:0", "http://h:x", "http://a b", "ftp://h", "\0"],
)
def test_what_is_no_url_is_bad_usage(url, capsys):
    assert main(["status", "--url", url]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lensd: --url ")
    assert said.count("\n") == 1
