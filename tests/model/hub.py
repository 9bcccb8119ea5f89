"""A hub on loopback that fails as the real one does, and a process that loads from it."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GATED = "Access to model x/y is restricted. You must have access to it and be authenticated to access it."


class Hub(http.server.ThreadingHTTPServer):
    """Answers each request with one status, or serves a folder and fails for some of its files.

    What it says may be changed between two requests.
    """

    daemon_threads = True

    def __init__(self, status: int, headers: dict[str, str], folder: Path | None, only: str | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.headers = headers
        self.folder = folder
        self.only = only  # the files that fail, by what their name holds

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.respond(with_body=False)

    def do_GET(self) -> None:
        self.respond(with_body=True)

    def respond(self, with_body: bool) -> None:
        hub = self.server
        name = self.path.partition("?")[0].rpartition("/")[2]
        file = hub.folder / name if hub.folder is not None else None
        if self.headers["Range"]:  # of one that goes on where it broke off
            self.send(503, {}, b"", with_body)
            return
        if file is not None and (hub.only is None or hub.only not in name):
            if not file.is_file():
                self.send(404, {"X-Error-Code": "EntryNotFound"}, b"", with_body)
            else:
                self.send(200, {"ETag": f'"{name}"', "X-Repo-Commit": "a" * 40}, file.read_bytes(), with_body)
            return
        if hub.status == 200:  # of a file that breaks off
            raw = file.read_bytes() if file is not None else b"x" * 1000
            self.send(
                200, {"ETag": f'"{name}"', "X-Repo-Commit": "a" * 40}, raw, with_body, cut=len(raw) // 2
            )
            return
        self.send(hub.status, hub.headers, json.dumps({"error": GATED}).encode(), with_body)

    def send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool, cut: int = 0) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[: len(body) - cut])
            if cut:
                self.close_connection = True


@contextmanager
def hub_that_says(
    status: int, headers: dict[str, str] | None = None, folder: Path | None = None, only: str | None = None
) -> Iterator[Hub]:
    hub = Hub(status, headers or {}, folder, only)
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


PROGRAM = """
import json, sys
import huggingface_hub.utils._http as http
http.time.sleep = lambda seconds: None  # between its own tries
from pathlib import Path
from daemon.cli import complain, exit_code
import torch
from daemon.model.loading import load_model, locate_model
from daemon.model.sae import load_sae
from daemon.config import SaeSection
for line in sys.stdin:
    name, release, sae_id = json.loads(line)
    code = 0
    try:
        if release:
            load_sae(SaeSection(release=release, id=sae_id), device="cpu", dtype=torch.float32)
        else:
            load_model(locate_model(name, Path.cwd()), device="cpu", dtype=torch.float32)
    except Exception as error:
        code = complain(error, exit_code(error))
    print("exit code", code, flush=True)  # libraries print too
"""


class Loader:
    """A process that loads models and dictionaries, one after the other, from a hub at `url`."""

    def __init__(self, url: str, folder: Path) -> None:
        environment = {
            **os.environ,
            "HF_ENDPOINT": url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "HF_HUB_DOWNLOAD_TIMEOUT": "5",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "OMP_NUM_THREADS": "1",
        }
        environment.pop("HF_TOKEN", None)
        self._said = folder / "stderr"
        with self._said.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment,
                cwd=folder,
            )

    def load(self, name: str, *, release: str = "", sae_id: str = "") -> tuple[int, str]:
        """The exit code that loading leads to, and what it says to a person."""
        assert self._process.stdin is not None and self._process.stdout is not None
        before = len(self._said.read_bytes())
        self._process.stdin.write(json.dumps([name, release, sae_id]) + "\n")
        self._process.stdin.flush()
        answers = (line for line in self._process.stdout if line.startswith("exit code "))
        answer = next(answers, None)
        said = self._said.read_bytes()[before:].decode()
        assert answer is not None, f"the process ended: {said}"
        return int(answer.removeprefix("exit code ")), said

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@contextmanager
def loader_from(url: str, folder: Path) -> Iterator[Loader]:
    loader = Loader(url, folder)
    try:
        yield loader
    finally:
        loader.close()
