"""`lensd verify --bits` on tiny models: what it finds the same, and that it finds what is not."""

from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console

from daemon.cli import main
from daemon.config import load_config
from daemon.errors import FileError
from daemon.model.attention import BlockPlan
from daemon.native.rmsnorm_rope_attention import routines
from daemon.tools import bits
from daemon.tools.bits import BitsReport, groupings, verify_bits
from daemon.tools.report import print_bits
from tests.support import tiny
from tests.support.effort import examples

SAMPLES = examples(30)

needs_compiler = pytest.mark.skipif(routines() is None, reason="lensd was installed without a C compiler")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tiny.write_json(tmp_path_factory.mktemp("file") / "some.json", tiny.contrast_records(SAMPLES))


def found(tiny_toml, file, **flags: str) -> BitsReport:
    return verify_bits(load_config(tiny_toml, {}, flags), file, samples=None)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_results_are_the_same_bits_in_batches_of_any_kind(dtype, positions, tiny_toml, file):
    flags = {"model.dtype": dtype, "analysis.positions": positions, "analysis.log_probs": True}
    report = found(tiny_toml, file, **flags)
    assert report.bits == "invariant"
    assert report.passed, report
    assert report.cells > 10 * SAMPLES and report.feature_rows >= SAMPLES
    assert report.layers and not any(layer.tokens for layer in report.layers)


@needs_compiler
def test_sums_that_depend_on_company_are_found_where_they_begin(tiny_toml, file, monkeypatch):
    attend = BlockPlan.attend

    def by_company(self, call):
        return attend(self, call) * (1 + 1e-6 * (len(self.trie) % 7))

    monkeypatch.setattr("daemon.model.fused_layers.fuse_layers", lambda *_: 0)
    monkeypatch.setattr("daemon.model.trie_engine.fuse_layers", lambda *_: 0)
    monkeypatch.setattr(BlockPlan, "attend", by_company)
    report = found(tiny_toml, file, **{"model.dtype": "float32"})
    assert report.bits.startswith("not invariant: blocks.")
    assert not report.passed
    assert next(layer.layer for layer in report.layers if layer.tokens) == 0
    text = printed(report)
    assert "differs" in text and "the first layer that differs: 0" in text


def printed(report: BitsReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_bits(console, report)
    return console.file.getvalue()


def test_every_sample_is_in_each_grouping_once():
    for count in (1, 2, 65, 200):
        for grouping in groupings(count, threads=2):
            assert sorted(number for batch in grouping.batches for number in batch) == list(range(count))


def test_no_number_is_like_no_number_and_like_nothing_else():
    assert bits.same_cell(float("nan"), float("nan"))
    assert not bits.same_cell(float("nan"), 0.0)
    assert not bits.same_cell(1.0, 1.0 + torch.finfo(torch.float64).eps)


def test_a_file_without_a_sample_is_told(tiny_toml, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(FileError):
        found(tiny_toml, tmp_path / "empty.jsonl")


@needs_compiler
def test_the_command_prints_json_and_exits_by_what_it_found(tiny_toml, file, capsys):
    assert main(["verify", str(file), "--bits", "--samples", "5", "--config", str(tiny_toml), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True and report["samples"] == 5
