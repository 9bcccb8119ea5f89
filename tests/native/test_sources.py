"""The C sources compile for any processor: Apple's have none of x86's instructions."""

from __future__ import annotations

import re
from pathlib import Path

from daemon.native import library

SOURCES = sorted(path for path in Path(library.__file__).parent.iterdir() if path.suffix in (".c", ".h"))
OF_ONE_PROCESSOR = re.compile(r"immintrin|_mm\d*_|__m\d+|__builtin_ia32|arm_neon|__asm__|\basm\b")


def test_no_source_names_the_instructions_of_one_processor():
    assert len(SOURCES) >= 4
    for path in SOURCES:
        assert OF_ONE_PROCESSOR.search(path.read_text()) is None, path


def test_functions_are_cloned_for_x86_alone_and_by_gcc_alone():
    (cloning,) = (path for path in SOURCES if "target_clones" in path.read_text())
    condition, _, rest = cloning.read_text().partition("\n#define CLONES __attribute__")
    asked = condition.splitlines()[-1]
    assert asked.startswith("#if defined(__x86_64__) &&")
    assert "!defined(__clang__)" in asked
    assert "\n#else\n#define CLONES\n#endif\n" in rest
