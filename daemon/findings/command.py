"""`lensd report`: opens folders, makes their report, and writes the page and the table of features."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from daemon.errors import ConfigError, MachineError
from daemon.findings.interrupts import ignore_from_here, interruptible
from daemon.findings.page import page
from daemon.findings.progress import ReportProgress
from daemon.findings.report import ReportOptions, make_report
from daemon.findings.results import GroupedFeatures, PairedFeatures, Prevalence, Report
from daemon.findings.study import Study, open_study
from daemon.findings.whole_files import check_place, publish, unnamed_file

REPORT = "report.html"
PAGES = (".html", ".htm")
MARK = b"lensd report</title>"  # of a page of ours, near its beginning
MARK_BYTES = 16 << 10
DATA_KEY = b"lensd.features"  # of the schema of a table of ours


def write_report(
    paths: Sequence[Path], options: ReportOptions, output: Path, data: Path | None = None
) -> Report:
    """Write the page of these outboxes or folders, and with `data` every feature's statistics as Parquet.

    Both files appear together, or neither. Raises ConfigError, before much is read, for folders that don't
    belong together and files that can't be written, and Interrupted for Ctrl-C and SIGTERM: nothing is
    written then.
    """
    check_page(output)
    if data is not None:
        check_data(data)
    with interruptible(), ReportProgress() as progress:
        study = open_study(paths)
        report = make_report(study, options, progress)
        progress.begin("writing")
        with written_together(output, data) as (page_file, data_file):
            page_file.write(page(report).encode())
            if data_file is not None:
                pq.write_table(features_table(study, report), data_file, compression="zstd")
    return report


@contextlib.contextmanager
def written_together(output: Path, data: Path | None) -> Iterator[tuple[BinaryIO, BinaryIO | None]]:
    """Give the files of the page and the table, which get their names when both are written.

    Raises MachineError where the disk is full.
    """
    with contextlib.ExitStack() as files:
        page_file = files.enter_context(unnamed_file(output))
        data_file = None if data is None else files.enter_context(unnamed_file(data))
        try:
            yield page_file, data_file
            for file in filter(None, (page_file, data_file)):
                file.flush()
        except OSError as error:
            raise MachineError(f"{output}: {error.strerror}: nothing was written") from None
        ignore_from_here()
        if data is not None and data_file is not None:
            publish(data_file, data)
        publish(page_file, output)


def check_page(path: Path) -> None:
    """Raises ConfigError where a page can't be written, or would take the place of something else."""
    if path.suffix.lower() not in PAGES:
        raise ConfigError(f"{path}: the page is HTML: name a file that ends in .html")
    check_place(path)
    if path.exists():
        with readable(path), path.open("rb") as file:
            if MARK not in file.read(MARK_BYTES):
                raise ConfigError(f"{path}: there is a file that is no report of lensd's: name another")


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Within it a file that can't be read is one line. Raises ConfigError."""
    try:
        yield
    except PermissionError:
        raise ConfigError(f"{path}: there is a file that can't be read: name another") from None


def check_data(path: Path) -> None:
    """Raises ConfigError where a table can't be written, or would take the place of something else."""
    if path.suffix.lower() != ".parquet":
        raise ConfigError(f"{path}: the table is Parquet: name a file that ends in .parquet")
    check_place(path)
    if path.exists() and not is_ours(path):
        raise ConfigError(f"{path}: there is a file that is no table of lensd report's: name another")


def is_ours(path: Path) -> bool:
    """Return whether a file is a table of ours."""
    try:
        with readable(path), path.open("rb") as file:
            return DATA_KEY in (pq.read_schema(file).metadata or {})
    except pa.ArrowException:
        return False


def features_table(study: Study, report: Report) -> pa.Table:
    """Return every feature with all that was computed of it, a row each, or one for each group."""
    names = [sae.prefix for sae in study.saes]
    parts: list[PairedFeatures | GroupedFeatures | Prevalence] = [*report.grouped, *report.prevalence]
    if report.features is not None:
        parts.append(report.features)
    tables = [table_of(part, names) for part in parts]
    return pa.concat_tables(tables).replace_schema_metadata({DATA_KEY: b"1"})


def table_of(part: PairedFeatures | GroupedFeatures | Prevalence, names: Sequence[str]) -> pa.Table:
    n = len(part.feature)
    columns: dict[str, pa.Array] = {}
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name == "sae":
            columns["sae"] = pa.array(np.asarray(names, object)[value], pa.string())
        elif isinstance(value, np.ndarray):
            columns[field.name] = array_of(value)
        elif isinstance(value, str | int):
            columns[field.name] = pa.array([value] * n)
    return pa.table(columns)


def array_of(values: np.ndarray[tuple[int], np.dtype[np.generic]]) -> pa.Array:
    """Return a column; what is not defined is null."""
    if values.dtype.kind in "US":
        return pa.array(values.tolist(), pa.string())
    return pa.array(values, from_pandas=True)
