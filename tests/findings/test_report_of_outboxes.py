"""`lensd report`: the whole command on folders made by hand and on a tiny model's, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from daemon.cli import main
from daemon.findings import cautions, compare, sentences
from daemon.findings.activations import count_activations
from daemon.findings.grouping import Grouping
from daemon.findings.health import health_of, reject_reasons
from daemon.findings.manifests import ContrastEntry
from daemon.findings.progress import ReportProgress
from daemon.findings.report import ReportOptions, make_report
from daemon.findings.study import open_study
from daemon.recipes import PLAIN_RECIPE
from tests.support import tiny
from tests.support.outboxes import SAES, make

PAIRS = 60
CONTRAST = ContrastEntry(reference="prompt", positive="fact", negative="hall")


@pytest.fixture
def made(tmp_path):
    made = make(tmp_path / "outbox" / f"a-{'1' * 12}", PAIRS, seed=4)
    made.write()
    return made


def report_of(path, **options):
    with ReportProgress() as progress:
        return make_report(open_study([path]), ReportOptions(**options), progress)


def lensd(*args):
    return main(["report", *map(str, args)])


def dense(made, text, sae):
    rows = [row for row in made.features if (row["text"], row["sae"]) == (text, SAES[sae][0])]
    found = np.zeros((len(rows), SAES[sae][2]))
    for place, row in enumerate(rows):
        found[place, row["indices"]] = row["values"]
    return found


def test_the_page_and_the_table_hold_every_feature(made, tmp_path, capsys):
    page, data = tmp_path / "page.html", tmp_path / "features.parquet"
    assert lensd(tmp_path / "outbox", "-o", page, "--data", data, "--features", 3) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == str(page)
    assert said.err == ""
    assert f"a-{'1' * 12}.jsonl" in page.read_text()
    frame = pd.read_parquet(data)
    assert len(frame) == sum(width for _, _, width in SAES)
    for sae, (name, _, width) in enumerate(SAES):
        fact, hall = dense(made, "fact", sae), dense(made, "hall", sae)
        mine = frame[frame["sae"] == name].sort_values("feature")
        assert mine["feature"].tolist() == list(range(width))
        np.testing.assert_allclose(mine["rate_positive"], (fact > 0).mean(0))
        np.testing.assert_allclose(mine["firing"], (hall > 0).mean(0) - (fact > 0).mean(0), atol=1e-12)
        np.testing.assert_allclose(mine["activation"], (hall - fact).mean(0), atol=1e-12)
        assert mine["only_positive"].tolist() == ((fact > 0) & (hall == 0)).sum(0).tolist()
        assert set(mine["verdict"]) <= {"holds", "controls", "none", "few"}
        assert mine["q"].isna().tolist() == (~mine["tested"]).tolist()


def test_numbers_of_the_report_are_those_of_the_rows(made):
    report = report_of(made.path)
    frame = pd.DataFrame(made.metrics)
    assert (report.n_pairs, report.n_clusters) == (PAIRS, PAIRS // 2)
    assert report.n_matched == (frame["n_tokens_fact"] == frame["n_tokens_hall"]).sum()
    assert dict(report.mean_tokens)["hall"] == pytest.approx(frame["n_tokens_hall"].mean())
    overall = {one.column: one for one in report.columns if one.group is None}
    assert overall["entropy"].difference.raw.value == pytest.approx(frame["entropy_diff"].mean())
    assert overall["entropy"].orientation == "hall - fact"
    assert overall["stability"].difference.raw.value == pytest.approx(frame["stability_diff"].mean())
    assert overall["stability"].orientation == "fact - hall"
    expected = (frame["l3_hall_gini"] - frame["l3_fact_gini"]).mean()
    assert overall["l3_gini"].difference.raw.value == pytest.approx(expected)
    assert overall["l3_gini"].sae == "l3"
    south = frame[frame["domain"] == "south"]
    (grouped,) = [one for one in report.columns if (one.column, one.group) == ("l1_l0_norm", "south")]
    assert grouped.difference.raw.value == pytest.approx(
        (south["l1_hall_l0_norm"] - south["l1_fact_l0_norm"]).mean()
    )
    assert grouped.difference.n == len(south)
    (shares,) = [one for one in report.shapes if (one.sae, one.text, one.group) == ("l1", "hall", "south")]
    assert dict(shares.classes) == dict(Counter(south["l1_hall_shape_class"]))
    assert [probe.name for probe in report.probes] == [
        "length", "features of l1", "features of l3", "residual at l1", "residual at l3",
    ]  # fmt: skip
    assert "were not stored" in report.probes[-1].reason
    assert report.group_names == ("north", "south")
    assert report.has_texts


def test_log_probabilities_are_a_control_where_they_are_there(made):
    for row in made.metrics:
        row["mean_log_prob_fact"], row["mean_log_prob_hall"] = -1.0 - row["entropy_fact"], -2.0
    made.write()
    report = report_of(made.path)
    assert report.controls == ("tokens", "log-probability")
    assert [probe.name for probe in report.probes][:2] == ["length", "log-probability and length"]
    assert report.features is not None
    (said,) = [one for one in sentences.findings(report) if one.startswith("A linear probe on length alone")]
    assert f" {report.probes[0].accuracy.value:.0%} " in said


def test_probes_of_many_pairs_take_whole_clusters(made, monkeypatch):
    monkeypatch.setattr(compare, "PROBED_PAIRS", 45)
    report = report_of(made.path)
    assert {probe.n for probe in report.probes} == {44}  # clusters are of two
    assert "Probes are of up to 45 pairs, whole clusters drawn at random." in report.notes
    pairs, _ = compare.pairs_of(open_study([made.path]), CONTRAST, Grouping(None, (), np.full(PAIRS, -1)))
    rows, chosen = compare.probed_pairs(pairs)
    assert set(pairs.cluster[rows]).isdisjoint(pairs.cluster[~rows])
    np.testing.assert_array_equal(chosen.d_tokens, pairs.d_tokens[rows])
    assert chosen.n_clusters == 22


def test_stored_residuals_are_probed(made):
    rng = np.random.default_rng(0)
    path = made.path / "features.parquet"
    table = pq.read_table(path)
    sides = {"fact": 1.0, "hall": -1.0, "prompt": 0.0}
    vectors = [
        [sides[text] if sae == "l3" else 0.0, *rng.normal(0, 0.1, 7)]
        for text, sae in zip(table["text"].to_pylist(), table["sae"].to_pylist(), strict=True)
    ]
    pq.write_table(table.append_column("residual", [vectors]), path)
    probes = {probe.name: probe for probe in report_of(made.path).probes}
    assert probes["residual at l3"].accuracy.value == 1.0
    assert probes["residual at l1"].accuracy.value < 0.9


def test_without_a_contrast_groups_are_compared_and_without_groups_nothing(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", PAIRS, seed=4, recipe=PLAIN_RECIPE)
    made.write()
    report = report_of(made.path)
    assert [(one.group, one.against) for one in report.grouped] == [("north", "south")]  # once, not twice
    assert {(one.group, one.against) for one in report.grouped_columns} == {("north", "south")}
    acts = dense(made, "text", 0)
    north = np.array([row["domain"] == "north" for row in made.metrics])
    inside = report.grouped[0].sae == 0
    np.testing.assert_allclose(report.grouped[0].rate_inside[inside], (acts[north] > 0).mean(0))
    assert {one.column for one in report.grouped_columns} >= {"l1_gini", "l3_l0_norm"}
    assert report.features is None
    assert report.prevalence == ()
    assert report.small_groups == ()
    assert len(report.details[0].examples[0].texts) == 1
    for row in made.metrics:
        row["domain"] = None
    made.write()
    report = report_of(made.path)
    assert report.grouped == report.grouped_columns == report.small_groups == ()
    (common,) = report.prevalence
    np.testing.assert_allclose(common.rate[common.sae == 0], (acts > 0).mean(0))
    assert report.details


def test_groups_that_are_too_small_are_named(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", PAIRS, seed=4, recipe=PLAIN_RECIPE)
    for number, row in enumerate(made.metrics):
        row["domain"] = f"d{number % 10}"
    made.write()
    report = report_of(made.path)
    assert report.grouped == ()
    assert report.small_groups == tuple(f"d{number}" for number in range(10))
    assert (
        "the groups of domain have too few samples, inside or outside: d0, d1"
        in sentences.findings(report)[0]
    )


def test_pairs_of_no_equal_length_are_told(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", PAIRS, seed=4)
    for number, row in enumerate(made.metrics):
        row["n_tokens_hall"] = row["n_tokens_fact"] + 2 + number % 3
    made.write()
    report = report_of(made.path)
    assert (report.n_matched, report.length_range) == (0, (2, 4))
    assert next(cautions.cautions(report)).startswith(
        "No pair is of equal length: hall has 2 to 4 tokens more"
    )


def test_samples_that_count_less_are_told(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", PAIRS, seed=4, recipe=PLAIN_RECIPE)
    for row in made.metrics[:4]:
        row["domain"] = None
    made.metrics[4]["domain"] = "east"
    texts = [row for row in made.texts if row["text"] == "text"]
    texts[10]["content"] = texts[12]["content"]
    made.write()
    report = report_of(made.path)
    assert report.small_groups == ("east",)
    assert [(one.group, one.n_inside, one.n_outside) for one in report.grouped] == [
        ("north", 26, 28),  # of the others two have one text
        ("south", 28, 27),
    ]
    assert "4 of 60 samples have no value of domain: they are in no comparison." in report.notes
    assert "60 samples have 30 different texts: on one side the same text counts once." in report.notes


def test_features_that_can_t_be_tested_are_not_shown(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 3)
    made.write()
    report = report_of(made.path)
    assert report.details == ()
    assert set(report.features.verdict) == {"few"}


def test_a_folder_that_is_not_published_yet_goes_by_the_name_of_its_input(made, tmp_path):
    folder = tmp_path / "outbox" / ".staging" / made.manifest["unit"]
    folder.parent.mkdir()
    shutil.copytree(made.path, folder)
    report = report_of(folder)
    assert report.run.folders == (f"a-{'1' * 12}.jsonl",)
    assert {one.folder for detail in report.details for one in detail.examples} == set(report.run.folders)


def test_errors_are_one_line(made, tmp_path, capsys):
    (made.path / "features.parquet").write_bytes(b"PAR1")
    assert lensd(made.path, "-o", tmp_path / "page.html") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lensd: {made.path}/features.parquet: no Parquet file")
    assert error.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_folders_with_names_that_are_no_text(tmp_path):
    name = os.fsdecode(b"caf\xe9 <script>\x1b[31m-" + b"1" * 12)
    made = make(tmp_path / name, PAIRS, seed=4)
    made.manifest["input"]["name"] = "</title><script>alert(1)</script>"
    made.write()
    page = tmp_path / "page.html"
    assert lensd(made.path, "-o", page, "--features", 1) == 0
    assert "<script>alert(1)" not in page.read_text()


def test_no_torch_where_no_words_are_wanted(tmp_path):
    make(tmp_path / f"a-{'1' * 12}", 3).write()
    program = (
        "import sys\n"
        "from daemon.cli import main\n"
        f"assert main(['report', {str(tmp_path)!r}, '-o', {str(tmp_path / 'page.html')!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'sae_lens', 'transformer_lens'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def health(made):
    made.write()
    study = open_study([made.path.parent])
    return health_of(study, count_activations(study))


def test_health_is_weighted_over_folders_and_held_against_the_card(tmp_path):
    first = make(tmp_path / f"a-{'1' * 12}", 30, seed=1)
    second = make(tmp_path / f"b-{'2' * 12}", 90, seed=2)
    for made, l0, fvu in ((first, 10.0, 0.1), (second, 50.0, 0.9)):
        for entry in made.manifest["saes"]:
            entry |= {"mean_l0": l0, "fvu": fvu, "card": {"mean_l0": 5.0, "fvu": 0.1}}
        made.write()
    one, _ = health(second)
    assert one.mean_l0 == pytest.approx((10 * 30 + 50 * 90) / 120)
    assert one.fvu == pytest.approx((0.1 * 30 + 0.9 * 90) / 120)
    assert (one.card_l0, one.card_fvu) == (5.0, 0.1)
    assert [warning.split(" is ")[0] for warning in one.warnings] == ["Mean L0", "FVU"]
    second.manifest["saes"][0]["fvu"] = None
    assert health(second)[0].fvu is None


def test_the_bundled_dictionaries_are_held_against_the_demo(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 70, seed=1)
    made.manifest["saes"][0] |= {
        "weights_sha256": "fc1826cc61e6212a0e1e3350e27885f56df858fd3a2b793b724574c5f852f37e",
        "mean_l0": 40.0,
        "fvu": 0.3,
    }
    (low, _) = health(made)
    assert [warning.split(";")[0] for warning in low.warnings] == ["Mean L0 is 40", "FVU is 0.3"]
    made.manifest["config"]["analysis"]["positions"] = "mean"  # of which the demo says nothing
    assert health(made)[0].warnings == ()
    made.manifest["config"]["analysis"]["positions"] = "last"
    made.manifest["saes"][0] |= {"mean_l0": 112.3, "fvu": 0.112}
    assert health(made)[0].warnings == ()


def test_rejects_are_counted_by_reason(made):
    reasons = ["text_too_long", "missing_field", "text_too_long"]
    lines = [json.dumps({"record_index": 900 + n, "reason": reason}) for n, reason in enumerate(reasons)]
    (made.path / "rejects.jsonl").write_text("\n".join(lines) + "\n")
    made.manifest |= {"rejects": 3, "records": PAIRS + 3}
    made.write()
    assert reject_reasons(open_study([made.path])) == (("text_too_long", 2), ("missing_field", 1))
    run = report_of(made.path).run
    assert (run.samples, run.rejects) == (PAIRS, 3)
    for content in ("\n".join(lines[:2]), "\n".join([*lines[:2], "{"]), ""):
        (made.path / "rejects.jsonl").write_text(content)
        assert lensd(made.path, "-o", made.path / "report.html") == 2


@pytest.mark.slow
def test_a_tiny_models_outbox_from_run_to_page(tmp_path):
    small = tiny.make_tiny(tmp_path)
    toml = tmp_path / "lensd.toml"
    toml.write_text(small.toml() + "[inbox]\nsettle_seconds = 0\n")
    (tmp_path / "inbox").mkdir()
    tiny.write_json(tmp_path / "inbox" / "a.json", tiny.contrast_records(60))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for args in (["run", "--config", toml, "--once"], ["report", "outbox", "--by", "source"]):
        result = subprocess.run(
            [sys.executable, "-m", "daemon.cli", *map(str, args)],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if args[0] == "run":
            assert result.returncode == 0, result.stderr
    assert result.returncode == 2
    assert "--by source: 1 different value," in result.stderr
    report = report_of(tmp_path / "outbox")
    assert report.details
    assert all(detail.promotes and not detail.words_missing for detail in report.details)
    metrics = pd.read_parquet(next((tmp_path / "outbox").glob("a-*")) / "metrics.parquet")
    assert report.n_pairs == len(metrics) == 60
    for detail in report.details[:5]:
        for text in detail.examples[0].texts:
            assert "".join(token.text for token in text.tokens).endswith(
                ("1", "2", "3", "4", "5", "6", "7", "8", "9", "0")
            )
            peaks = [token.activation for token in text.tokens if token.is_peak]
            assert peaks == ([pytest.approx(text.activation)] if text.activation > 0 else [])
    assert all(math.isfinite(one.fvu) for one in report.run.dictionaries)
    assert lensd(tmp_path / "outbox", "-o", tmp_path / "page.html", "--features", 5) == 0
