"""The narrow interface behind which a model and its SAEs run. Knows no files and no samples.

An engine belongs to the device's thread, which may have others use it side by side where it allows that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from daemon.model.encoding import Encoder
from daemon.model.extraction import Counted, Extraction, Started
from daemon.model_info import ModelInfo


class Engine(Protocol):
    """A model with its SAEs on one device."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def shares_prefixes(self) -> bool:
        """Whether tokens with which several texts begin are computed once, so that padding costs nothing."""
        ...

    @property
    def concurrent(self) -> bool:
        """Whether several threads may have it read texts at the same time, each on cores of its own."""
        ...

    @property
    def encoders(self) -> tuple[Encoder, ...]: ...

    @property
    def preparations(self) -> Sequence[Callable[[], None]]:
        """Short pieces of work that make later batches faster, the most useful first."""
        ...

    def extract(self, texts: Sequence[Sequence[int]]) -> Extraction:
        """Read N texts, given as token ids, and encode them with every SAE: `start` and `finish`.

        Where SAEs read both ways (`ModelInfo.reads_both_ways`), the texts come with BOS, and then all of them
        once more without.
        """
        ...

    def start(self, texts: Sequence[Sequence[int]], counted: Counted = None) -> Started:
        """Have the device read N texts, of which the tokens that count may be encoded.

        Does not wait for it where it goes on by itself.
        """
        ...

    def finish(self, started: Started) -> Extraction:
        """Wait until they are read, and encode them."""
        ...
