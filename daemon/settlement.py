"""How each file ends: published, failed, recognised as a duplicate, or put back.

Asks and tells the source and the sink, through their ports, in the order that makes it safe: results are on
disk before they are visible, visible before the source hears of it. Every step is safe to repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from daemon.errors import FileError
from daemon.ports import Sink, Source
from daemon.records import Claim, FinishedFile, InputFile, Outcome


class Settlement:
    """Settles files between a source and a sink."""

    def __init__(self, source: Source, sink: Sink) -> None:
        self.source = source
        self.sink = sink

    async def publish(self, files: Sequence[FinishedFile]) -> list[Outcome]:
        """Publish complete files together, and set aside those that failed."""
        outcomes = [await self.fail(file.file, file.error) for file in files if file.error is not None]
        complete = [file for file in files if file.error is None]
        if not complete:
            return outcomes
        await self.sink.flush(complete)
        presences = await self.source.recheck([file.file.claim for file in complete])
        same: list[FinishedFile] = []
        for file, presence in zip(complete, presences, strict=True):
            if presence == "same":
                same.append(file)
            else:
                outcomes.append(await self._withdraw(file.file, vanished=presence == "gone"))
        if same:
            outcomes += await self.sink.publish(same)
            await self.source.done([file.file.claim for file in same])
            await self.sink.forget([file.file.unit for file in same])
        return outcomes

    async def _withdraw(self, file: InputFile, *, vanished: bool) -> Outcome:
        """Drop the results of a file that is no longer what was read."""
        if vanished:
            gone = "the file was removed while lensd worked on it: drop it again"
            return await self.fail(file, FileError("vanished", gone))
        await self.sink.forget([file.unit])
        return await self._put_back(file.claim, file.unit)

    async def fail(self, file: InputFile, error: FileError) -> Outcome:
        """Set a file aside, and what is stored of it."""
        await self.sink.forget([file.unit])
        return await self.refuse(file.claim, error, file)

    async def refuse(self, claim: Claim, error: FileError, file: InputFile | None = None) -> Outcome:
        """Set a file aside of which nothing is stored; put it back where it changed since it was claimed."""
        unit, sha256 = (file.unit, file.sha256) if file is not None else (None, None)
        if await self._changed(claim):
            return await self._put_back(claim, unit)
        await self.source.failed(claim, error, sha256)
        return Outcome("failed", claim.name, unit, reason=error.reason, message=str(error))

    async def duplicate(self, file: InputFile, folder: Path) -> Outcome:
        """Let go of a file whose results are published already."""
        if await self._changed(file.claim):
            return await self._put_back(file.claim, file.unit)
        await self.sink.confirm()  # whoever published them may have died before that
        await self.source.done([file.claim])
        return Outcome("duplicate", file.claim.name, file.unit, folder)

    async def _changed(self, claim: Claim) -> bool:
        return await self.source.recheck([claim]) == ["changed"]

    async def _put_back(self, claim: Claim, unit: str | None) -> Outcome:
        await self.source.give_back([claim])
        return Outcome("requeued", claim.name, unit, reason="changed")
