"""What holds for the whole run of the tests."""

from __future__ import annotations

import gc


def pytest_unconfigure() -> None:
    """Give back what a service in this process froze: else nanobind lists it as leaked, after the summary."""
    gc.unfreeze()
