"""The samples in which a feature is strongest, on the words on which it fires.

What a token's activation is comes from features.parquet, the words from texts.parquet. Knows no statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from daemon.escaping import cut_short
from daemon.findings.activations import FeatureColumns, OnRows
from daemon.findings.results import FloatArray, IntArray, ShownText, ShownToken
from daemon.findings.study import TEXTS, Study, check_columns, open_parquet, reading

EXAMPLES = 5  # of a feature
AROUND = 20  # tokens before and after the one that is shown
MOST_CHARS = 200  # of one token, or of a text whose tokens have no places
BINS = 20


@dataclass(frozen=True, slots=True)
class TextRow:
    """A row of texts.parquet."""

    content: str
    token_ids: IntArray
    token_starts: IntArray | None  # None where the places of its tokens are not known


@dataclass(frozen=True, slots=True)
class Readings:
    """One feature at the positions of one text that its dictionary read."""

    position: IntArray
    token_id: IntArray
    activation: FloatArray  # 0 where it is silent


Key = tuple[int, int, int, int]  # sample, text, dictionary, feature


def strongest(
    columns: FeatureColumns, feature: int, texts: Sequence[str], cluster: IntArray, most: int = EXAMPLES
) -> list[int]:
    """Return the samples in whose texts a feature is strongest, no two of one cluster, strongest first."""
    found = [columns.of(text, feature) for text in texts]
    sample = np.concatenate([which for which, _ in found])
    value = np.concatenate([values for _, values in found])
    chosen: dict[int, int] = {}
    for place in np.lexsort((sample, -value)).tolist():
        chosen.setdefault(int(cluster[sample[place]]), int(sample[place]))
        if len(chosen) == most:
            break
    return list(chosen.values())


def histogram(
    columns: FeatureColumns, feature: int, texts: Sequence[str]
) -> tuple[FloatArray, tuple[tuple[str, IntArray], ...]]:
    """Return edges (bins + 1,) from 0 to the largest activation, and each text's counts in the bins."""
    values = {text: columns.of(text, feature)[1] for text in texts}
    top = max((float(found.max()) for found in values.values() if len(found)), default=1.0)
    edges = np.linspace(0.0, top, BINS + 1)
    return edges, tuple((text, np.histogram(found, edges)[0]) for text, found in values.items())


def read_positions(
    study: Study, wanted: Iterable[tuple[int, int, int]], on_rows: OnRows = lambda _: None
) -> dict[Key, Readings]:
    """Return features at the positions of some samples' texts; `wanted` are (sample, dictionary, feature)."""
    features: dict[tuple[int, int], list[int]] = {}
    for sample, sae, feature in wanted:
        features.setdefault((sample, sae), []).append(feature)
    codes = np.array([sample * len(study.saes) + sae for sample, sae in features], np.int64)
    found: dict[Key, list[tuple[int, int, float]]] = {}
    for rows in study.scan():
        for row in np.flatnonzero(np.isin(rows.sample * len(study.saes) + rows.sae, codes)).tolist():
            begin, end = rows.offsets[row : row + 2]
            indices, values = rows.indices[begin:end], rows.values[begin:end]
            sample, text, sae = int(rows.sample[row]), int(rows.text[row]), int(rows.sae[row])
            place = int(rows.position[row]), int(rows.token_id[row])
            for feature in features[sample, sae]:
                value = float(values[indices == feature].sum())
                found.setdefault((sample, text, sae, feature), []).append((*place, value))
        on_rows(len(rows.sample))
    return {
        key: Readings(
            np.array([one[0] for one in many], np.int64),
            np.array([one[1] for one in many], np.int64),
            np.array([one[2] for one in many]),
        )
        for key, many in found.items()
    }


