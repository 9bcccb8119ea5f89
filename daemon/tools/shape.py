"""`python -m daemon.tools.shape`: what batches cost on a model of a given shape, its weights random.

For an accelerator where no hub can be reached: the arithmetic of a model does not depend on what it learned.
The thresholds of the dictionaries are set for the number of active features that published ones have. Reports
tokens a second, the share of the product rate that they reach, and the share of the time that the device
waits. Reads no file and writes none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from daemon.analysis.column_inputs import StudySettings
from daemon.analysis.geometry import DecoderRows
from daemon.batching.batcher import Batcher
from daemon.devices import on_cuda
from daemon.executor.runner import BatchRunner
from daemon.model.compiled_layers import can_compile
from daemon.model.encoding import FusedEncoder, can_split, jumprelu
from daemon.model.loading import LoadedModel
from daemon.model.location import ModelLocation
from daemon.model.onednn import product, split_product
from daemon.model.sae import LoadedSae
from daemon.model.trie import build_trie
from daemon.model.trie_engine import TrieEngine
from daemon.model.trunk import Place, Trunk
from daemon.model_info import SaeInfo
from daemon.recipes import CONTRAST_RECIPE, PLAIN_RECIPE, Recipe
from daemon.records import Batch, Positions, Sample, TokenizedSample
from daemon.tools.limit import Products, Work, best_seconds
from daemon.tools.samples import all_batches, one_part

CALIBRATION_TEXTS = 32
TRIES = 4  # the first of which warms up


@dataclass(frozen=True, slots=True)
class Shape:
    """A Gemma-2 decoder and the dictionaries on it."""

    config: dict[str, int]  # all else is as in Gemma-2-2B
    sae_layers: tuple[int, ...]
    d_sae: int
    l0: int  # active features that the thresholds are set for


SHAPES = {
    "gemma-2-2b": Shape(
        {"vocab_size": 32_768},  # no logits are computed: a larger one would only fill memory
        sae_layers=(5, 12, 20),
        d_sae=16_384,
        l0=70,
    ),
    "tiny": Shape(
        {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "intermediate_size": 64,
            "sliding_window": 64,
            "vocab_size": 256,
        },
        sae_layers=(0, 2),
        d_sae=128,
        l0=10,
    ),
}


def random_model(shape: Shape, device: str, dtype: torch.dtype) -> LoadedModel:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(**shape.config, attn_implementation="eager")
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: Any = Gemma2ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    return LoadedModel(
        model=model,
        tokenizer=None,
        location=ModelLocation("random", "random", None),
        architecture=type(model).__name__,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        vocabulary=config.vocab_size,
        context=None,
        dtype=dtype,
        device=device,
    )


def random_saes(shape: Shape, model: LoadedModel) -> list[LoadedSae]:
    """JumpReLU dictionaries in float32, with nothing active until `calibrate`."""
    d_in, d_sae = model.d_model, shape.d_sae
    saes = []
    for layer in shape.sae_layers:
        chance = torch.Generator(model.device).manual_seed(layer)
        W_dec = torch.randn(d_sae, d_in, generator=chance, device=model.device)
        W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True)
        sae = SimpleNamespace(
            W_enc=W_dec.T.contiguous(),
            W_dec=W_dec,
            b_enc=W_dec.new_zeros(d_sae),
            b_dec=W_dec.new_zeros(d_in),
            threshold=W_dec.new_full((d_sae,), torch.inf),
            dtype=torch.float32,
            cfg=SimpleNamespace(apply_b_dec_to_input=False, normalize_activations="none"),
        )
        hook_name = f"blocks.{layer}.hook_resid_post"
        info = SaeInfo(
            hook_name=hook_name,
            hook_name_out=hook_name,
            layer=layer,
            d_in=d_in,
            d_sae=d_sae,
            d_out=d_in,
            architecture="jumprelu",
            source="random",
            weights_sha256="",
        )
        saes.append(LoadedSae(info, sae, center_residual=False))
    return saes


def engine_of(
    model: LoadedModel, saes: Sequence[LoadedSae], positions: Positions, l0: int, compiles: bool
) -> TrieEngine:
    calibrate(model, saes, l0)
    encoders = [
        FusedEncoder(
            entry,
            DecoderRows.of(entry.W_dec),
            jumprelu,
            split_product if can_split(entry, model.dtype) else product,
            entry.W_dec.device,
        )
        for entry in saes
    ]
    return TrieEngine(model, saes, encoders, positions, compiles=compiles)


def calibrate(model: LoadedModel, saes: Sequence[LoadedSae], l0: int) -> None:
    """Set each dictionary's threshold where that many features of random texts are above it."""
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(model.vocabulary, (CALIBRATION_TEXTS, 64), generator=chance).to(model.device)
    trunk = Trunk(model.model, [Place(entry.info.layer, "out") for entry in saes])
    with torch.inference_mode():
        positions = torch.arange(tokens.shape[1], device=model.device).expand_as(tokens)
        for entry, x in zip(saes, trunk.run(tokens, positions, None, None), strict=True):
            pre_acts = x.to(entry.sae.dtype) @ entry.sae.W_enc
            entry.sae.threshold.fill_(pre_acts.topk(l0 + 1, dim=-1).values[:, -1].median().clamp(min=0))


Texts = tuple[tuple[int, ...], ...]  # of one sample, in tokens


def contrast_samples(n: int, vocabulary: int) -> list[Texts]:
    """A prompt of about twenty tokens, and that with two endings."""
    chance = np.random.Generator(np.random.PCG64(2))
    samples: list[Texts] = []
    for _ in range(n):
        prompt, true, false = (
            tuple(chance.integers(1, vocabulary, int(length)).tolist())
            for length in chance.integers((12, 2, 2), (30, 8, 8))
        )
        prompt = (0, *prompt)
        samples.append((prompt, prompt + true, prompt + false))
    return samples


