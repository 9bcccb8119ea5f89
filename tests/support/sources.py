"""Input files that nobody claimed, as the stages know them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from daemon.recipes import BUILT_IN_RECIPES, Recipe
from daemon.records import Claim, FileIdentity, InputFile, KeptPart, Part, PartExtent
from daemon.source.reader import ReadLimits, read_parts

NO_IDENTITY = FileIdentity(0, 0, 0, 0, 0)
LIMITS = ReadLimits(
    max_record_bytes=10_000,
    max_nesting=8,
    max_decompressed_bytes=1 << 20,
    max_compression_ratio=1000,
    part_records=100,
)


def unclaimed(path: Path | str, unit: str = "unit", name: str | None = None) -> InputFile:
    path = Path(path)
    return InputFile(Claim(name or path.name, str(path), 1, NO_IDENTITY), sha256="", size=0, unit=unit)


async def parts_of(
    path: Path,
    recipe: Recipe | None = None,
    limits: ReadLimits = LIMITS,
    name: str | None = None,
    stored: Mapping[int, PartExtent] | None = None,
) -> list[Part | KeptPart]:
    """Every part of a file."""
    source = unclaimed(path, name=name)
    with path.open("rb") as file:
        parts = read_parts(
            file,
            source,
            recipes=BUILT_IN_RECIPES if recipe is None else [recipe],
            limits=limits,
            stored=stored or {},
        )
        return [part async for part in parts]
