"""Files as a broken download leaves them, and what is to be said of each."""

from __future__ import annotations

from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
SAID = {"pointer": "Git LFS pointer.*git lfs pull", "empty": "is empty", "cut": "is cut off|is no JSON"}


def damage(path: Path, how: str) -> str:
    """Damage a file; a pattern of the one line that names it."""
    raw = path.read_bytes()
    path.write_bytes({"pointer": POINTER, "empty": b"", "cut": raw[: len(raw) * 2 // 3]}[how])
    return rf"{path.name}.*(?:{SAID[how]})"