def documents(n: int, vocabulary: int) -> list[Texts]:
    """Texts of 100 to 600 tokens."""
    chance = np.random.Generator(np.random.PCG64(3))
    return [
        ((0, *chance.integers(1, vocabulary, int(chance.integers(100, 600))).tolist()),) for _ in range(n)
    ]


def batches(samples: Sequence[Texts], recipe: Recipe, tokens: int) -> list[Batch]:
    tokenized = [
        TokenizedSample(Sample(number, f"s{number}", None, None, None, (), None, 0), texts)
        for number, texts in enumerate(samples)
    ]
    return all_batches(Batcher(tokens, shares_prefixes=True), [one_part(recipe, tokenized)])


def run_all(results_of: Callable[[Any], Iterable[object]], items: Sequence[object]) -> None:
    """Have all results made, and keep none."""
    for _ in results_of(items):
        pass


def waiting_share(run: Callable[[], None]) -> tuple[float, str]:
    """The share of the time in which a CUDA device runs no kernel; and which kernels take the rest."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    kernels = [event for event in profiler.events() or [] if event.device_type.name == "CUDA"]
    spans = sorted((kernel.time_range.start, kernel.time_range.end) for kernel in kernels)
    table = str(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25))
    return round(1 - covered(spans) / 1e6 / seconds, 3), table


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """How much of a line its sorted spans cover; they may overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@dataclass(frozen=True, slots=True)
class Case:
    """Texts of one kind, and what is read of them."""

    name: str
    positions: Positions
    recipe: Recipe
    samples: Callable[[int, int], list[Texts]]  # how many, of which vocabulary
    per_document: int  # samples for each document of the other case


CASES = (
    Case("contrast, last", "last", CONTRAST_RECIPE, contrast_samples, 8),
    Case("documents, all", "all", PLAIN_RECIPE, documents, 1),
)


def measure(
    case: Case, shape: Shape, model: LoadedModel, sizes: Sequence[int], n: int, compiles: bool
) -> Iterator[tuple[dict[str, Any], str]]:
    """Measure each size of batch; yields figures, and the kernels of a CUDA device. Changes the model."""
    saes = random_saes(shape, model)
    work = Work.of(model, saes)
    rate = 2 * Products(work, model.dtype, model.device).rate().fastest
    samples = case.samples(case.per_document * n, model.vocabulary)
    engine = engine_of(model, saes, case.positions, shape.l0, compiles)
    runner = BatchRunner(engine, StudySettings(0, 0.1, 8, 10, 50, case.positions))
    for tokens in sizes:
        planned = batches(samples, case.recipe, tokens)
        with torch.inference_mode():
            figures, kernels = measure_batches(case, runner, engine, work, rate, planned)
        yield {"case": case.name, "max_batch_tokens": tokens, **figures}, kernels


def measure_batches(
    case: Case, runner: BatchRunner, engine: TrieEngine, work: Work, rate: float, planned: Sequence[Batch]
) -> tuple[dict[str, Any], str]:
    """Run the batches a few times; `rate` is that of products, in operations a second."""
    device = engine.info.device
    texts = [[ids for sample in batch.samples for ids in sample.token_ids] for batch in planned]
    packed = [build_trie(of_batch) for of_batch in texts]
    readings = [len(one) - 1 if case.positions == "all" else len(one.leaf) for one in packed]
    flops = 2 * sum(map(work.multiply_adds, packed, readings))
    flops_of_forward = 2 * sum(work.multiply_adds(one, 0) for one in packed)
    samples, unique = sum(len(batch.entries) for batch in planned), sum(map(len, packed))
    extraction = best_seconds(partial(run_all, partial(map, engine.start), texts), device, TRIES)
    whole_run = partial(run_all, runner.runs, [batch.inputs for batch in planned])
    whole = best_seconds(whole_run, device, TRIES)
    l0 = float(engine.extract(texts[0]).layers[0].acts.counts.double().mean())
    waits, kernels = waiting_share(whole_run) if on_cuda(device) else (None, "")
    figures = {
        "batches": len(planned),
        "samples": samples,
        "unique_tokens": unique,
        "l0": round(l0, 1),
        "product_tflops": round(rate / 1e12, 1),
        "unique_tokens_per_second": round(unique / whole),
        "samples_per_second": round(samples / whole, 1),
        "utilisation_of_forward": round(flops_of_forward / extraction / rate, 3),
        "utilisation": round(flops / whole / rate, 3),
        "device_waits": waits,
    }
    return figures, kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="gemma-2-2b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-batch-tokens", default="8192,16384,32768", help="several, with commas")
    parser.add_argument("--no-compile", action="store_true", help="run the layers as they are")
    parser.add_argument("--documents", type=int, default=512, help="and eight times as many contrast samples")
    parser.add_argument("--only", choices=("contrast", "documents"), default="", help="one of the two cases")
    args = parser.parse_args()
    sizes = [int(size) for size in args.max_batch_tokens.split(",")]
    dtype = getattr(torch, args.dtype)
    compiles = can_compile(args.device) and not args.no_compile
    shape = SHAPES[args.shape]
    for case in (case for case in CASES if case.name.startswith(args.only)):
        model = random_model(shape, args.device, dtype)
        for line, kernels in measure(case, shape, model, sizes, args.documents, compiles):
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
            sys.stderr.write(kernels + "\n")


if __name__ == "__main__":
    main()
