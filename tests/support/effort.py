"""The number of examples that Hypothesis tries: all, or a tenth where only the fast tests run."""

from __future__ import annotations

_fast = False


def only_fast(fast: bool) -> None:
    """Tell, before tests are collected, whether only the fast ones run."""
    global _fast
    _fast = fast


def examples(number: int) -> int:
    """The `max_examples` of a test that tries `number` of them when every test runs."""
    return max(number // 10, 10) if _fast else number
