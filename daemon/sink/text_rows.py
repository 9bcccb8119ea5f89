"""Makes the table of texts: each as the model read it, where its tokens are and whose they are.

Knows nothing about files, and tokenizes nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence, Sized
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from daemon.recipes import ROLES, Recipe
from daemon.records import TokenizedSample


def texts_table(samples: Sequence[TokenizedSample], recipe: Recipe, schema: pa.Schema) -> pa.Table:
    """A row for each text, in the order of samples and of the recipe.

    Raises AssertionError where a sample came without its texts.
    """
    names = recipe.text_names
    texts = [text for sample in samples for text in sample.stored]
    if len(texts) != len(samples) * len(names):
        raise AssertionError(f"{len(texts)} texts of {len(samples)} samples of {len(names)} texts each")
    ids = [one for sample in samples for one in sample.token_ids]
    n_tokens = sum(map(len, ids))
    roles = [None if text.roles is None else np.frombuffer(text.roles, np.uint8) for text in texts]
    columns = {
        "sample_id": pa.array([sample.sample.sample_id for sample in samples for _ in names], pa.string()),
        "record_index": np.repeat([sample.sample.record_index for sample in samples], len(names)),
        "text": pa.array([*names] * len(samples)),
        "content": pa.array([text.content for text in texts], pa.string()),
        "token_ids": pa.ListArray.from_arrays(
            offsets_of(ids), pa.array(np.fromiter(itertools.chain.from_iterable(ids), np.int32, n_tokens))
        ),
        "token_starts": pa.ListArray.from_arrays(
            offsets_of([text.starts for text in texts]), pa.array(joined([text.starts for text in texts]))
        ),
        "token_roles": pa.ListArray.from_arrays(
            offsets_of(roles), pa.array([None, *ROLES]).take(pa.array(joined(roles)))
        ),
    }
    return pa.Table.from_arrays([pa.array(columns[name]) for name in schema.names], schema=schema)


def offsets_of(rows: Sequence[Sized | None]) -> pa.Array:
    """Where the list of each row begins among the values of all; that of None is null."""
    ends = np.cumsum([0, *(0 if row is None else len(row) for row in rows)])
    return pa.array(ends, pa.int32(), mask=np.array([*(row is None for row in rows), False]))


def joined(rows: Iterable[npt.NDArray[np.integer[Any]] | None]) -> npt.NDArray[np.integer[Any]]:
    return np.concatenate([np.zeros(0, np.int32), *(row for row in rows if row is not None)])
