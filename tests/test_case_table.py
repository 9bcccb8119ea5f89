"""The table of inputs that gave trouble names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "tests/README.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| \d+ \|", line)
]
TESTS = sorted({test for row in ROWS for test in re.findall(r"`(tests/[^`]+\.py(?:::\w+)?)`", row)})


def test_every_row_is_settled_by_a_test():
    assert len(ROWS) == len({row.split("|")[1] for row in ROWS}) == 41
    for row in ROWS:
        assert "| mended |" in row and "`tests/" in row, row


@pytest.mark.parametrize("test", TESTS)
def test_the_tests_of_the_table_exist(test):
    path, _, name = test.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = {
        node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert name in functions if name else any(found.startswith("test_") for found in functions)
