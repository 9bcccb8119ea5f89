"""Finished parts on disk: the checkpoint from which work on a large file resumes.

A part file is whole or absent (temporary name, sync, rename), so its existence is the record of progress
and there is no other. It holds Arrow streams: metrics, features, and texts where these are stored. What
else a part is made of is JSON in the metadata of the first. Knows nothing about who asks for a part and when.
Functions block.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from daemon.fs import durable
from daemon.records import LayerTotals, PartExtent, Reject, StageSeconds
from daemon.sink.jsontext import fields_of

PARTS_SUFFIX = ".parts"  # of the folders that hold them
FORMAT = 3  # of part files; another one is not read
HEADER = b"lensd"
OPTIONS = pa.ipc.IpcWriteOptions(compression="lz4")
BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class StoredPart:
    """The results of one part, as they go into the files of its unit."""

    extent: PartExtent
    metrics: pa.Table
    features: pa.Table
    texts: pa.Table | None  # where they are stored
    rejects: tuple[Reject, ...]  # in record order
    layers: tuple[LayerTotals, ...]  # one per SAE
    seconds: StageSeconds
    clipped: int = 0  # activations that the stored type does not hold


def parts_of(staging: Path) -> Path:
    """Where the finished parts of a unit lie whose results are made in `staging`."""
    return staging.with_name(staging.name + PARTS_SUFFIX)


def part_path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}"


def write_part(folder: Path, part: StoredPart) -> None:
    """Store a part in `folder`, in place of one of its number. Flushed to disk when this returns."""
    durable.make_folder(folder)
    target = part_path(folder, part.extent.number)
    draft = target.with_suffix(".tmp")
    if draft.exists():
        durable.unlink(draft)
    metrics = part.metrics.replace_schema_metadata({HEADER: json.dumps(header_of(part))})
    with (
        durable.create(draft) as file,
        pa.BufferedOutputStream(pa.PythonFile(file, mode="w"), BUFFER_BYTES) as sink,
    ):
        for table in (metrics, part.features, *([] if part.texts is None else [part.texts])):
            with pa.ipc.new_stream(sink, table.schema, options=OPTIONS) as writer:
                writer.write_table(table)
    durable.fsync_file(draft)
    durable.rename(draft, target)


def read_part(folder: Path, number: int) -> StoredPart:
    """A part as it was stored; its tables are mapped, not read."""
    with pa.memory_map(os.fsencode(part_path(folder, number))) as source:
        with pa.ipc.open_stream(source) as stream:
            header = json.loads(stream.schema.metadata[HEADER])
            metrics = stream.read_all().replace_schema_metadata()
        with pa.ipc.open_stream(source) as stream:
            features = stream.read_all()
        texts = None
        if header["has_texts"]:
            with pa.ipc.open_stream(source) as stream:
                texts = stream.read_all()
    return StoredPart(
        extent=PartExtent(**header["extent"]),
        metrics=metrics,
        features=features,
        texts=texts,
        rejects=tuple(Reject(**reject) for reject in header["rejects"]),
        layers=tuple(layer_of(layer) for layer in header["layers"]),
        seconds=StageSeconds(**header["seconds"]),
        clipped=header["clipped"],
    )


def stored_extents(folder: Path) -> dict[int, PartExtent]:
    """The extent of each part file in `folder`, by its number; nothing where there is no folder."""
    extents: dict[int, PartExtent] = {}
    if not folder.is_dir():
        return extents
    for path in folder.iterdir():
        if path.name.isdecimal() and (extent := read_extent(path)) is not None:
            extents[extent.number] = extent
    return extents


def read_extent(path: Path) -> PartExtent | None:
    """The extent of a part file; None where another version of lensd wrote it."""
    with pa.memory_map(os.fsencode(path)) as source, pa.ipc.open_stream(source) as stream:
        header = json.loads(stream.schema.metadata[HEADER])
    return PartExtent(**header["extent"]) if header["format"] == FORMAT else None


def header_of(part: StoredPart) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "extent": fields_of(part.extent),
        "rejects": [fields_of(reject) for reject in part.rejects],
        "layers": [{**fields_of(layer), "total": layer.total.tolist()} for layer in part.layers],
        "seconds": fields_of(part.seconds),
        "clipped": part.clipped,
        "has_texts": part.texts is not None,
    }


def layer_of(fields: dict[str, Any]) -> LayerTotals:
    return LayerTotals(**{**fields, "total": np.array(fields["total"], np.float64)})
