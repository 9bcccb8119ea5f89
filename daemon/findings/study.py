"""Reads the tables of published folders as one study, in memory that does not grow with `features.parquet`.

Samples are numbered over all folders, in the order of their rows in `metrics.parquet`; features are joined to
them by `record_index`. Knows no statistics.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from daemon.errors import ConfigError
from daemon.escaping import cut_short
from daemon.findings.manifests import Manifest, PublishedFolder, SaeEntry, open_folders
from daemon.findings.results import FloatArray, IntArray

METRICS, FEATURES, TEXTS = "metrics.parquet", "features.parquet", "texts.parquet"
BUFFER_BYTES = 1 << 20
BATCH_VALUES = 1 << 20  # activations decoded at a time, about
MOST_BATCH_ROWS = 1 << 16


@dataclass(frozen=True, slots=True)
class ActivationRows:
    """Some rows of features.parquet, in their order: R rows, V activations."""

    sample: IntArray  # (R,) number over all folders
    text: IntArray  # (R,) index into the study's texts
    sae: IntArray  # (R,) index into the study's dictionaries
    offsets: IntArray  # (R + 1,) where the activations of each row begin
    indices: npt.NDArray[np.uint32]  # (V,) features
    values: npt.NDArray[np.floating]  # (V,)
    position: IntArray  # (R,) -1 where the activations belong to no one position
    token_id: IntArray  # (R,)


class Study:
    """The samples of folders that belong together. `open_study` makes one."""

    def __init__(self, folders: Sequence[PublishedFolder]) -> None:
        """Raises ConfigError for a folder whose metrics can't be read."""
        self.folders = tuple(folders)
        tables = [read_metrics(folder, ("record_index",)) for folder in folders]
        numbers = [
            record_indices(folder, table["record_index"])
            for folder, table in zip(folders, tables, strict=True)
        ]
        self.record_index: IntArray = np.concatenate(numbers)
        self.starts: IntArray = np.cumsum([0, *map(len, numbers)])
        shared = [set(metrics_schema(folder).names) for folder in folders]
        self.columns = frozenset(set.intersection(*shared))

    @property
    def manifest(self) -> Manifest:
        """Of the first folder; what it says of model, recipe and analysis holds for all."""
        return self.folders[0].manifest

    @property
    def n_samples(self) -> int:
        return len(self.record_index)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(self.manifest.recipe.texts)

    @property
    def saes(self) -> tuple[SaeEntry, ...]:
        return self.manifest.saes

    @property
    def pools_positions(self) -> bool:
        """Whether a text has several rows for each dictionary."""
        return self.manifest.positions == "all"

    def metrics(self, names: Sequence[str]) -> pa.Table:
        """Columns of metrics.parquet, a row for each sample. Raises KeyError for one that a folder lacks."""
        if missing := set(names) - self.columns:
            raise KeyError(f"metrics.parquet has no column {sorted(missing)}")
        tables = [read_metrics(folder, names) for folder in self.folders]
        with reading(self.folders[0].file(METRICS)):
            return pa.concat_tables(tables, promote_options="permissive")

    def numbers(self, name: str) -> FloatArray:
        """(n_samples,) one column as numbers, NaN where it is null."""
        column = self.metrics([name])[name]
        with reading(self.folders[0].file(METRICS)):
            return np.asarray(column.cast(pa.float64()).to_numpy(), np.float64)

    def folder_of(self, sample: int) -> int:
        return int(np.searchsorted(self.starts, sample, side="right")) - 1

    def has(self, name: str) -> bool:
        """Whether every folder has a file of this name."""
        return all(folder.file(name).is_file() for folder in self.folders)

    def n_stored(self) -> int:
        """Activations in all folders, about: as the footers say, a row without any counted as one."""
        return sum(stored_values(open_parquet(folder.file(FEATURES))) for folder in self.folders)

    def n_rows(self) -> int:
        """Rows of features.parquet of all folders."""
        return sum(open_parquet(folder.file(FEATURES)).metadata.num_rows for folder in self.folders)

    def scan(self) -> Iterator[ActivationRows]:
        """All rows of features.parquet, some thousands at a time.

        Raises ConfigError, naming the file, where one is damaged or does not fit its metrics.
        """
        for number, folder in enumerate(self.folders):
            path = folder.file(FEATURES)
            with open_parquet(path) as file, reading(path):
                yield from self._scan(file, path, number)

    def _scan(self, file: pq.ParquetFile, path: Path, folder: int) -> Iterator[ActivationRows]:
        names = set(file.schema_arrow.names)
        key, saes = dictionary_key(self, file.schema_arrow.names)
        columns = ["record_index", "text", key, "position", "token_id", "indices", "values"]
        check_columns(path, names, columns)
        check_lists(path, file.schema_arrow)
        per_row = stored_values(file) / max(file.metadata.num_rows, 1)
        size = int(min(max(BATCH_VALUES / max(per_row, 1), 1), MOST_BATCH_ROWS))
        for batch in file.iter_batches(size, columns=columns):
            sample = self.samples_of(path, folder, batch["record_index"].to_numpy())
            offsets, indices, values = lists_of(path, batch["indices"], batch["values"])
            yield ActivationRows(
                sample,
                codes_of(path, "text", batch["text"], self.texts),
                codes_of(path, key, batch[key], saes),
                offsets,
                indices,
                values,
                batch["position"].to_numpy().astype(np.int64),
                batch["token_id"].to_numpy().astype(np.int64),
            )

    def samples_of(self, path: Path, folder: int, record_index: npt.NDArray[np.int64]) -> IntArray:
        """Numbers of the samples with these record indices in a folder."""
        first, last = self.starts[folder : folder + 2]
        known = self.record_index[first:last]
        place = np.searchsorted(known, record_index)
        wrong = known[np.minimum(place, len(known) - 1)] != record_index
        if wrong.any():
            raise misfit(path, f"record_index {record_index[wrong][0]} is in no row of {METRICS}")
        return np.asarray(first + place, np.int64)


