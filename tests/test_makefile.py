"""What `make` does before it installs anything; no test here reaches for a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("daemon/**/*.[ch]"))]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "deploy/constraints.txt", *SOURCES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def make(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    env.pop("PYTHON", None)
    return subprocess.run(
        ["make", *arguments], cwd=tree, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )


def test_help_names_every_target_and_makes_nothing(tree):
    result = make(tree)
    assert result.returncode == 0
    for target in ("demo", "test", "test-newest", "check", "format", "clean"):
        assert f"make {target} " in result.stdout
    assert not (tree / ".venv").exists()


def test_the_newest_versions_are_tried_apart_and_without_constraints(tree):
    commands = make(tree, "-n", "test-newest", "PYTHON=python3", "PYTEST=-m 'not slow'").stdout.splitlines()
    installs = [line for line in commands if " install " in line]
    assert len(installs) == 3
    assert all(line.startswith(".venv-newest/bin/python -m pip ") for line in installs)
    assert all(" --upgrade " in line and "constraints" not in line for line in installs)
    assert commands[-1] == ".venv-newest/bin/python -m pytest -m 'not slow'"
    assert not any(".venv/" in line for line in commands)


@pytest.mark.parametrize("target", ["test", "test-newest"])
@pytest.mark.parametrize("python", ["", "/no/such/python", "false"])
def test_without_a_fit_python_it_says_so_in_one_line(tree, python, target):
    result = make(tree, target, f"PYTHON={python}")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith("lensd needs Python 3.11 or newer")
    assert not (tree / ".venv").exists() and not (tree / ".venv-newest").exists()


def test_an_installed_tree_is_not_installed_again(tree):
    (tree / ".venv").mkdir()
    (tree / ".venv/.ready").touch()
    assert "installing" in make(tree, "-n", "-W", "pyproject.toml", "test").stdout
    assert "installing" in make(tree, "-n", "-W", "deploy/constraints.txt", "test").stdout
    for source in SOURCES:
        assert "installing" in make(tree, "-n", "-W", source, "test").stdout
    assert "installing" not in make(tree, "-n", "test").stdout
