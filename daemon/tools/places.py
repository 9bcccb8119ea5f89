"""`python -m daemon.tools.places`: packed runs against padded ones where dictionaries read inside a layer.

The bundled model on random tokens, with random dictionaries at three layers; engine and analysis, in turn. A
padded batch is what TransformerLens runs. Reads no file of the user's and writes none.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import structlog
import torch

from daemon.analysis.column_inputs import StudySettings
from daemon.analysis.geometry import DecoderRows
from daemon.batching.batcher import Batcher
from daemon.executor.runner import BatchRunner
from daemon.model.buffers import keep_memory, lasting
from daemon.model.encoding import FusedEncoder, jumprelu
from daemon.model.engine import Engine
from daemon.model.loading import LoadedModel, load_model
from daemon.model.location import BUNDLED, locate_model
from daemon.model.onednn import product
from daemon.model.padded_engine import PaddedEngine
from daemon.model.plain_hooks import PlainHooks
from daemon.model.sae import LoadedSae
from daemon.model.smollm2 import default_cache_dir
from daemon.model.trie_engine import TrieEngine
from daemon.model_info import SaeInfo
from daemon.recipes import CONTRAST_RECIPE
from daemon.records import Batch, Sample, TokenizedSample
from daemon.tools.samples import all_batches, one_part
from daemon.tools.shape import contrast_samples

LAYERS = (7, 15, 22)
D_SAE, L0 = 4608, 50
STUDIES = {  # what is read, and what is predicted
    "resid_post": ("hook_resid_post", "hook_resid_post"),
    "mlp_out": ("hook_mlp_out", "hook_mlp_out"),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}
CALIBRATION = (3, 64)  # texts and their tokens
ENGINES: dict[str, Callable[..., Engine]] = {"packed": TrieEngine, "padded": PaddedEngine}


def random_saes(model: LoadedModel, study: str) -> list[LoadedSae]:
    """JumpReLU dictionaries whose thresholds let L0 features fire on random tokens."""
    read, written = STUDIES[study]
    places = [(f"blocks.{layer}.{read}", f"blocks.{layer}.{written}") for layer in LAYERS]
    chance = torch.Generator().manual_seed(1)
    texts = torch.randint(model.vocabulary, CALIBRATION, generator=chance).tolist()
    plain = PlainHooks(model.model, [place for place, _ in places], model.vocabulary)
    values = [plain.read(text) for text in texts]
    return [
        random_sae(place, place_out, torch.cat([of_text[place] for of_text in values]))
        for place, place_out in places
    ]


def random_sae(hook_name: str, hook_name_out: str, x: torch.Tensor) -> LoadedSae:
    """x (N, d_in) are the model's values there."""
    d_in, layer = x.shape[1], int(hook_name.split(".")[1])
    W_dec = torch.randn(D_SAE, d_in, generator=torch.Generator().manual_seed(layer))
    W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True)
    W_enc = W_dec.T.contiguous()
    sae = SimpleNamespace(
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=W_dec.new_zeros(D_SAE),
        b_dec=W_dec.new_zeros(d_in),
        threshold=(x.float() @ W_enc).topk(L0 + 1, dim=-1).values[:, -1].median().expand(D_SAE).contiguous(),
        dtype=torch.float32,
        cfg=SimpleNamespace(apply_b_dec_to_input=False, normalize_activations="none"),
    )
    info = SaeInfo(
        hook_name=hook_name,
        hook_name_out=hook_name_out,
        layer=layer,
        d_in=d_in,
        d_sae=D_SAE,
        d_out=d_in,
        architecture="jumprelu" if hook_name == hook_name_out else "jumprelu_transcoder",
        source="random",
        weights_sha256="",
    )
    return LoadedSae(info, sae, center_residual=False)


def runner_of(study: str, engine: str) -> BatchRunner:
    """With a model of its own: engines change it."""
    with lasting():
        model = load_model(locate_model(BUNDLED, default_cache_dir()), device="cpu", dtype=torch.float32)
        saes = random_saes(model, study)
        encoders = [
            FusedEncoder(entry, DecoderRows.of(entry.W_dec), jumprelu, product, "cpu") for entry in saes
        ]
        made = ENGINES[engine](model, saes, encoders, "last")
        return BatchRunner(made, StudySettings(0, 0.1, 8, 10, 50, "last"))


def batches(samples: int, tokens: int, *, shares_prefixes: bool) -> list[Batch]:
    tokenized = [
        TokenizedSample(Sample(number, f"s{number}", None, None, None, (), None, 0), texts)
        for number, texts in enumerate(contrast_samples(samples, 40_000))
    ]
    return all_batches(
        Batcher(tokens, shares_prefixes=shares_prefixes), [one_part(CONTRAST_RECIPE, tokenized)]
    )


def seconds(runner: BatchRunner, planned: Sequence[Batch]) -> tuple[float, float]:
    """By the clock, and of all cores together."""
    began, used = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        for _ in runner.runs(batch.inputs for batch in planned):
            pass
    return time.perf_counter() - began, time.process_time() - used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=STUDIES, action="append", help="only this one; may be repeated")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--max-batch-tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    keep_memory()
    for study in args.study or STUDIES:
        runners = {engine: runner_of(study, engine) for engine in ENGINES}
        planned = {
            engine: batches(args.samples, args.max_batch_tokens, shares_prefixes=engine == "packed")
            for engine in ENGINES
        }
        taken: dict[str, list[tuple[float, float]]] = {engine: [] for engine in ENGINES}
        for engine, runner in runners.items():
            seconds(runner, planned[engine][:1])  # warms up
        for number in range(args.rounds):
            for engine in list(ENGINES)[:: 1 if number % 2 else -1]:
                taken[engine].append(seconds(runners[engine], planned[engine]))
        rates = {
            engine: [args.samples / statistics.median(kind) for kind in zip(*of_one, strict=True)]
            for engine, of_one in taken.items()
        }
        line: dict[str, object] = {"study": study}
        for engine, (by_clock, by_core) in rates.items():
            line |= {
                f"{engine}_per_second": round(by_clock, 1),
                f"{engine}_per_cpu_second": round(by_core, 2),
            }
        times = [packed / padded for packed, padded in zip(rates["packed"], rates["padded"], strict=True)]
        line |= {"times": round(times[0], 2), "times_by_cpu": round(times[1], 2)}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
