from __future__ import annotations

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from rich.console import Console

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model.trie import build_trie
from daemon.tools.bench import AUTO, BARE, BenchReport, VariantReport, bench, chosen
from daemon.tools.bench_report import plot, print_bench, recommendations
from daemon.tools.bench_worker import RATE, BaselineWorker, LensdWorker, Measured, Workload
from daemon.tools.limit import ProductRate, Products, Work
from tests.support import tiny
from tests.support.engines import loaded
from tests.support.families import save_family

EMPTY_REPORT = BenchReport(
    machine="m",
    cores=2,
    device="cpu",
    model="tiny",
    dtype="float32",
    positions="last",
    engine="packed",
    files=(),
    samples=1,
    text_tokens=1,
    unique_tokens=1,
    multiply_adds=1,
    repetitions=1,
    max_batch_tokens=64,
    torch_product_flops=1.0,
    fastest_product_flops=1.0,
    fraction_of_fastest=1.0,
    fraction_of_torch=1.0,
    pipeline_over_bare=1.0,
    over={},
    variants=(),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny.make_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_work_is_every_product_of_every_token_once(family, tmp_path):
    sae = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    model, saes = loaded(save_family(tmp_path / family, family), [sae], torch.float32)
    work = Work.of(model, saes)
    texts = [[1, 2, 3], [1, 2, 4, 5]]
    nodes = {tuple(text[: n + 1]) for text in texts for n in range(len(text))}
    weights = sum(
        parameter.numel()
        for layer in (0, 1)
        for name, parameter in model.model.named_parameters()
        if f".{layer}." in name and parameter.ndim == 2
    )
    attended = sum(len(node) for node in nodes)  # keys, itself included
    expected = len(nodes) * weights + 2 * 2 * tiny.D_MODEL * attended + 2 * tiny.D_MODEL * tiny.D_SAE
    assert work.multiply_adds(build_trie(texts), readings=2) == expected
    rate = Products(work, torch.float32, "cpu").rate()
    assert rate.fastest == max(rate.torch, rate.packed) > 0


class FakeWorker:
    """Answers what a worker would, and raises at a question."""

    def __init__(self, hello: object, fail_at: int | None = None) -> None:
        self._hello, self._fail_at, self._asked = hello, fail_at, 0

    def receive(self) -> object:
        return self._hello

    def ask(self, question: str) -> object:
        self._asked += 1
        if self._asked == self._fail_at:
            raise KeyboardInterrupt
        return ProductRate(1e9, 2e9) if question == RATE else Measured(self._asked, 10, 100, 1 << 20)


@pytest.mark.parametrize(("fail_at", "repetitions"), [(12, 2), (5, None)])
def test_what_is_interrupted_reports_the_repetitions_that_are_whole(
    fail_at, repetitions, monkeypatch, capsys
):
    hello = ((BARE, AUTO), Workload(10, 100, 50, 1000, 64, "packed", "cpu"))
    workers = {
        LensdWorker: FakeWorker(hello, fail_at),  # three questions a round
        BaselineWorker: FakeWorker(("sequential",)),
    }
    monkeypatch.setattr("daemon.tools.bench.worker", lambda kind, *_: contextlib.nullcontext(workers[kind]))
    if repetitions is None:
        with pytest.raises(KeyboardInterrupt):
            bench(load_config(None, {}), [])
        return
    report = bench(load_config(None, {}), [])
    assert report.repetitions == repetitions
    assert report.variant(AUTO).seconds == 7.5  # of the answers to questions 6 and 9
    said = capsys.readouterr().err
    assert "repetition 2 of 5" in said
    assert "interrupted: what follows is of 2 whole repetitions" in said


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["last", "all"])
def test_bench_measures_every_variant_beside_the_others(positions, made, tmp_path):
    toml = tmp_path / "lensd.toml"
    toml.write_text(made.toml())
    config = load_config(
        toml, {}, {"batching.max_batch_tokens": 64, "analysis.positions": positions, "model.dtype": "float32"}
    )
    file = tiny.write_json(tmp_path / "some.json", tiny.contrast_records(12))
    report = bench(config, [file], repetitions=2, batch_sizes=(3,), baseline_samples=2)
    names = {variant.name for variant in report.variants}
    idiomatic = {"idiomatic 16"} if positions == "all" else {"original", "idiomatic 32", "idiomatic 96"}
    assert names == {"sequential", BARE, "lensd 3", AUTO} | idiomatic
    assert report.repetitions == 2
    assert report.unique_tokens < report.text_tokens
    assert report.variant(AUTO).samples == 12
    assert report.variant("sequential").samples == 2
    assert all(variant.seconds > 0 and variant.peak_bytes > 0 for variant in report.variants)
    json.dumps(report.as_json())
    print_bench(console := Console(record=True), report)
    shown = console.export_text()
    assert re.search(r"Recommended with \d+ GiB on cpu: max_batch_(samples = 3|tokens = 64) ", shown), shown
    plot(report, tmp_path / "bench.png")
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_an_unknown_baseline_is_named_with_those_there_are():
    there_are = ["sequential", "original", "idiomatic 32"]
    assert chosen(there_are, ["original"]) == ["sequential", "original"]
    with pytest.raises(ConfigError, match=r"--baselines: no 'vllm' here: sequential, original, idiomatic"):
        chosen(there_are, ["original", "vllm"])


def variant(name: str, rate: float, gib: float) -> VariantReport:
    return VariantReport(name, 1, 1.0, rate, rate, 1.0, int(gib * 2**30))


def test_the_recommendation_is_the_fastest_that_memory_holds():
    variants = (
        variant("sequential", 99.0, 0.1),
        variant("lensd 4", 10.0, 1.5),
        variant("lensd 32", 20.0, 2.5),
        variant(AUTO, 20.3, 3.5),
    )
    report = dataclasses.replace(EMPTY_REPORT, variants=variants, max_batch_tokens=512)
    assert report.recommended(2**30) is None
    assert report.recommended(2 * 2**30) == variants[1]
    assert report.recommended() == variants[2]
    assert recommendations(report) == [
        "Recommended with 2 GiB on cpu: max_batch_samples = 4 (10.0 samples/s)",
        "Recommended with 3 GiB on cpu: max_batch_samples = 32 (20.0 samples/s)",
    ]
