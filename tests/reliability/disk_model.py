"""A model of a disk that loses what was not flushed to it.

`Recorder` runs inside a daemon and writes down its operations, with the content of each file when it is
flushed. `Recording.after_power_loss` says what is left where power fails after the first k of them; `write`
puts that into a fresh folder, for another daemon to start on.

What each kind of loss keeps:

- `unsynced`: only what was flushed. An entry of a folder (a new name, a removal) is kept from the
  `fsync_folder` of that folder on; a file's content is that of its last `fsync_file`, and nothing where there
  was none. A rename is kept or lost as a whole, with every earlier rename of the same thing: it is kept once
  the folder it went into was flushed and can itself be reached. A flushed entry in a folder whose own entry
  was not is lost with that folder.
- `zeroed`: every operation on folders, in order; a file that was never flushed is empty, one that was
  changed since has its last flushed content.
- `halved`: as `zeroed`, but half of the content of a file never flushed arrived.

What was there before the run, and files that users dropped then, are kept by all three.

Limits. A real disk loses any subset of what was not flushed; these are its two extremes, and what lies
between, say one of two renames, is not tried. Data is whole or cut, never garbage, and no sector is torn.
Operations are written down just before they happen: where two threads act at once their order may be the
other one. What nobody announces is unknown: a file is taken up when it is first flushed or moved, a lock
file never is. Half of a file's content is half of what it holds when it is next looked at (flushed, moved,
or at the end of the run), which may be more than it held at the failure. Hard links count as renames.
Permissions and times are not modelled.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from daemon.fs.durable import Operation

Loss = Literal["unsynced", "zeroed", "halved"]
Kind = Literal["folder", "file", "symlink"]
LOSSES: tuple[Loss, ...] = ("unsynced", "zeroed", "halved")
FOLDERS = ("inbox", "outbox")  # of a root, that are modelled
Place = tuple["Node", str]  # the folder and the name in it


class Recorder:
    """Writes down the operations of one process on the folders of `root`. A context manager.

    `recording` must not exist; it receives `steps.jsonl` and the contents of files, each under its hash.
    """

    def __init__(self, recording: Path, root: Path) -> None:
        self._recording = recording
        self._root = root
        self._steps: list[dict[str, Any]] = []
        self._open: dict[int, dict[str, Any]] = {}  # thread -> its last step, while its outcome is open
        self._turn = threading.Lock()
        recording.mkdir()

    def __enter__(self) -> Recorder:
        for name in FOLDERS:
            for folder, folders, files in os.walk(self._root / name):
                self._note("was", Path(folder), kind="folder")
                for file in sorted(folders + files):
                    path = Path(folder, file)
                    if path.is_symlink():
                        self._note("was", path, kind="symlink", text=str(path.readlink()))
                    elif path.is_file():
                        self._note("was", path, kind="file", content=self._content(path))
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            for step in self._open.values():
                self._conclude(step)
            for folder, _folders, files in os.walk(self._root):
                for file in files:
                    path = Path(folder, file)
                    if path.relative_to(self._root).parts[0] in FOLDERS and not path.is_symlink():
                        self._note("is", path, content=self._content(path))
        lines = "".join(json.dumps(step) + "\n" for step in self._steps)
        (self._recording / "steps.jsonl").write_text(lines)

    def observe(self, operation: Operation) -> None:
        path, target = operation.path, operation.target
        with self._turn:
            if (before := self._open.pop(threading.get_ident(), None)) is not None:
                self._conclude(before)
            step = self._note(operation.name, path)
            if target is not None:
                step["target"] = str(target.relative_to(self._root))
            if operation.name in ("fsync_file", "rename", "link") and is_plain_file(path):
                step["content"] = self._content(path)
            step["happened"] = will_happen(operation)
            if step["happened"] is None:
                self._open[threading.get_ident()] = step

    def _conclude(self, step: dict[str, Any]) -> None:
        """Add what could be known only after the operation."""
        path = self._root / step["path"]
        step["happened"] = not os.path.lexists(path)

    def _note(self, name: str, path: Path, **fields: object) -> dict[str, Any]:
        step = {"name": name, "path": str(path.relative_to(self._root)), **fields}
        self._steps.append(step)
        return step

    def _content(self, path: Path) -> str:
        content = path.read_bytes()
        name = hashlib.sha256(content).hexdigest()
        if not (self._recording / name).exists():
            (self._recording / name).write_bytes(content)
        return name


def is_plain_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def will_happen(operation: Operation) -> bool | None:
    """Whether an operation about to be done can be; None where only its outcome tells."""
    path, target = operation.path, operation.target
    there = os.path.lexists(path)
    match operation.name:
        case "create" | "mkdir":
            return not there
        case "unlink":
            return there
        case "rmdir":
            return there and not os.listdir(path)
        case "rename" | "link":
            assert target is not None
            if not there or not os.path.lexists(target):
                return there
            if target.is_dir() and not target.is_symlink():
                return path.is_dir() and not os.listdir(target)
            return None  # a rename may or may not replace
        case _:
            return True


@dataclass(eq=False, slots=True)
class Node:
    """One thing on the disk, whatever its names."""

    kind: Kind
    place: Place | None = None  # as the process sees it; None once it is removed
    kept: list[Place | None] = field(default_factory=list)  # flushed places, oldest first; None: its removal
    entries: dict[str, Node] = field(default_factory=dict)  # of a folder, as the process sees it
    flushed: dict[str, Node] = field(default_factory=dict)  # of a folder, as the disk has it
    content: str | None = None  # of a file, when it was last flushed
    seen: str | None = None  # of a file, when it was first looked at, flushed or not
    text: str = ""  # of a symlink


@dataclass(frozen=True, slots=True)
class Found:
    """The file, link or folder under one name after the failure."""

    kind: Kind
    content: bytes = b""  # of a file; the text of a symlink


class Recording:
    """The operations that a `Recorder` wrote down, counted from 1."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        steps = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
        self._before = [step for step in steps if step["name"] == "was"]
        self.operations = [step for step in steps if step["name"] not in ("was", "is")]
        whole = Disk()
        for step in steps:
            whole.apply(step)
        self._seen = [node.seen for node in whole.nodes]  # nodes come in the same order in every replay

    def disk(self, k: int) -> Disk:
        """The disk once the first `k` operations were done."""
        disk = Disk()
        for step in self._before + self.operations[:k]:
            disk.apply(step)
        return disk

    def after_power_loss(self, k: int, loss: Loss) -> dict[str, Found]:
        """The paths left, relative to the root, where power fails after operation k; folders first."""
        disk = self.disk(k)
        left = disk.flushed_paths() if loss == "unsynced" else disk.paths()
        seen = dict(zip(disk.nodes, self._seen, strict=False))
        return {path: self._found(left[path], loss, seen) for path in sorted(left)}

    def _found(self, node: Node, loss: Loss, seen: dict[Node, str | None]) -> Found:
        if node.kind != "file":
            return Found(node.kind, os.fsencode(node.text))
        if node.content is not None:
            return Found("file", (self._folder / node.content).read_bytes())
        draft = seen[node]
        if loss == "halved" and draft is not None:
            content = (self._folder / draft).read_bytes()
            return Found("file", content[: len(content) // 2])
        return Found("file")

    def describe(self, k: int) -> str:
        """The last operation done, for messages."""
        if not k:
            return "0: before the first operation"
        step = self.operations[k - 1]
        return f"{k}: {step['name']} {step['path']}" + (f" -> {step['target']}" if "target" in step else "")


class Disk:
    """The content that a process sees and the content that was flushed, operation by operation."""

    def __init__(self) -> None:
        self.root = Node("folder")
        self.nodes: list[Node] = []  # as they were made

    def apply(self, step: dict[str, Any]) -> None:
        """One step of a recording. Raises AssertionError where it names a folder that nobody made."""
        if not step.get("happened", True):
            return
        path = step["path"]
        match step["name"]:
            case "was":
                node = self._make(step["kind"], path, step.get("text", ""))
                node.content = node.seen = step.get("content")
                self._keep(node)
            case "is":
                self._look(path, step["content"])
            case "create":
                self._make("file", path)
            case "mkdir":
                self._make("folder", path)
            case "fsync_file":
                self._look(path, step["content"]).content = step["content"]
            case "fsync_folder":
                self._flush(self._folder(path))
            case "rename" | "link":
                node = self._look(path, step["content"]) if "content" in step else self._at(path)
                assert node is not None, f"{path} was renamed, and nobody made it"
                self._remove(path)
                self._put(node, step["target"])
            case "unlink" | "rmdir":
                self._remove(path)

    def paths(self) -> dict[str, Node]:
        """Everything, as the process sees it."""
        return {path: node for node in self.nodes if (path := self._path(node)) is not None}

    def flushed_paths(self) -> dict[str, Node]:
        """Everything that would be there if nothing else had reached the disk."""
        found: dict[str, Node] = {}
        for node in self.nodes:
            path = self._flushed_path(node)
            if path is not None:
                assert path not in found, f"{path}: two things with one name: the model is wrong"
                found[path] = node
        return found

    def _path(self, node: Node) -> str | None:
        if node is self.root:
            return "."
        if node.place is None:
            return None
        folder, name = node.place
        above = self._path(folder)
        return None if above is None else os.path.normpath(f"{above}/{name}")

    def _flushed_path(self, node: Node) -> str | None:
        """The last of its flushed places that can be reached; None where it is removed, or never could be."""
        if node is self.root:
            return "."
        for place in reversed(node.kept):
            if place is None:
                return None
            folder, name = place
            above = self._flushed_path(folder)
            if above is not None:
                return os.path.normpath(f"{above}/{name}")
        return None

    def _at(self, path: str) -> Node | None:
        node: Node | None = self.root
        for name in Path(path).parts:
            node = node.entries.get(name) if node is not None else None
        return node

    def _folder(self, path: str) -> Node:
        folder = self._at(path) if path != "." else self.root
        assert folder is not None, f"nobody made the folder {path}"
        assert folder.kind == "folder", f"{path} is no folder"
        return folder

    def _make(self, kind: Kind, path: str, text: str = "") -> Node:
        node = Node(kind, text=text)
        self.nodes.append(node)
        self._put(node, path)
        return node

    def _look(self, path: str, content: str) -> Node:
        """The file at `path`, made now where nobody announced it."""
        node = self._at(path) or self._make("file", path)
        node.seen = node.seen or content
        return node

    def _put(self, node: Node, path: str) -> None:
        self._remove(path)
        folder = self._folder(os.path.dirname(path) or ".")
        node.place = (folder, os.path.basename(path))
        folder.entries[os.path.basename(path)] = node

    def _remove(self, path: str) -> None:
        node = self._at(path)
        if node is not None and node.place is not None:
            folder, name = node.place
            del folder.entries[name]
            node.place = None

    def _flush(self, folder: Node) -> None:
        for name, node in folder.entries.items():
            if folder.flushed.get(name) is not node:
                self._keep(node)
        for name, node in list(folder.flushed.items()):
            if name not in folder.entries and node.place is None:
                self._keep(node)  # its removal; one that was moved away waits for the folder it went into

    def _keep(self, node: Node) -> None:
        """Flush a node's place as the process sees it, and all that must have come before."""
        if node.kept and node.kept[-1] is not None:
            folder, name = node.kept[-1]
            if folder.flushed.get(name) is node:
                del folder.flushed[name]
        node.kept.append(node.place)
        if node.place is None:
            for child in list(node.flushed.values()):  # a folder was empty when it was removed
                self._keep(child)
            return
        folder, name = node.place
        before = folder.flushed.get(name)
        folder.flushed[name] = node
        if before is not None:  # the name was free when this took it
            self._keep(before)


def write(found: dict[str, Found], root: Path) -> None:
    """Put what was left into a new folder."""
    root.mkdir(parents=True)
    for path, left in found.items():
        if left.kind == "folder":
            (root / path).mkdir()
        elif left.kind == "symlink":
            (root / path).symlink_to(os.fsdecode(left.content))
        else:
            (root / path).write_bytes(left.content)
