"""Reads the vectors that dictionaries read, where features.parquet has them (`[outbox] residuals`)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.findings.activations import Counts
from daemon.findings.manifests import ContrastEntry
from daemon.findings.progress import ReportProgress
from daemon.findings.results import IntArray
from daemon.findings.study import FEATURES, Study, codes_of, dictionary_key, misfit, open_parquet, reading

RESIDUAL = "residual"
MOST_BYTES = 256 << 20
BATCH_ROWS = 1024
NOT_STORED = "the vectors were not stored: [outbox] residuals = true stores them"

Vectors = npt.NDArray[np.float32]


def residual_differences(
    study: Study, contrast: ContrastEntry, samples: IntArray, counts: Counts, progress: ReportProgress
) -> tuple[dict[int, Vectors], str]:
    """Return by dictionary negative - positive of some samples, (k, d_in), and why there is none.

    Where a text has several positions, its vector is their mean.
    """
    paths = [folder.file(FEATURES) for folder in study.folders]
    if not all(RESIDUAL in open_parquet(path).schema_arrow.names for path in paths):
        return {}, NOT_STORED
    if sum(len(samples) * 4 * sae.d_in for sae in study.saes) > MOST_BYTES:
        return {}, "the vectors of so many samples and dictionaries take more memory than a report may"
    progress.begin("reading vectors", study.n_rows())
    place = np.full(study.n_samples, -1, np.int64)
    place[samples] = np.arange(len(samples))
    sums = [np.zeros((len(samples), sae.d_in), np.float32) for sae in study.saes]
    signs = np.zeros(len(study.texts))
    signs[study.texts.index(contrast.negative)] = 1
    signs[study.texts.index(contrast.positive)] = -1
    for number, path in enumerate(paths):
        with open_parquet(path) as file, reading(path):
            key, known = dictionary_key(study, file.schema_arrow.names)
            for batch in file.iter_batches(BATCH_ROWS, columns=["record_index", "text", key, RESIDUAL]):
                sample = study.samples_of(path, number, batch["record_index"].to_numpy())
                text = codes_of(path, "text", batch["text"], study.texts)
                codes = codes_of(path, key, batch[key], known)
                wanted = (place[sample] >= 0) & (signs[text] != 0)
                for sae, entry in enumerate(study.saes):
                    rows = np.flatnonzero(wanted & (codes == sae))
                    vectors = vectors_of(batch[RESIDUAL].take(pa.array(rows)), entry.d_in)
                    if vectors is None:
                        raise misfit(path, f"a {RESIDUAL} of {entry.prefix} has not {entry.d_in} numbers")
                    weight = signs[text[rows]] / counts.positions[sae, text[rows], sample[rows]]
                    np.add.at(sums[sae], place[sample[rows]], vectors * weight[:, None].astype(np.float32))
                progress.advance(len(batch))
    return dict(enumerate(sums)), ""


def vectors_of(lists: pa.ListArray, width: int) -> Vectors | None:
    """Return lists as (n, width), NaN where one is null; None where one is of another length."""
    known = np.asarray(lists.is_valid().to_numpy(zero_copy_only=False), np.bool_)
    flat = np.asarray(lists.flatten().to_numpy(zero_copy_only=False), np.float32)
    if (np.asarray(lists.value_lengths().to_numpy(zero_copy_only=False))[known] != width).any():
        return None
    found = np.full((len(known), width), np.nan, np.float32)
    found[known] = flat.reshape(-1, width)
    return found
