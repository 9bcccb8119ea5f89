"""Rules for the whole run of the tests, and the fixtures that several folders share."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.support import tiny


def pytest_unconfigure() -> None:
    """Give back what a service in this process froze: else nanobind lists it as leaked, after the summary."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def log_setup() -> Iterator[None]:
    """A test that calls the command in this process leaves no set-up of the logs to the next."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def tiny_toml(tmp_path_factory) -> Path:
    """A configuration of a tiny model and three dictionaries."""
    folder = tmp_path_factory.mktemp("tiny")
    path = folder / "lensd.toml"
    path.write_text(tiny.make_tiny(folder).toml())
    return path


@pytest.fixture
def inbox(tmp_path) -> Path:
    (tmp_path / "inbox").mkdir()
    return tmp_path / "inbox"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at hand")
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama, which is not to be changed."""
    return tiny.save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of it, which may be."""
    return Path(shutil.copytree(llama, tmp_path / "model"))
