"""Tells where all texts are read at one and the same token, such as the end of a chat template's turn."""

from __future__ import annotations

from collections import Counter

import pyarrow.compute as pc

from daemon.findings import numbers
from daemon.findings.study import FEATURES, Study, check_columns, open_parquet, reading

ALIKE = 0.95  # share of the texts that end in one token
BATCH_ROWS = 1 << 16


def alike_note(study: Study) -> str:
    """Return a sentence on texts that nearly all end in one token; empty where they don't, or all is read."""
    if study.pools_positions:
        return ""
    found = []
    for text, counts in last_tokens(study).items():
        (token, most), total = counts.most_common(1)[0], counts.total()
        if most >= ALIKE * total:
            found.append(f"in {numbers.percent(most / total)} of the {text} texts it is token {token}")
    if not found:
        return ""
    return (
        f"The dictionaries read the last token alone, and {' and '.join(found)}: what fires there answers to"
        " the text before it, not to a word of its own."
    )


def last_tokens(study: Study) -> dict[str, Counter[int]]:
    """Return how often each token is read, by text."""
    found: dict[str, Counter[int]] = {text: Counter() for text in study.texts}
    for folder in study.folders:
        path = folder.file(FEATURES)
        with open_parquet(path) as file, reading(path):
            check_columns(path, file.schema_arrow.names, ("text", "token_id"))
            for batch in file.iter_batches(BATCH_ROWS, columns=["text", "token_id"]):
                for text, counts in found.items():
                    tokens = batch["token_id"].filter(pc.equal(batch["text"], text))
                    for one in tokens.value_counts().to_pylist():
                        counts[one["values"]] += one["counts"]
    return {text: counts for text, counts in found.items() if counts}
