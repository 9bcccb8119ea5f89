"""Tells which samples share their reference text: those are one cluster.

With texts.parquet equal texts are told by their content. Without it they are told by what was measured of
them: equal texts have the same numbers but for rounding, and no others do. Knows no statistics.
"""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from daemon.analysis.columns import layer_column_name, token_count_name
from daemon.findings.results import FloatArray, IntArray
from daemon.findings.study import TEXTS, Study, check_columns, misfit, open_parquet, reading

ROUNDING = 1e-4  # relative, up to which two numbers of one text may differ
MEASURED = ("l2_norm", "max_activation", "reconstruction_error")


def clusters_of(study: Study, text: str) -> tuple[IntArray, str]:
    """(n_samples,) number of each sample's cluster, from 0, and a note where it is not from the texts."""
    if study.has(TEXTS):
        return by_content(study, text), ""
    note = (
        f"There is no {TEXTS}: two {text} texts are taken for equal where all that was measured of them is"
        f" equal to about {-round(np.log10(ROUNDING))} digits."
    )
    return by_measurement(study, text), note


def by_content(study: Study, text: str) -> IntArray:
    """Raises ConfigError where texts.parquet lacks the text of a sample."""
    digests = np.zeros(study.n_samples, "S16")
    for number, folder in enumerate(study.folders):
        path = folder.file(TEXTS)
        first, last = study.starts[number : number + 2]
        known = study.record_index[first:last]
        with open_parquet(path) as file, reading(path):
            check_columns(path, file.schema_arrow.names, ("record_index", "text", "content"))
            for batch in file.iter_batches(4096, columns=["record_index", "text", "content"]):
                chosen = batch.filter(pc.equal(batch["text"].cast(pa.string()), text))
                records = chosen["record_index"].to_numpy()
                place = np.searchsorted(known, records)
                ours = known[np.minimum(place, len(known) - 1)] == records
                contents = chosen["content"].to_pylist()
                for row, own, content in zip(place.tolist(), ours.tolist(), contents, strict=True):
                    if own:
                        told = (content or "").encode("utf-8", "surrogatepass")
                        digests[first + row] = (
                            hashlib.blake2b(told, digest_size=15).digest() + b"."
                        )  # no zero ends it
        if not digests[first:last].all():
            lost = study.record_index[first + int(np.argmin(digests[first:last] != b""))]
            raise misfit(path, f"has no text {text} of record_index {lost}")
    return numbered(digests)


def by_measurement(study: Study, text: str) -> IntArray:
    counts = [token_count_name(text)]
    counts += [layer_column_name(sae.prefix, text, "l0_norm") for sae in study.saes]
    floats = [layer_column_name(sae.prefix, text, name) for sae in study.saes for name in MEASURED]
    cluster = np.zeros(study.n_samples, np.int64)
    for name in counts:
        if name in study.columns:
            cluster = refined(cluster, study.numbers(name), 0.0)
    for name in floats:
        if name in study.columns:
            cluster = refined(cluster, study.numbers(name), ROUNDING)
    return numbered(cluster)


def refined(cluster: IntArray, numbers: FloatArray, tolerance: float) -> IntArray:
    """Clusters cut in two wherever neighbouring numbers are further apart, relative to their size."""
    known = np.nan_to_num(numbers, nan=-1.0)
    order = np.lexsort((known, cluster))
    ordered = known[order]
    gap = np.diff(ordered) > tolerance * np.abs(ordered[1:])
    cut = gap | (np.diff(cluster[order]) != 0)
    found = np.empty(len(cluster), np.int64)
    found[order] = np.concatenate(([0], np.cumsum(cut)))
    return found


def numbered(keys: np.ndarray[tuple[int], np.dtype[np.generic]]) -> IntArray:
    """(n,) the same number for equal keys, from 0 in the order of the keys.

    So the number of a text depends on the texts alone: in whichever order folders come, draws by number are
    the same.
    """
    number: IntArray = np.unique(keys, return_inverse=True)[1].astype(np.int64)
    return number
