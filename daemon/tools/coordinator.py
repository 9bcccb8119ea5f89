"""`python -m daemon.tools.coordinator FILE`: what a daemon pays for each sample that its workers compute.

Everything runs as it does in service, but for the model: workers answer at once with random results of the
right size. So many samples are drained, then three times as many, each in a process of its own; the
difference of their CPU seconds is what the samples cost, without the start. Reports it per 1,000 samples and
per MB of results, and of which threads it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from daemon.analysis.columns import analysis_columns
from daemon.config import Config, load_config
from daemon.model_info import ModelInfo, SaeInfo
from daemon.records import BatchResult, FeatureRows, LayerSums, Positions, SampleBatch
from daemon.tools.samples import numbered

if TYPE_CHECKING:
    from daemon.model_wiring import Compute

Kind = Literal["local", "ray"]


@dataclasses.dataclass(frozen=True, slots=True)
class ResultShape:
    """The size of results: dictionaries by layer, and how many features are active at a position."""

    d_model: int
    d_sae: int
    layers: tuple[int, ...]
    l0: int

    @property
    def info(self) -> ModelInfo:
        saes = tuple(
            SaeInfo(hook, hook, layer, self.d_model, self.d_sae, self.d_model, "jumprelu", "random", "")
            for layer in self.layers
            for hook in [f"blocks.{layer}.hook_resid_post"]
        )
        return ModelInfo(
            "random", "Random", self.d_model, 1 + max(self.layers), "float32", "cpu", "packed", "", saes
        )


SHAPES = {
    "smollm2-135m": ResultShape(576, 2304, (7, 15, 22), 114),
    "gemma-2-2b": ResultShape(2304, 16_384, (5, 12, 20), 70),
}


class RandomEngine:
    """In the place of an engine: a description and nothing to run."""

    shares_prefixes = True
    concurrent = False
    encoders = ()
    preparations = ()

    def __init__(self, info: ModelInfo) -> None:
        self.info = info

    def _refuse(self, *_: object) -> NoReturn:
        raise NotImplementedError("results are random")

    extract = start = finish = _refuse


class RandomRunner:
    """In the place of a `BatchRunner`: results of the right size, made of numbers drawn once."""

    can_overlap = False

    def __init__(self, shape: ResultShape, positions: Positions) -> None:
        self.info = shape.info
        self.engine = RandomEngine(shape.info)
        self._shape = shape
        self._positions = positions
        generator = np.random.Generator(np.random.PCG64(0))
        self._features = np.sort(
            generator.integers(0, shape.d_sae, (4096, shape.l0), dtype=np.uint32), axis=1
        )
        self._values = generator.random((4096, shape.l0), dtype=np.float32)

    def run(self, batch: SampleBatch) -> BatchResult:
        shape, n, n_layers = self._shape, len(batch.samples), len(self._shape.layers)
        texts = [ids for sample in batch.samples for ids in sample.token_ids]
        per_sample = len(batch.recipe.templates)
        counts = np.array([len(ids) if self._positions == "all" else 1 for ids in texts])
        of_text = np.repeat(np.arange(len(texts)), counts * n_layers)
        layer = np.concatenate([np.repeat(np.arange(n_layers), count) for count in counts])
        position = np.concatenate(
            [
                np.tile(np.arange(count) if self._positions == "all" else [len(ids) - 1], n_layers)
                for ids, count in zip(texts, counts, strict=True)
            ]
        )
        starts = np.cumsum([0, *map(len, texts)])[:-1]
        token_id = np.fromiter(itertools.chain.from_iterable(texts), np.int64)[starts[of_text] + position]
        drawn = np.arange(len(of_text)) % len(self._features)
        ones = np.ones(n)
        return BatchResult(
            columns={
                column.name: self._column(column.kind, n)
                for column in analysis_columns(shape.info.names, batch.recipe)
            },
            features=FeatureRows(
                sample_row=of_text // per_sample,
                text=of_text % per_sample,
                layer=layer,
                position=position,
                token_id=token_id,
                offsets=np.arange(len(of_text) + 1) * shape.l0,
                indices=self._features[drawn].reshape(-1),
                values=self._values[drawn].reshape(-1),
            ),
            layers=(LayerSums(np.full(n, per_sample), ones, ones, 2 * ones, np.ones((n, shape.d_model))),)
            * n_layers,
            forward_seconds=0.0,
            sae_seconds=0.0,
            analysis_seconds=0.0,
            computed_tokens=sum(map(len, texts)),
        )

    @staticmethod
    def _column(kind: str, n: int) -> np.ndarray[Any, Any]:
        if kind == "float":
            return np.linspace(0, 1, n)
        return np.zeros(n, dtype=np.int64) if kind == "int" else np.full(n, "prolate", dtype=object)


def load_random(shape: ResultShape, config: Config) -> Compute:
    """The configured model's tokenizer, and a runner of random results."""
    from daemon.model.loading import load_tokenizer
    from daemon.model.location import locate_model
    from daemon.model.smollm2 import default_cache_dir
    from daemon.model_wiring import Compute, read_rules
    from daemon.source.tokenizer import Tokenizer

    tokenizer = load_tokenizer(locate_model(config.model.name, default_cache_dir(), config.model.revision))
    return Compute(
        engine=RandomEngine(shape.info),
        runner=RandomRunner(shape, config.analysis.positions),  # type: ignore[arg-type]  # it runs like one
        tokenizer=Tokenizer(
            tokenizer,
            prepend_bos=True,
            max_text_tokens=config.batching.max_text_tokens,
            context=None,
            vocabulary=len(tokenizer),
            rules=read_rules(config),
        ),
        max_batch_tokens=4096,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Cost:
    """The CPU time and output of a drain."""

    samples: int
    cpu_seconds: float
    output_bytes: int

    def minus(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(mine - its for mine, its in pairs))


def drain(shape: str, positions: Positions, kind: Kind, file: Path, samples: int) -> Cost:
    """Drain a file of so many samples, made of those of `file`, in this process."""
    from daemon.service import serve

    with tempfile.TemporaryDirectory(prefix="lensd-coordinator-") as folder:
        inbox = Path(folder, "inbox")
        inbox.mkdir()
        (inbox / "all.jsonl").write_text("".join(numbered(file, samples)))
        flags = {
            "inbox.path": str(inbox),
            "inbox.settle_seconds": 0,
            "outbox.path": f"{folder}/outbox",
            "http.enabled": False,
            "analysis.positions": positions,
            "executor.kind": kind,
            "executor.workers": 1,
        }
        serve(load_config(None, {}, flags), once=True, load=partial(load_random, SHAPES[shape]))
        used = resource.getrusage(resource.RUSAGE_SELF)
        written = sum(path.stat().st_size for path in Path(folder, "outbox").rglob("*.parquet"))
    return Cost(samples, used.ru_utime + used.ru_stime, written)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--positions", choices=("last", "all"), default="last")
    parser.add_argument("--executor", choices=("local", "ray"), default="ray")
    parser.add_argument(
        "--once", action="store_true", help="drain once, in this process; print its cost as JSON"
    )
    args = parser.parse_args()
    if args.once:
        cost = drain(args.shape, args.positions, args.executor, args.file, args.samples)
        sys.stdout.write(json.dumps(dataclasses.asdict(cost)) + "\n")
        return 0
    few, many = (measured(args, times * args.samples) for times in (1, 3))
    cost = many.minus(few)
    sys.stdout.write(
        f"{args.executor}, {args.shape}, positions {args.positions}:"
        f" {1000 * cost.cpu_seconds / cost.samples:.3f} CPU seconds for 1,000 samples,"
        f" {1e6 * cost.cpu_seconds / cost.output_bytes:.3f} for a MB of results"
        f" ({cost.output_bytes / cost.samples / 1000:.1f} kB a sample)\n"
    )
    return 0


def measured(args: argparse.Namespace, samples: int) -> Cost:
    """A drain in a process of its own."""
    command = [sys.executable, "-m", "daemon.tools.coordinator", str(args.file), "--once"]
    command += ["--samples", str(samples), "--shape", args.shape]
    command += ["--positions", args.positions, "--executor", args.executor]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return Cost(**json.loads(process.stdout.splitlines()[-1]))


if __name__ == "__main__":
    sys.exit(main())