def dictionary_key(study: Study, columns: Sequence[str]) -> tuple[str, list[object]]:
    """The column that tells dictionaries apart, and its value for each: earlier versions have no names."""
    if "sae" in columns:
        return "sae", [sae.prefix for sae in study.saes]
    return "layer", [sae.layer for sae in study.saes]


def open_study(paths: Sequence[Path]) -> Study:
    """The study of outboxes or published folders. Raises ConfigError where they don't belong together."""
    return Study(open_folders(paths))


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within it what Arrow throws at a damaged file is one line. Raises ConfigError."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(f"{path}: missing: restore it, or leave the folder out") from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the machine's
            raise
        said = cut_short(" ".join(str(error).split()), 120)
        raise ConfigError(
            f"{path}: no Parquet file, or damaged ({said}): restore it, or leave the folder out"
        ) from None


def open_parquet(path: Path) -> pq.ParquetFile:
    """A file that is read piece by piece. Raises ConfigError where it is none."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: a folder, a pipe or a device: restore the file, or leave the folder out")
    with reading(path):
        source = pa.OSFile(os.fsencode(path))  # a name need not be UTF-8
        return pq.ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)


def stored_values(file: pq.ParquetFile) -> int:
    """Activations of features.parquet as its footer counts them, a row without any as one."""
    footer = file.metadata
    total = 0
    for group in range(footer.num_row_groups):
        chunks = [footer.row_group(group).column(number) for number in range(footer.num_columns)]
        total += max(
            (chunk.num_values for chunk in chunks if chunk.path_in_schema.startswith("values.")), default=0
        )
    return total


def metrics_schema(folder: PublishedFolder) -> pa.Schema:
    return open_parquet(folder.file(METRICS)).schema_arrow


def read_metrics(folder: PublishedFolder, names: Sequence[str]) -> pa.Table:
    """Columns of one folder's metrics.parquet, without what its schema says of them. Raises ConfigError."""
    path = folder.file(METRICS)
    with open_parquet(path) as file, reading(path):
        check_columns(path, file.schema_arrow.names, names)
        table = file.read(columns=list(names)).select(list(names))
    return table.replace_schema_metadata(None).cast(
        pa.schema([pa.field(field.name, field.type) for field in table.schema])
    )


def check_columns(path: Path, has: Sequence[str] | set[str], needs: Sequence[str]) -> None:
    if missing := [name for name in needs if name not in has]:
        raise misfit(path, f"has no column {missing[0]}")


def check_lists(path: Path, schema: pa.Schema) -> None:
    """Raises ConfigError unless features are lists of whole numbers, and activations lists of others."""
    for name, is_right in (("indices", pa.types.is_integer), ("values", pa.types.is_floating)):
        kind = schema.field(name).type
        if not pa.types.is_list(kind) or not is_right(kind.value_type):
            raise misfit(path, f"its column {name} is of type {kind}")


def record_indices(folder: PublishedFolder, column: pa.ChunkedArray) -> IntArray:
    """(n,) which are whole, ascending, and as many as the manifest says. Raises ConfigError."""
    path = folder.file(METRICS)
    if not pa.types.is_integer(column.type) or column.null_count:
        raise misfit(path, "its record_index is no whole number")
    found: IntArray = column.to_numpy().astype(np.int64)
    if len(found) != folder.manifest.rows:
        raise misfit(path, f"has {len(found)} rows, its manifest says {folder.manifest.rows}")
    if not len(found):
        raise misfit(path, "has no rows")
    if (np.diff(found) <= 0).any():
        raise misfit(path, "its record_index does not ascend")
    return found


def misfit(path: Path, said: str) -> ConfigError:
    return ConfigError(f"{path}: {said}: another program's, or changed: restore it, or leave the folder out")


def codes_of(path: Path, column: str, values: pa.Array, known: Sequence[object]) -> IntArray:
    """(R,) the index of each value in `known`."""
    encoded = values.dictionary_encode()
    places = {name: place for place, name in enumerate(known)}
    found = encoded.dictionary.to_pylist()
    if encoded.null_count or any(name not in places for name in found):
        strange = next((name for name in found if name not in places), None)
        raise misfit(path, f"{column} {cut_short(repr(strange))}, which its manifest does not name")
    if not found:
        return np.zeros(0, np.int64)
    codes: IntArray = np.array([places[name] for name in found], np.int64)[encoded.indices.to_numpy()]
    return codes


def lists_of(
    path: Path, indices: pa.ListArray, values: pa.ListArray
) -> tuple[IntArray, npt.NDArray[np.uint32], npt.NDArray[np.floating]]:
    """Offsets (R + 1,) from 0, and what the lists hold. Raises ConfigError where the two don't agree."""
    begins, others = (np.asarray(array.offsets.to_numpy(), np.int64) for array in (indices, values))
    if indices.null_count or values.null_count or (np.diff(begins) != np.diff(others)).any():
        raise misfit(path, "a row's indices and values are not equally many")
    flat = indices.values[begins[0] : begins[-1]], values.values[others[0] : others[-1]]
    if flat[0].null_count or flat[1].null_count:
        raise misfit(path, "an activation is null")
    found, numbers = flat[0].to_numpy(), flat[1].to_numpy()
    if not np.isfinite(numbers).all():
        raise misfit(path, "an activation is not finite")
    return begins - begins[0], found.astype(np.uint32, copy=False), numbers
