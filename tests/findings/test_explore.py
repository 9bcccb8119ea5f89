"""`lensd explore`: the tables that embedding-atlas is given, and its page in a browser."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from daemon.errors import ConfigError
from daemon.findings.atlas_tables import draw, feature_table, gather
from daemon.findings.explore import explore, free_port, notes, write_tables
from daemon.findings.layout import equal_shares, principal_components
from daemon.findings.study import open_study
from tests.observe.browser import CHROMIUM, chromium, tab

ROOT = Path(__file__).parents[2]
REQUIREMENTS = Path(__file__).with_name("explore-requirements.txt")
D_SAE = {"l1": 5, "wide": 7}
TEXTS = {"prompt": "{prompt}", "fact": "{prompt} {fact}", "fact_hall": "{prompt} {hallucination}"}
HOSTILE = "<script>alert(1)</script> \u202e back"
EXPECTED = ("favicon", "404", "WebGPU", "available adapters")  # no icon; no graphics in a headless browser


def publish(outbox: Path, name: str, n: int, *, texts: bool = True, positions: int = 1) -> Path:
    """A published folder of n samples: text t of sample i fires l1/(i % 5) and wide/t, on token 10 + i."""
    folder = outbox / name
    folder.mkdir(parents=True)
    metrics: dict[str, list[object]] = {
        "sample_id": [f"{name}-{i}" for i in range(n)],
        "record_index": list(range(0, 2 * n, 2)),
        "domain": [None if i == 0 else f"d{i % 2}" for i in range(n)],
        "complexity": [0.5] * n,
        "extra": ["{}"] * n,
        "stability_diff": [i / 8 for i in range(n)],
    }
    features, stored = [], []
    for t, text in enumerate(TEXTS):
        metrics[f"n_tokens_{text}"] = [t + 2] * n
        metrics[f"l1_{text}_l0_norm"] = [10 * t + i for i in range(n)]
        if text != "prompt":
            metrics[f"stability_{text}"] = [t + i / 4 for i in range(n)]
            metrics[f"stability_{text}_std"] = [t + i / 2 for i in range(n)]
        for i in range(n):
            key = {"sample_id": f"{name}-{i}", "record_index": 2 * i, "text": text}
            content = HOSTILE if i == 0 else f"a{t} w{i}"
            stored.append(key | {"content": content, "token_ids": [1, 10 + i], "token_starts": [0, 3]})
            for position in range(positions):
                row = key | {"position": position + 1, "token_id": 10 + i}
                one = {"sae": "l1", "layer": 1, "indices": [i % 5], "values": [1.0 + i + position]}
                features.append(row | one)
                other = {"sae": "wide", "layer": 2, "indices": [t], "values": [2.0 if i else 4.0]}
                features.append(row | (other if position == 0 else other | {"indices": [], "values": []}))
    pd.DataFrame(metrics).to_parquet(folder / "metrics.parquet")
    pd.DataFrame(features).to_parquet(folder / "features.parquet")
    if texts:
        pd.DataFrame(stored).to_parquet(folder / "texts.parquet")
    saes = [
        {"name": key, "hook": f"blocks.{layer}.hook_resid_post", "layer": layer, "d_in": 4, "d_sae": width}
        for layer, (key, width) in enumerate(D_SAE.items(), 1)
    ]
    saes[0]["neuronpedia_id"] = "tiny/1-res"
    contrast = {"reference": "prompt", "positive": "fact", "negative": "fact_hall"}
    manifest = {
        "unit": name,
        "created": "2026-11-30T00:00:00+00:00",
        "input": {"name": f"{name}.jsonl"},
        "records": n,
        "rows": n,
        "rejects": 0,
        "model": {"name": "tiny", "d_model": 4, "n_layers": 3, "dtype": "float32"},
        "saes": saes,
        "recipe": {"name": "pairs", "texts": TEXTS, "contrast": contrast},
        "config": {"analysis": {"positions": "all" if positions > 1 else "last"}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def handed_over(outbox: Path, folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder.mkdir()
    write_tables(draw(open_study([outbox])), folder)
    return pd.read_parquet(folder / "samples.parquet"), pd.read_parquet(folder / "features.parquet")


def test_each_text_of_each_sample_is_a_row_with_its_columns_and_features(tmp_path: Path) -> None:
    publish(tmp_path / "outbox", "a", 4)
    publish(tmp_path / "outbox", "b", 3)
    samples, _ = handed_over(tmp_path / "outbox", tmp_path / "tables")
    assert samples["sample_id"].tolist() == [f"a-{i}" for i in range(4) for _ in TEXTS] + [
        f"b-{i}" for i in range(3) for _ in TEXTS
    ]
    assert samples["text"].tolist() == list(TEXTS) * 7
    assert samples["folder"].tolist() == ["a"] * 12 + ["b"] * 9
    row = samples[(samples["sample_id"] == "b-2") & (samples["text"] == "fact_hall")].iloc[0]
    assert row["content"] == "a2 w2"
    assert (row["n_tokens"], row["l1_l0_norm"], row["stability"], row["stability_std"]) == (4, 22, 2.5, 3.0)
    assert (row["stability_diff"], row["domain"], row["record_index"]) == (0.25, "d0", 4)
    assert row["features"].tolist() == ["l1/2", "wide/2"]
    prompts = samples[samples["text"] == "prompt"]
    assert prompts["stability"].isna().all()
    assert prompts["side"].isna().all()
    assert samples["content"][0] == HOSTILE
    assert not [name for name in samples.columns if "fact" in name or "prompt" in name]


def test_each_feature_that_fires_is_a_row_with_its_rates_and_words(tmp_path: Path) -> None:
    publish(tmp_path / "outbox", "a", 4)
    _, features = handed_over(tmp_path / "outbox", tmp_path / "tables")
    found = features.set_index("feature")
    assert sorted(found.index) == ["l1/0", "l1/1", "l1/2", "l1/3", "wide/0", "wide/1", "wide/2"]
    assert features["feature"].tolist()[:2] == ["wide/1", "wide/2"]  # those that differ come first
    one = found.loc["wide/2"]
    assert (one["sae"], one["layer"], one["index"], one["firing_difference"]) == ("wide", 2, 2, 1.0)
    assert one["firing_rate"] == pytest.approx(1 / 3)
    assert (one["rate_prompt"], one["rate_fact"], one["rate_fact_hall"]) == (0, 0, 1)
    assert one["mean_activation"] == pytest.approx((4 + 3 * 2) / 4)
    assert pd.isna(one["neuronpedia"])
    assert set(features["verdict"]) == {"few"}  # of 4 pairs
    assert one["topics"].tolist() == ["wide", "too few texts to test"]
    assert found.loc["l1/3", "neuronpedia"] == "https://www.neuronpedia.org/tiny/1-res/3"
    assert found.loc["l1/3", "tokens"] == "w3"
    assert "w3" in found.loc["l1/3", "description"]
    assert found.loc["wide/1", "tokens"].split(" | ")[1:] == ["w1", "w2", "w3"]


def test_features_that_hold_come_first(tmp_path: Path) -> None:
    study = open_study([publish(tmp_path, "a", 4)])
    drawn = draw(study)
    verdicts = ["none"] * 12
    verdicts[1], verdicts[3] = "holds", "controls"
    features = feature_table(drawn, {}, gather(drawn), verdicts)
    assert features["feature"].to_pylist()[:3] == ["l1/1", "l1/3", "wide/1"]
    assert features["description"][0].as_py().startswith("differs, also at equal length; fires on")


def test_a_text_of_several_positions_has_their_mean(tmp_path: Path) -> None:
    publish(tmp_path / "outbox", "a", 4, positions=2)
    samples, features = handed_over(tmp_path / "outbox", tmp_path / "tables")
    assert samples["features"][0].tolist() == ["l1/0", "wide/0"]
    found = features.set_index("feature")
    assert found.loc["l1/3", "mean_activation"] == pytest.approx((4 + 5) / 2)
    assert found.loc["wide/0", "mean_activation"] == pytest.approx(
        (4 + 3 * 2) / 4 / 2
    )  # silent at the second


def test_texts_that_were_not_kept_are_shown_by_their_ids(tmp_path: Path) -> None:
    publish(tmp_path / "outbox", "a", 2, texts=False)
    samples, features = handed_over(tmp_path / "outbox", tmp_path / "tables")
    assert samples["content"].tolist() == ["a-0"] * 3 + ["a-1"] * 3
    assert "tokens" not in features.columns


def test_verdicts_by_extrapolation_are_told(tmp_path: Path) -> None:
    folder = publish(tmp_path / "outbox", "a", 3)
    assert notes(draw(open_study([folder]))) == [
        "no pair is of equal length: what holds does so by extrapolation of a regression alone"
    ]
    metrics = pd.read_parquet(folder / "metrics.parquet")
    metrics["n_tokens_fact_hall"] = metrics["n_tokens_fact"]
    metrics.to_parquet(folder / "metrics.parquet")
    assert notes(draw(open_study([folder]))) == []


def test_a_large_outbox_is_drawn_from(tmp_path: Path) -> None:
    study = open_study([publish(tmp_path, "a", 20)])
    drawn = draw(study, most_texts=20)
    assert len(set(drawn.samples.tolist())) == 6
    assert drawn.note is not None
    assert drawn.note.startswith("6 of 20 samples, drawn at random")
    assert len(draw(study, most_activations=60).samples) == 10
    assert draw(study).note is None
    (tmp_path / "tables").mkdir()
    write_tables(drawn, tmp_path / "tables")
    samples = pd.read_parquet(tmp_path / "tables/samples.parquet")
    assert samples["sample_id"].tolist() == [f"a-{i}" for i in drawn.samples for _ in TEXTS]
    assert [names[0] for names in samples["features"]] == [
        f"l1/{i % 5}" for i in drawn.samples for _ in TEXTS
    ]


def test_layout_is_the_principal_components_of_the_features() -> None:
    from scipy import sparse

    rng = np.random.default_rng(3)
    dense = rng.gamma(1.0, 1.0, (40, 12)) * (rng.random((40, 12)) < 0.4)
    dense[:, 8:] *= 50
    scaled = equal_shares(sparse.csr_array(dense), [8, 4]).toarray()
    for block in (scaled[:, :8], scaled[:, 8:]):
        assert (block**2).sum(1).mean() == pytest.approx(1)
    centred = scaled - scaled.mean(0)
    _, _, loadings = np.linalg.svd(centred, full_matrices=False)
    places = principal_components(sparse.csr_array(scaled))
    np.testing.assert_allclose(np.abs(places), np.abs(centred @ loadings[:2].T), atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (3, 1)])
def test_layout_of_few_points_is_finite(shape: tuple[int, int]) -> None:
    from scipy import sparse

    places = principal_components(sparse.csr_array(np.arange(1.0, 1 + shape[0] * shape[1]).reshape(shape)))
    assert places.shape == (shape[0], 2)
    assert np.isfinite(places).all()


def test_without_the_extra_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=re.escape('pip install "lensd[explore]"')):
        explore([tmp_path], None, print)


def test_a_port_that_is_taken_is_said() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: .*in use"):
            free_port(port)
    with pytest.raises(ConfigError, match="--port 70000"):
        free_port(70000)


@pytest.fixture
def atlas(tmp_path: Path) -> str:
    """A PYTHONPATH with embedding-atlas: this environment's, else the parts of it that its server imports."""
    if importlib.util.find_spec("embedding_atlas") is not None:
        return str(ROOT)
    target = tmp_path / "site"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
        "--target",
        str(target),
    ]
    done = subprocess.run([*command, "-r", str(REQUIREMENTS)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"embedding-atlas can't be installed: {done.stderr.strip().splitlines()[-1:]}")
    return f"{ROOT}{os.pathsep}{target}"


@contextlib.contextmanager
def exploring(outbox: Path, python_path: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon.cli", "explore", str(outbox)],
        env=os.environ | {"PYTHONPATH": python_path, "TMPDIR": str(outbox.parent)},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        yield process, next(line.strip() for line in process.stdout if line.startswith("http"))
    finally:
        process.kill()
        process.communicate()


def status_for(port: int, host: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.request("GET", "/", headers={"Host": host})
        return connection.getresponse().status


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
async def test_page_lists_our_features_and_asks_nothing_of_the_network(tmp_path: Path, atlas: str) -> None:
    publish(tmp_path / "outbox", "a", 30)
    with exploring(tmp_path / "outbox", atlas) as (process, address):
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", address)
        with chromium(tmp_path / "profile") as devtools:
            async with tab(devtools) as page:
                await page.show()
                await page.tell("Page.navigate", url=address)
                await page.until("document.body?.innerText.includes('wide/2')")
                await page.until("document.body.innerText.includes('a1 w1')")
                assert await page.value("document.body.innerText.includes('firing_difference')")
                outside = [url for url in page.requests if not url.startswith((address, "data:", "blob:"))]
                assert outside == []
                complaints = [text for text in page.complaints if not any(word in text for word in EXPECTED)]
                assert complaints == []
        port = int(address.rstrip("/").rpartition(":")[2])
        for host, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), ("evil.example", 421)):
            assert status_for(port, host) == status
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    assert list(tmp_path.glob("lensd-explore-*")) == []
