"""`lensd report`: opens folders, makes their report, and writes the page and the table of features."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from daemon.errors import ConfigError
from daemon.findings.page import write_page
from daemon.findings.progress import ReportProgress
from daemon.findings.report import ReportOptions, make_report
from daemon.findings.results import GroupedFeatures, PairedFeatures, Prevalence, Report
from daemon.findings.study import Study, open_study

REPORT = "report.html"
PAGES = (".html", ".htm")
MARK = b"lensd report</title>"  # of a page of ours, near its beginning
MARK_BYTES = 16 << 10
DATA_KEY = b"lensd.features"  # of the schema of a table of ours


def write_report(
    paths: Sequence[Path], options: ReportOptions, output: Path, data: Path | None = None
) -> Report:
    """Write the page of these outboxes or folders, and with `data` every feature's statistics as Parquet.

    Raises ConfigError, before much is read, for folders that don't belong together and files in the way.
    """
    check_page(output)
    if data is not None:
        check_data(data)
    with ReportProgress() as progress:
        study = open_study(paths)
        report = make_report(study, options, progress)
        progress.begin("writing")
        write_page(report, output)
        if data is not None:
            write_data(features_table(study, report), data)
    return report


def check_page(path: Path) -> None:
    """Raises ConfigError where a page can't be written, or would take the place of something else."""
    if path.suffix.lower() not in PAGES:
        raise ConfigError(f"{path}: the page is HTML: name a file that ends in .html")
    check_place(path)
    if path.exists():
        with path.open("rb") as file:
            if MARK not in file.read(MARK_BYTES):
                raise ConfigError(f"{path}: there is a file that is no report of lensd's: name another")


def check_data(path: Path) -> None:
    if path.suffix.lower() != ".parquet":
        raise ConfigError(f"{path}: the table is Parquet: name a file that ends in .parquet")
    check_place(path)
    if path.exists() and not is_ours(path):
        raise ConfigError(f"{path}: there is a file that is no table of lensd report's: name another")


def is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return DATA_KEY in (pq.read_schema(file).metadata or {})
    except pa.ArrowException:
        return False


def check_place(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder: name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: no such folder {path.parent}: make it, or name another file")


def features_table(study: Study, report: Report) -> pa.Table:
    """Every feature with all that was computed of it, a row each, or one for each group."""
    names = [sae.prefix for sae in study.saes]
    parts: list[PairedFeatures | GroupedFeatures | Prevalence] = [*report.grouped, *report.prevalence]
    if report.features is not None:
        parts.append(report.features)
    tables = [table_of(part, names) for part in parts]
    if not tables:
        raise ConfigError("these samples have no statistics of features: leave --data out")
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
    """A column; what is not defined is null."""
    if values.dtype.kind in "US":
        return pa.array(values.tolist(), pa.string())
    return pa.array(values, from_pandas=True)


def write_data(table: pa.Table, path: Path) -> None:
    """Write a table; the file is there whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
