"""Keeps pickled weights out: unpickling may run whatever code their author put in. Knows no model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from daemon.errors import ConfigError


@contextlib.contextmanager
def refused_pickles(what: str) -> Iterator[None]:
    """Within it a library that goes to load pickled weights of `what` raises ConfigError and reads nothing.

    It takes the place of `torch.load`, the one way by which Transformers and SAELens read `.bin` and `.pt`.
    """

    def refuse(source: Any, *_: Any, **__: Any) -> NoReturn:
        name = f" ({Path(source).name})" if isinstance(source, str | Path) else ""
        raise ConfigError(
            f"{what}: its weights are pickled{name}, and loading them could run code:"
            " use a version in safetensors, or convert them where that does no harm"
        )

    load = torch.load
    torch.load = refuse  # type: ignore[assignment]  # never returns, whatever the signature
    try:
        yield
    finally:
        torch.load = load
