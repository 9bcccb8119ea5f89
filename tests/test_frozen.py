from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from daemon.frozen import frozen

ROOT = Path(__file__).parents[1]
ASSIGNS = """
from daemon.frozen import frozen

@frozen
class Point:
    x: int
    y: int = 0

point = Point(1)
point.x = 2
"""


@frozen
class Point:
    x: int
    y: int = 0


def test_values_are_equal_and_hashed_by_their_fields():
    assert Point(1) == Point(1, 0) != Point(1, 1)
    assert {Point(1), Point(1, 0), Point(2)} == {Point(1), Point(2)}
    assert dataclasses.replace(Point(1, 2), x=3) == Point(3, 2)
    with pytest.raises(AttributeError):
        Point(1).z = 2


def test_the_type_checker_refuses_to_assign_a_field(tmp_path):
    (tmp_path / "assigns.py").write_text(ASSIGNS)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(tmp_path / "assigns.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert 'Property "x" defined in "Point" is read-only' in done.stdout, done.stdout + done.stderr
    assert "Found 1 error" in done.stdout
