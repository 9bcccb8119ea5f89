"""Samples for tools: files read as a run reads them, batches as it forms them, an inbox of their own.

Claims nothing, and knows nothing about what a tool measures.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from daemon.batching.batcher import Batcher
from daemon.config import PRESETS, Config
from daemon.recipes import Recipe
from daemon.records import (
    Batch,
    Claim,
    FileIdentity,
    InputFile,
    Part,
    PartExtent,
    TokenizedPart,
    TokenizedSample,
)
from daemon.source.reader import read_parts
from daemon.source.tokenizer import Tokenizer
from daemon.wiring import read_limits

DEMO_SAMPLES = PRESETS / "demo.jsonl"
UNLIMITED = 1 << 40  # tokens of a batch


def tokenized_parts(config: Config, tokenizer: Tokenizer, file: Path) -> list[TokenizedPart]:
    """Read and tokenize a whole file. Raises FileError."""

    async def read() -> list[Part]:
        source = unclaimed(file)
        with file.open("rb") as content:
            parts = read_parts(content, source, recipes=config.recipes, limits=read_limits(config), stored={})
            return [part async for part in parts if isinstance(part, Part)]

    return tokenizer.tokenize(asyncio.run(read()))


def unclaimed(file: Path) -> InputFile:
    return InputFile(Claim(file.name, str(file), 1, FileIdentity(0, 0, 0, 0, 0)), sha256="", size=0, unit="")


def one_part(recipe: Recipe, samples: Sequence[TokenizedSample]) -> TokenizedPart:
    extent = PartExtent(0, 0, len(samples), 0)
    part = Part(unclaimed(Path()), extent, True, recipe, tuple(sample.sample for sample in samples), ())
    return TokenizedPart(part, tuple(samples))


def all_batches(batcher: Batcher, parts: Sequence[TokenizedPart]) -> list[Batch]:
    """Every batch that a batcher forms of the parts."""
    for part in parts:
        batcher.add(part)
    batches = []
    while batcher:
        batches.append(batcher.take())
    return batches


@contextlib.contextmanager
def private_inbox(config: Config, files: Sequence[Path], outbox: Path) -> Iterator[Config]:
    """The settings of a run over copies of files, in an inbox that lies in the outbox and goes in the end.

    It serves no HTTP.
    """
    outbox.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".inbox-", dir=outbox))  # on the outbox's file system
    try:
        for file in files:
            shutil.copy(file, folder / file.name)
        yield config.model_copy(
            update={
                "inbox": config.inbox.model_copy(update={"path": folder, "settle_seconds": 0.0}),
                "outbox": config.outbox.model_copy(update={"path": outbox}),
                "http": config.http.model_copy(update={"enabled": False}),
            }
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def numbered(file: Path, samples: int) -> Iterator[str]:
    """Lines of so many records, each unlike every other, taken from the file's over and over."""
    text = file.read_text()
    records = json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))
    for number, record in zip(range(samples), itertools.cycle(records), strict=False):
        first = "prompt" if "prompt" in record else "text"
        yield json.dumps(record | {"id": f"r{number}", first: f"{number}. {record[first]}"}) + "\n"
