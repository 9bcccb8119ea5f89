"""Reads the texts of drawn samples, and which words their tokens stand for, from texts.parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from daemon.findings.results import IntArray
from daemon.findings.study import TEXTS, Study, check_columns, open_parquet, reading

BATCH_ROWS = 1024
COLUMNS = ("record_index", "text", "content", "token_ids", "token_starts")


@dataclass(frozen=True, slots=True)
class Texts:
    """What texts.parquet says of S samples with T texts each."""

    contents: list[str | None]  # (S * T,) text t of sample s at s * T + t; None where there is none
    words: dict[int, str]  # of a token, as it stands in the first text that has it


def read_contents(study: Study, samples: IntArray) -> Texts:
    """Return the texts of samples, (S,) ascending. Raises ConfigError where a texts.parquet is damaged."""
    ranks = np.full(study.n_samples, -1, np.int64)
    ranks[samples] = np.arange(len(samples))
    places = {text: place for place, text in enumerate(study.texts)}
    found = Texts([None] * (len(samples) * len(places)), {})
    for number, folder in enumerate(study.folders):
        path = folder.file(TEXTS)
        first, last = study.starts[number : number + 2]
        mine = study.record_index[samples[(samples >= first) & (samples < last)]]
        if not len(mine) or not path.is_file():
            continue
        with open_parquet(path) as file, reading(path):
            check_columns(path, file.schema_arrow.names, COLUMNS)
            for batch in file.iter_batches(BATCH_ROWS, columns=list(COLUMNS)):
                chosen = batch.filter(pc.is_in(batch["record_index"], pa.array(mine)))
                which = ranks[study.samples_of(path, number, chosen["record_index"].to_numpy())]
                for rank, row in zip(which.tolist(), chosen.to_pylist(), strict=True):
                    if row["text"] in places and row["content"] is not None:
                        found.contents[rank * len(places) + places[row["text"]]] = row["content"]
                        add_words(found.words, row["content"], row["token_ids"], row["token_starts"])
    return found


def add_words(
    words: dict[int, str], content: str, ids: Sequence[int] | None, starts: Sequence[int] | None
) -> None:
    """Note the word of each token that has none yet, where the places of the text's tokens are known."""
    if ids is None or starts is None or len(ids) != len(starts):
        return
    for token, begin, end in zip(ids, starts, [*starts[1:], len(content)], strict=True):
        word = content[begin:end].strip()
        if word:
            words.setdefault(token, word)
