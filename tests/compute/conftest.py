"""Fixtures of models, and what damages their files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama, which is not to be changed."""
    return tiny.save_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def folder(llama, tmp_path) -> Path:
    """A copy of it, which may be."""
    return Path(shutil.copytree(llama, tmp_path / "model"))
