"""The inbox folder as a source: files are claimed, opened and read as parts, and moved where they end.

Implements `daemon.ports.Source`. Knows nothing about where results are.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from daemon.errors import FileError
from daemon.pause import Pause
from daemon.recipes import Recipe
from daemon.records import Claim, InputFile, KeptPart, Part, PartExtent, Presence
from daemon.source.content import Content, open_content
from daemon.source.formats import format_of, without_suffix
from daemon.source.inbox import Inbox
from daemon.source.limits import ReadLimits
from daemon.source.reader import read_parts


class FolderSource:
    """One process's view of the inbox, with what it takes to read a file."""

    def __init__(
        self,
        inbox: Inbox,
        *,
        recipes: Sequence[Recipe],
        limits: ReadLimits,
        results_key: str,
        pause: Pause,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`results_key` stands for the model and every setting that changes results."""
        self._inbox = inbox
        self._recipes = recipes
        self._limits = limits
        self._results_key = results_key
        self._pause = pause
        self._clock = clock

    @property
    def backlog(self) -> bool:
        return self._inbox.backlog

    @property
    def left(self) -> int:
        return self._inbox.left

    def claims(self, stop: asyncio.Event, once: bool) -> AsyncIterator[list[Claim]]:
        return self._inbox.claims(stop, once)

    async def open(self, claims: Sequence[Claim]) -> Sequence[OpenedFile]:
        return await self._pause.outlast(lambda: asyncio.to_thread(self._open_all, claims), "read")

    def _open_all(self, claims: Sequence[Claim]) -> list[OpenedFile]:
        """Open each file. Raises OSError where the machine refuses."""
        with contextlib.ExitStack() as on_error:
            opened = [on_error.enter_context(contextlib.closing(self._open(claim))) for claim in claims]
            on_error.pop_all()
        return opened

    def _open(self, claim: Claim) -> OpenedFile:
        opened_at = self._clock()
        try:
            unit_format = format_of(claim.name)[0].name
            content = open_content(claim.path)
        except FileError as error:
            return OpenedFile(claim, None, error)
        identity = f"{content.sha256}{self._results_key}{unit_format}"
        unit = hashlib.sha256(identity.encode()).hexdigest()[:12]
        stem = without_suffix(claim.name)
        file = InputFile(claim, content.sha256, content.size, unit, opened_at, stem)
        return OpenedFile(claim, file, None, content, self._recipes, self._limits)

    async def recheck(self, claims: Sequence[Claim]) -> list[Presence]:
        return await self._inbox.recheck(claims)

    async def done(self, claims: Sequence[Claim]) -> None:
        await self._pause.outlast(lambda: self._inbox.retire(claims), "settle")

    async def failed(self, claim: Claim, error: FileError, sha256: str | None) -> None:
        await self._pause.outlast(lambda: self._inbox.fail(claim, error, sha256), "settle")

    async def give_back(self, claims: Sequence[Claim]) -> None:
        await self._pause.outlast(lambda: self._inbox.release(claims), "settle")

    async def give_back_all(self, *, flush: bool) -> None:
        await self._inbox.release_all(flush=flush)


@dataclass(slots=True)
class OpenedFile:
    """A claimed file, open at its start, or why it can't be used. Close it."""

    claim: Claim
    file: InputFile | None
    error: FileError | None
    content: Content | None = None
    recipes: Sequence[Recipe] = ()
    limits: ReadLimits | None = None

    def parts(self, stored: Mapping[int, PartExtent]) -> AsyncIterator[Part | KeptPart]:
        """Read the file as parts, once. Raises FileError; see `read_parts`."""
        assert self.file is not None, "only a file that can be used is read"
        assert self.content is not None
        assert self.limits is not None
        return read_parts(
            self.content.file, self.file, recipes=self.recipes, limits=self.limits, stored=stored
        )

    def close(self) -> None:
        if self.content is not None:
            self.content.file.close()