def read_texts(study: Study, samples: Iterable[int]) -> dict[tuple[int, str], TextRow]:
    """Return rows of texts.parquet by sample and name of the text; none where a folder has no such file."""
    wanted = np.unique(np.fromiter(samples, np.int64))
    found: dict[tuple[int, str], TextRow] = {}
    for number, folder in enumerate(study.folders):
        path = folder.file(TEXTS)
        first, last = study.starts[number : number + 2]
        mine = study.record_index[wanted[(wanted >= first) & (wanted < last)]]
        if not len(mine) or not path.is_file():
            continue
        columns = ["record_index", "text", "content", "token_ids", "token_starts"]
        with open_parquet(path) as file, reading(path):
            check_columns(path, file.schema_arrow.names, columns)
            for batch in file.iter_batches(1024, columns=columns):
                chosen = batch.filter(pc.is_in(batch["record_index"], pa.array(mine)))
                which = study.samples_of(path, number, chosen["record_index"].to_numpy()).tolist()
                for sample, row in zip(which, chosen.to_pylist(), strict=True):
                    found[sample, row["text"]] = text_row(row)
    return found


def text_row(row: Mapping[str, object]) -> TextRow:
    ids, starts = row["token_ids"], row["token_starts"]
    places = None if starts is None else np.asarray(starts, np.int64)
    tokens = np.asarray(ids if ids is not None else (), np.int64)
    content = row["content"]
    if places is not None and (
        len(places) != len(tokens) or (np.diff(places) < 0).any() or (len(places) and places[0] < 0)
    ):
        places = None
    return TextRow(content if isinstance(content, str) else "", tokens, places)


def show_text(name: str, row: TextRow | None, read: Readings | None, activation: float) -> ShownText:
    """Return a text around the token where a feature is strongest; of one that is silent its end.

    Without the places of its tokens the text is one token; without the text there is none.
    """
    at = read if read is not None and (read.position >= 0).all() else None
    fires = at is not None and len(at.activation) > 0 and at.activation.max() > 0
    position = int(at.position[int(at.activation.argmax())]) if at is not None and fires else None
    if row is None:
        return ShownText(name, (), False, False, activation, position)
    shift = shift_of(row, at)
    if row.token_starts is None or shift is None:
        return whole_text(name, row.content, activation, position)
    n = len(row.token_ids)
    activations: dict[int, float] = {}
    if at is not None:
        activations = dict(zip((at.position - shift).tolist(), at.activation.tolist(), strict=True))
    peak = None if position is None else position - shift
    middle = max(n - 1, 0) if peak is None else min(max(peak, 0), n - 1)
    first, last = max(middle - AROUND, 0), min(middle + AROUND + 1, n)
    ends = np.append(row.token_starts[1:], len(row.content))
    pieces = [row.content[row.token_starts[token] : ends[token]] for token in range(first, last)]
    tokens = tuple(
        ShownToken(cut_short(piece, MOST_CHARS), activations.get(token), token == peak)
        for token, piece in enumerate(pieces, first)
    )
    starts_inside = n > 0 and row.token_starts[first] > 0
    ends_inside = last < n or (bool(pieces) and len(pieces[-1]) > MOST_CHARS)  # of a text that was cut
    return ShownText(name, tokens, bool(first > 0 or starts_inside), ends_inside, activation, position)


def shift_of(row: TextRow, read: Readings | None) -> int | None:
    """Return how far positions in features.parquet exceed places in `token_ids`: a BOS may be counted in one.

    None where the two are not of the same tokens.
    """
    if read is None or not len(read.position):
        return 0
    for shift in (0, 1, -1):
        places = read.position - shift
        inside = (places >= 0) & (places < len(row.token_ids))
        beyond = places[~inside]
        if (row.token_ids[places[inside]] == read.token_id[inside]).all() and (beyond == -1).all():
            return shift
    return None


def whole_text(name: str, content: str, activation: float, position: int | None) -> ShownText:
    shown = content[-MOST_CHARS:]
    return ShownText(name, (ShownToken(shown, None),), len(shown) < len(content), False, activation, position)
