"""A hub on loopback: as much of the Hugging Face hub's protocol as its clients use, and its troubles.

It serves folders as repositories, and knows neither models nor dictionaries.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

LARGE = (".safetensors", ".npz", ".pt", ".pth", ".bin")  # lie elsewhere: the hub answers with a redirect
GATED = "Access to model {} is restricted. You must have access to it and be authenticated to access it."
NAMES = r"/(?P<repo>[^/]+/[^/]+)"
RESOLVE = re.compile(NAMES + r"/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
ELSEWHERE = re.compile(r"/elsewhere" + NAMES + r"/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(
    r"/api/models" + NAMES + r"(?:/(?P<kind>revision|tree|refs)(?:/(?P<revision>[^/]+))?(?P<under>/.*)?)?"
)


@dataclass(frozen=True, slots=True)
class Trouble:
    """What the hub does instead of answering."""

    status: int = 0  # that it answers, instead of what was asked for
    code: str = ""  # of the hub's own, in X-Error-Code
    message: str = ""
    hangs: bool = False  # takes the request and says nothing
    cut: bool = False  # breaks the connection off in the middle of a body
    shorter: int = 0  # bytes that a body has less than the hub said of the file
    times: int = 1_000_000  # how often; then it has passed
    body: bytes | None = None  # that it answers, whatever was asked for
    only: str = ""  # in the name of the file; others are served


NONE = Trouble(times=0)
DENIED = "Access to model x/y is restricted and you are not in the authorized list."
BAD = "Invalid credentials in Authorization header"
TROUBLES = {
    "gated": Trouble(401, "GatedRepo", GATED.format("x/y")),
    "licence not accepted": Trouble(403, "GatedRepo", DENIED),
    "bad token": Trouble(401, "", BAD),
    "no repository": Trouble(404, "RepoNotFound", "Repository not found"),
    "no revision": Trouble(404, "RevisionNotFound", "Invalid rev id: x"),
    "no file": Trouble(404, "EntryNotFound", "Entry not found"),
    "no right": Trouble(403, "", "Forbidden"),
    "busy": Trouble(429, "", "Too many requests"),
    "broken": Trouble(500, "", "Internal Error"),
    "away": Trouble(503, "", "Service Unavailable"),
    "hanging": Trouble(hangs=True),
    "no hub": Trouble(body=b"<html>Log in</html>"),
    "cut off": Trouble(cut=True),
    "wrong length": Trouble(shorter=7),
}


@dataclass(slots=True)
class Repository:
    """The commits of a repository, each a folder, and the names that stand for them."""

    commits: dict[str, Path] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # branches and tags
    token: str | None = None  # who reads it must show this one

    def commit_of(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class Hub:
    """Serves repositories at `url`, until `close`. What it holds and its trouble may change at any time."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []  # such as "HEAD /x/y/resolve/main/config.json", in order
        self.trouble = NONE
        self.passing = threading.Event()  # ends what hangs
        self.troubled = 0  # requests that met the trouble
        self.port = 0
        self.up()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def add(self, repo: str, folder: Path, *refs: str, token: str | None = None) -> str:
        """Make a folder the newest commit of a repository, behind `refs` (main); the commit."""
        repository = self.repositories.setdefault(repo, Repository())
        digest = hashlib.sha1(repo.encode())
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
        commit = digest.hexdigest()
        repository.commits[commit] = folder
        repository.refs |= dict.fromkeys(refs or ("main",), commit)
        repository.token = token
        return commit

    def suffers(self, trouble: Trouble) -> None:
        """Be in trouble from now on; NONE ends it."""
        self.passing.set()  # what hangs now answers
        self.passing = threading.Event()
        self.trouble, self.troubled = trouble, 0

    def up(self) -> None:
        """Listen, at the port of before where there was one."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.hub = self
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def down(self) -> None:
        """Refuse connections."""
        self.passing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self._server.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._thread.is_alive():
            self.down()


@contextlib.contextmanager
def running_hub() -> Iterator[Hub]:
    hub = Hub()
    try:
        yield hub
    finally:
        hub.close()


@contextlib.contextmanager
def hub_here(hub: Hub, cache: Path) -> Iterator[None]:
    """Have this process take `hub` for the hub, and `cache` for its cache: both are read once, at import."""
    from huggingface_hub import constants, hf_api

    changes = [
        (constants, "ENDPOINT", hub.url),
        (constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"),
        (constants, "HF_HUB_CACHE", str(cache)),
        (constants, "HF_HUB_OFFLINE", False),
        (constants, "HF_HUB_DISABLE_XET", True),
        (constants, "HF_HUB_ETAG_TIMEOUT", 1),  # seconds, as HF_HUB_DOWNLOAD_TIMEOUT
        (constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1),
        (hf_api.api, "endpoint", hub.url),
    ]
    before = [getattr(where, name) for where, name, _ in changes]
    for where, name, value in changes:
        setattr(where, name, value)
    try:
        yield
    finally:
        for (where, name, _), value in zip(changes, before, strict=True):
            setattr(where, name, value)


def hub_environment(hub: Hub, home: Path) -> dict[str, str]:
    """The variables with which another process takes `hub` for the hub, and keeps its cache under `home`."""
    timeouts = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1"}  # seconds
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **timeouts}


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.answer()

    def answer(self) -> None:
        hub, path = self.server.hub, unquote(self.path.partition("?")[0])
        hub.requests.append(f"{self.command} {path}")
        trouble = NONE
        if hub.trouble.only in path and hub.troubled < hub.trouble.times:
            trouble = hub.trouble
            # of a body's troubles the headers are none
            hub.troubled += bool(trouble.status or trouble.hangs or self.command == "GET")
        if trouble.body is not None:
            self.send(200, {"Content-Type": "text/html"}, trouble.body)
            return
        if trouble.hangs:
            hub.passing.wait(60)
            self.close_connection = True
        elif trouble.status:
            self.say(trouble.status, trouble.code, trouble.message)
        elif found := RESOLVE.fullmatch(path):
            self.resolve(trouble, **found.groupdict())
        elif found := ELSEWHERE.fullmatch(path):
            repository = hub.repositories[found["repo"]]
            self.send_file(repository.commits[found["revision"]] / found["file"], {}, trouble)
        elif (found := API.fullmatch(path)) and self.command == "GET":
            self.tell(**found.groupdict())
        else:
            self.say(404, "", "Not found")

    def commit(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """The commit that a client may read, and its folder; None where it has been told why not."""
        repository, shown = self.server.hub.repositories.get(repo), self.headers["Authorization"]
        if shown is not None and shown == "Bearer wrong":
            return self.say(401, "", BAD)
        if repository is None:
            return self.say(*((404,) if shown else (401,)), "RepoNotFound", "Repository not found")
        if repository.token is not None and shown != f"Bearer {repository.token}":
            return (
                self.say(403, "GatedRepo", DENIED)
                if shown
                else self.say(401, "GatedRepo", GATED.format(repo))
            )
        commit = repository.commit_of(revision)
        if commit is None:
            return self.say(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repository.commits[commit]

    def resolve(self, trouble: Trouble, repo: str, revision: str, file: str) -> None:
        if (found := self.commit(repo, revision)) is None:
            return
        commit, folder = found
        told = {"X-Repo-Commit": commit}
        if not (folder / file).is_file():
            self.say(404, "EntryNotFound", "Entry not found", told)
        elif file.endswith(LARGE):
            raw = (folder / file).read_bytes()
            told |= {
                "Location": f"http://localhost:{self.server.hub.port}/elsewhere/{repo}/{commit}/{file}",
                "X-Linked-Etag": f'"{hashlib.sha256(raw).hexdigest()}"',
                "X-Linked-Size": str(len(raw)),
            }
            self.send(302, told, b"")
        else:
            self.send_file(folder / file, told, trouble)

    def send_file(self, path: Path, told: dict[str, str], trouble: Trouble) -> None:
        """The file or the range of it that was asked for."""
        raw = path.read_bytes()
        told = told | {"ETag": f'"{hashlib.sha1(raw).hexdigest()}"', "Accept-Ranges": "bytes"}
        status, body = 200, raw
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            first, last = int(asked[1]), min(int(asked[2] or len(raw)), len(raw) - 1)
            if first > last:
                self.send(416, {"Content-Range": f"bytes */{len(raw)}"}, b"")
                return
            status, body = 206, raw[first : last + 1]
            told["Content-Range"] = f"bytes {first}-{last}/{len(raw)}"
        if self.command == "GET" and trouble.shorter:
            body = body[: -trouble.shorter]
        self.send(status, told, body, cut=len(body) // 2 if trouble.cut else 0)

    def tell(self, repo: str, kind: str | None, revision: str | None, under: str | None) -> None:
        """The hub's description of a repository."""
        if (found := self.commit(repo, revision or "main")) is None:
            return
        commit, folder = found
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        if kind == "refs":
            refs = self.server.hub.repositories[repo].refs.items()
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in refs]
            self.send_json({"branches": branches, "tags": [], "converts": []})
        elif kind == "tree":
            inside = [path for path in files if path.is_relative_to(folder / (under or "").strip("/"))]
            if not inside:
                self.say(404, "EntryNotFound", f"{under} does not exist on {revision}")
                return
            self.send_json(
                [
                    {
                        "type": "file",
                        "path": path.relative_to(folder).as_posix(),
                        "size": path.stat().st_size,
                        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
                    }
                    for path in inside
                ]
            )
        else:
            names = [{"rfilename": path.relative_to(folder).as_posix()} for path in files]
            told = {"_id": commit[:24], "id": repo, "modelId": repo, "sha": commit, "private": False}
            self.send_json(told | {"gated": False, "disabled": False, "tags": [], "siblings": names})

    def say(self, status: int, code: str, message: str, told: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | (told or {})
        if status == 429:
            headers["Retry-After"] = "1"
        self.send(status, headers, json.dumps({"error": message}).encode())

    def send_json(self, value: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status: int, headers: dict[str, str], body: bytes, cut: int = 0) -> None:
        """An answer; the last `cut` bytes of its body stay out, and the connection ends."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) - cut])
            self.close_connection = self.close_connection or cut > 0
