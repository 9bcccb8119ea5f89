"""The first look into claimed files: their content's hash, the unit it makes, and small files whole.

Blocks, and takes several files at a time, since each change of threads costs more than a small file. Knows
nothing about where results are, but for whom to ask.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from daemon.errors import FileError
from daemon.intake.reader import ReadLimits, format_of, part_blocks
from daemon.intake.source import Content, is_compressed, open_content, small_content
from daemon.looks import read_small
from daemon.records import Claim, KeptPart, Part, Recipe, Source

SMALL_BYTES = 256 << 10  # up to which a file is read at one go


@dataclass(slots=True)
class OpenedFile:
    """A claimed file as far as one look into it told. Close it."""

    claim: Claim
    content: Content | None = None
    source: Source | None = None
    published: Path | None = None  # its results, there already
    parts: list[Part | KeptPart] | None = None  # of a small file, all of them
    error: FileError | None = None

    @property
    def known_source(self) -> Source:
        assert self.source is not None, "a file without an error is known"
        return self.source

    @property
    def stream(self) -> BinaryIO:
        """The content from its start, once."""
        assert self.content is not None, "a file without an error was read"
        return io.BytesIO(self.content.data or b"") if self.content.file is None else self.content.file

    def close(self) -> None:
        if self.content is not None:
            self.content.close()


class Opener:
    """Opens claimed files. `published` tells where the results of units are, if they are there."""

    def __init__(
        self,
        *,
        recipe: Recipe | None,
        limits: ReadLimits,
        results_key: str,
        published: Callable[[Sequence[str]], list[Path | None]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`results_key` stands for the model and every setting that changes results."""
        self._recipe = recipe
        self._limits = limits
        self._results_key = results_key
        self._published = published
        self._clock = clock

    def open_all(self, claims: Sequence[Claim]) -> list[OpenedFile]:
        """Each file with its content or its error. Raises OSError where the machine refuses."""
        opened: list[OpenedFile] = []
        opened_at = self._clock()
        plain = [claim.at for claim in claims if not is_compressed(claim.name)]
        small = dict(zip(plain, read_small(plain, SMALL_BYTES), strict=True))
        try:
            for claim in claims:
                opened.append(OpenedFile(claim))
                self._open(opened[-1], small.get(claim.at), opened_at)
            self._look_up([file for file in opened if file.source is not None])
            for file in opened:
                self._parse(file)
        except OSError:
            for file in opened:
                file.close()
            raise
        return opened

    def _open(self, file: OpenedFile, data: bytes | None, opened_at: float) -> None:
        """`data` is what the file holds, if that is known."""
        try:
            content = open_content(file.claim.path, SMALL_BYTES) if data is None else small_content(data)
            file.content = content
            unit = self._unit(content.sha256, file.claim.name)
            file.source = Source(file.claim, content.sha256, content.size, unit, opened_at)
        except FileError as error:
            file.error = error

    def _look_up(self, files: Sequence[OpenedFile]) -> None:
        published = self._published([file.known_source.unit for file in files])
        for file, folder in zip(files, published, strict=True):
            file.published = folder

    def _parse(self, file: OpenedFile) -> None:
        """The parts of a small file, unless an earlier attempt may have stored some or there is no need."""
        if file.source is None or file.content is None or file.content.data is None:
            return
        if file.published is not None or file.claim.attempt > 1:
            return
        try:
            blocks = part_blocks(file.stream, file.source, recipe=self._recipe, limits=self._limits)
            file.parts = [part for parts in blocks for part in parts]
        except FileError as error:
            file.error = error

    def _unit(self, sha256: str, name: str) -> str:
        """Stands for what the results of a file depend on. Raises FileError for a name without a format."""
        identity = f"{sha256}{self._results_key}{format_of(name)[0].name}"
        return hashlib.sha256(identity.encode()).hexdigest()[:12]
