"""Keeps code in pickled weights from running: unpickling may run whatever their author put in.

Knows no model.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from daemon.errors import ConfigError


@contextlib.contextmanager
def refused_pickles(what: str) -> Iterator[None]:
    """Within it a library that goes to load pickled weights of `what` raises ConfigError, and reads none."""

    def refuse(source: Any, *_: Any, **__: Any) -> NoReturn:
        raise ConfigError(
            f"{what}: its weights are pickled{named_file(source)}, and loading them could run code:"
            " use a version in safetensors, or convert them where that does no harm"
        )

    with loading_by(refuse):
        yield


@contextlib.contextmanager
def weights_only_pickles(what: str) -> Iterator[None]:
    """Within it pickled weights of `what` are unpickled by torch's `weights_only`, whatever is asked for.

    That makes tensors and plain containers, and calls nothing else that a file names. Raises ConfigError for
    a file with anything else in it.
    """
    load = torch.load

    def load_weights(source: Any, map_location: Any = None, **_: Any) -> Any:
        try:
            return load(source, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "TorchScript" not in str(error):
                raise  # of memory, or of a file that is cut off
            raise ConfigError(
                f"{what}: its pickled weights{named_file(source)} are damaged or hold more than tensors, and"
                " loading that could run code: use a version in safetensors"
            ) from error

    with loading_by(load_weights):
        yield


@contextlib.contextmanager
def loading_by(load: Callable[..., Any]) -> Iterator[None]:
    """`torch.load` replaced: the one way by which Transformers and SAELens read `.bin` and `.pt`."""
    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


def named_file(source: Any) -> str:
    return f" ({Path(source).name})" if isinstance(source, str | Path) else ""
