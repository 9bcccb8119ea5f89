"""Rules for the whole run of the tests, and the fixtures that several folders share."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog

from tests.support import effort, processes

if TYPE_CHECKING:
    from tests.reliability.daemons import Daemons

# torch is imported within fixtures: with `-n` the process that only hands out tests loads this file too.


def pytest_configure(config: pytest.Config) -> None:
    effort.only_fast(config.option.markexpr == "not slow")


def pytest_unconfigure() -> None:
    """Give back what a service in this process froze: else nanobind lists it as leaked, after the summary."""
    gc.unfreeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test that has a daemon as slow; files with slow tests come first.

    Where processes share the files, one that began a long file last would keep all others waiting.
    """
    for item in items:
        if isinstance(item, pytest.Function) and "daemons" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow") is not None}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Refuse a fast test, and the fixtures that it is the first to need, the processes of slow ones."""
    with processes.refused(item.get_closest_marker("slow") is None):
        return (yield)


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """One fork server for all tests of a session, since starting one costs seconds."""
    from tests.reliability.daemons import Daemons

    with Daemons(tmp_path_factory.mktemp("daemons")) as daemons:
        yield daemons


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
    from tests.support import tiny

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
    from tests.support import tiny

    return tiny.save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of it, which may be."""
    return Path(shutil.copytree(llama, tmp_path / "model"))
