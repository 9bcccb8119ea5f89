"""Remembers in the cache that something passed its checks here, so that the next start need not repeat them.

A stamp holds for exactly one subject (hashes of files) under exactly these versions of code and libraries, on
this kind of processor. One that is damaged, or of another subject, counts for nothing. Knows no subject.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import structlog
import torch

from daemon.platform_calls import processor_features, processor_name

PACKAGES = ("lensd", "sae-lens", "transformer-lens", "transformers", "tokenizers", "safetensors", "numpy")
CODE = ("*.py", "analysis/*.py", "model/*.py", "native/*.py", "native/*.so")  # that results depend on

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Stamps:
    """The stamps of one kind, each a file in `folder`."""

    folder: Path

    def read(self, subject: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was remembered of a subject; None where nothing was, or not under these versions."""
        whole = identity(subject)
        try:
            stored = json.loads(self._path(subject).read_bytes())
            content = stored["content"]
            if stored["identity"] == whole and stored["sha256"] == digest(content) and type(content) is dict:
                return content
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            pass
        return None

    def write(self, subject: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Remember it, in place of what was; where that fails it is checked again at the next start."""
        whole = identity(subject)
        path = self._path(subject)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(
                json.dumps({"identity": whole, "sha256": digest(content), "content": content}),
            )
            draft.replace(path)
        except OSError as error:
            log.debug("stamp.not_written", path=str(path), reason=error.strerror)

    def _path(self, subject: Mapping[str, Any]) -> Path:
        """One for each subject: under other versions it is written again."""
        return self.folder / f"{digest(subject)[:32]}.json"


def identity(subject: Mapping[str, Any]) -> dict[str, Any]:
    """The subject with all else that a stamp holds for."""
    return {"subject": dict(subject), "under": dict(surroundings())}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def surroundings() -> Mapping[str, str | int]:
    """The code, the libraries and the processor that checks ran with."""
    found: dict[str, str | int] = {package: installed(package) for package in PACKAGES}
    return found | {
        "code": code_sha256(Path(__file__).parent.parent),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "processor": processor_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "features": digest(processor_features()),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def code_sha256(package: Path) -> str:
    """Hash of the files of lensd that results depend on."""
    whole = hashlib.sha256()
    for path in code_files(package):
        whole.update(f"{path.relative_to(package)}\0".encode())
        whole.update(hashlib.sha256(path.read_bytes()).digest())
    return whole.hexdigest()


def code_files(package: Path) -> Iterator[Path]:
    for pattern in CODE:
        yield from sorted(package.glob(pattern))
