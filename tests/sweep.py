"""Every family, hook point and class of dictionary: the daemon's engine against plain modules and SAELens.

    python -m tests.sweep [--family NAME ...]

Each row is what the daemon would run in float32, or the line by which it refuses. The exit code is 1 if a
number differs by more than TOLERANCE without a word, or if something ends otherwise than by a refusal.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import AutoModelForCausalLM

from daemon.config import Config, load_config
from daemon.errors import ConfigError
from daemon.model.engine import Engine
from daemon.model.plain_hooks import PlainHooks
from daemon.model.plain_trace import Unreachable
from daemon.model_wiring import load_engine
from daemon.tools.oracle import Oracle
from daemon.tools.reference import ReferenceLayer
from tests.support import tiny
from tests.support.engines import random_texts
from tests.support.families import FAMILIES, save_family

TOLERANCE = 1e-5  # of values, relative to their length
NEAR = 1e-4  # of a threshold, as a share of the largest activation: what rounding may move across it
LAYERS = (0, 1, 2)
HOOKS = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "mlp.hook_in",
    "mlp.hook_pre",
    "mlp.hook_post",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
)
REFUSED_HOOKS = (  # of every family, with a reason
    "hook_mlp_in",
    "hook_attn_in",
    "hook_q_input",
    "attn.hook_result",
    "attn.hook_pattern",
)
CLASSES = (
    "standard",
    "jumprelu",
    "topk",
    "gated",
    "transcoder",
    "jumprelu_transcoder",
    "skip_transcoder",
    "jumprelu_skip_transcoder",
)
NORMALISATIONS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)
WHITENED = {*SAE_CLASS_REGISTRY} - {"temporal"} - {kind for kind in CLASSES if "transcoder" in kind}


@dataclass(frozen=True, slots=True)
class Case:
    """One dictionary of random weights."""

    hook: str  # whole, with its layer
    kind: str  # SAELens's architecture
    normalisation: str = "none"
    reshapes: bool = False
    centred: bool = False

    def __str__(self) -> str:
        more = [self.normalisation] * (self.normalisation != "none")
        more += ["reshape"] * self.reshapes + ["centred"] * self.centred
        return " ".join([self.kind, *more])


@dataclass(frozen=True, slots=True)
class Row:
    family: str
    case: Case
    engine: str  # or refused, or error
    difference: float | None  # the worst of x, target, features and reconstruction, relative
    note: str = ""

    @property
    def fails(self) -> bool:
        return self.engine == "error" or (self.difference is not None and not self.difference <= TOLERANCE)

    def __str__(self) -> str:
        found = self.note if self.difference is None else f"{self.difference:.1e} {self.note}"
        mark = "FAILS " if self.fails else ""
        return f"{self.family:20s} {self.case.hook:30s} {self.case!s:34s} {self.engine:8s} {mark}{found}"


def texts() -> list[list[int]]:
    """Of different lengths; some begin alike."""
    a, b, c = random_texts([40, 17, 5])
    return [a, a[:20] + b[1:], c, a[:20], c[:1]]


def save_dictionary(folder: Path, case: Case, widths: dict[str, int], model_name: str) -> Path:
    """A dictionary of which a part of the features fires on what the model has at its hook point."""
    kind, config = SAE_CLASS_REGISTRY[case.kind]
    metadata = SAEMetadata(model_name=model_name, hook_name=case.hook, prepend_bos=True)
    d_in = widths.get(case.hook, tiny.D_MODEL)
    settings = {"d_in": d_in, "d_sae": tiny.D_SAE, "metadata": metadata}
    settings["normalize_activations"] = case.normalisation
    if "transcoder" in case.kind:
        metadata.hook_name_out = f"{case.hook[: case.hook.index('.', 7)]}.hook_resid_post"
        settings |= {"d_out": tiny.D_MODEL, "apply_b_dec_to_input": False}
    if case.kind == "topk":
        settings["k"] = 12
    if case.kind == "temporal":
        settings |= {"n_heads": 2, "bottleneck_factor": 2}
    if case.reshapes:
        settings["reshape_activations"] = "hook_z"
    if case.centred:
        metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny.randomise(kind(config(**settings)), d_in, seed=len(case.hook)).save_model(folder)
    return folder


def widths_of(model: Path, hooks: Sequence[str]) -> dict[str, int]:
    """How many values plain modules have at each hook point that they have."""
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    widths = {}
    for hook in hooks:
        with contextlib.suppress(Unreachable):
            widths[hook] = PlainHooks(plain, [hook], tiny.BOS + 1).read([1, 2, 3])[hook].shape[1]
    return widths


def sweep(family: str, cases: Sequence[Case], folder: Path) -> Iterator[Row]:
    """Several dictionaries at a time; each alone, where one of them is refused."""
    model = save_family(folder / "model", family)
    try:
        widths = widths_of(model, [case.hook for case in cases])
    except ValueError:  # no causal language model
        widths = {}
    by_layer = [[case for case in cases if case.hook.startswith(f"blocks.{layer}.")] for layer in LAYERS]
    name = "google/gemma-3-1b-pt" if family == "gemma3" else "tiny"
    for number, group in enumerate(itertools.zip_longest(*by_layer)):
        together = [case for case in group if case is not None]
        saes = [
            save_dictionary(folder / f"{number}-{place}", case, widths, name)
            for place, case in enumerate(together)
        ]
        rows = list(compare(family, model, together, saes))
        if any(row.difference is None for row in rows) and len(together) > 1:
            for case, sae in zip(together, saes, strict=True):
                yield from compare(family, model, [case], [sae])
        else:
            yield from rows


def compare(family: str, model: Path, cases: Sequence[Case], saes: Sequence[Path]) -> Iterator[Row]:
    """Compare the daemon's values of some dictionaries with plain modules and SAELens."""
    try:
        config = configuration(model, saes)
        engine, _ = load_engine(config)
        differences = differences_of(engine, Oracle(config))
    except ConfigError as error:
        yield from (Row(family, case, "refused", None, str(error)) for case in cases)
    except Exception as error:  # whatever it is, the user would see a traceback
        note = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        yield from (Row(family, case, "error", None, note) for case in cases)
    else:
        for case, (difference, note) in zip(cases, differences, strict=True):
            yield Row(family, case, engine.info.engine, difference, note)


def configuration(model: Path, saes: Sequence[Path]) -> Config:
    toml = model.parent / "lensd.toml"
    toml.write_text(tiny.Tiny(model, tuple(saes)).toml())
    return load_config(toml, {}, {"model.dtype": "float32"})


def differences_of(engine: Engine, oracle: Oracle) -> list[tuple[float, str]]:
    """Per dictionary the worst relative difference of any value, and what is to be said of it."""
    read = texts()
    extraction = engine.extract(read)
    found = []
    for layer, reference, dictionary in zip(
        extraction.layers, oracle.layers(read), oracle.dictionaries, strict=True
    ):
        acts = layer.acts.to_dense(layer.d_sae)
        pairs = [(layer.x, reference.x), (layer.target, reference.target)]
        pairs.append((layer.reconstruction, reference.reconstruction))
        worst = max(relative(got, stacked(expected)) for got, expected in pairs)
        difference, flips = feature_difference(acts, reference)
        note = f"{flips} on a threshold" if flips else ""
        fired = float((acts > 0).double().mean())
        found.append((max(worst, difference), note or ("" if fired else "nothing fires")))
        assert dictionary.layer == layer.layer
    return found


def stacked(arrays: Sequence[object]) -> Tensor:
    return torch.stack([torch.as_tensor(array) for array in arrays])


def relative(got: Tensor, expected: Tensor) -> float:
    """The worst row's difference as a share of its length."""
    difference = (got.double() - expected).norm(dim=-1)
    return float((difference / expected.norm(dim=-1).clamp(min=1e-30)).max())


def feature_difference(acts: Tensor, reference: ReferenceLayer) -> tuple[float, int]:
    """Of the features that fire on both sides; and how many fire on one side by a hair."""
    expected = stacked(reference.feature_acts)
    got = acts.double()
    flipped = (got > 0) != (expected > 0)
    scale = expected.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    near = flipped & (torch.maximum(got, expected) <= NEAR * scale)
    keep = ~near
    return relative(got * keep, expected * keep), int(near.sum())


def family_cases() -> list[Case]:
    """Every hook point at every layer, with the classes of dictionaries in turn."""
    kinds = itertools.cycle(CLASSES)
    cases = [Case(f"blocks.{layer}.{hook}", next(kinds)) for hook in HOOKS for layer in LAYERS]
    return cases + [Case(f"blocks.1.{hook}", "jumprelu_transcoder") for hook in REFUSED_HOOKS]


def class_cases() -> list[Case]:
    """Every class, normalised in every way, where the packed engine reads and where the padded one does."""
    cases = [
        Case(f"blocks.1.{hook}", kind, normalisation)
        for hook in ("hook_resid_post", "hook_mlp_out", "attn.hook_z")
        for kind in SAE_CLASS_REGISTRY
        for normalisation in NORMALISATIONS
        if normalisation != "covariance_whitening" or kind in WHITENED
    ]
    cases += [Case("blocks.1.attn.hook_z", kind, reshapes=True) for kind in ("standard", "jumprelu", "topk")]
    cases += [
        Case(f"blocks.1.{hook}", kind, centred=True)
        for hook in ("hook_resid_pre", "hook_attn_out", "attn.hook_z")
        for kind in ("standard", "jumprelu")
    ]
    return cases


def run(families: Sequence[str], classes_of: Sequence[str], cases: Sequence[Case] | None = None) -> list[Row]:
    """All rows of the families, printed as they come."""
    rows: list[Row] = []
    plan = [(family, cases or family_cases()) for family in families]
    plan += [(family, class_cases()) for family in classes_of]
    for family, of_family in plan:
        with tempfile.TemporaryDirectory() as folder, quiet():
            for row in sweep(family, of_family, Path(folder)):
                rows.append(row)
                print(row, file=sys.__stdout__, flush=True)
    return rows


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries and the daemon have to say."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description="Every family, hook point and class against plain modules.")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="only this one; may be repeated")
    chosen = parser.parse_args().family
    began = time.monotonic()
    rows = run(chosen or list(FAMILIES), [] if chosen else ["llama", "gpt2"])
    counts = {engine: sum(row.engine == engine for row in rows) for engine in ("packed", "padded", "refused")}
    failures = [row for row in rows if row.fails]
    worst = max((row.difference for row in rows if row.difference is not None), default=0.0)
    print(
        f"\n{len(rows)} rows in {time.monotonic() - began:.0f} s: {counts['packed']} packed,"
        f" {counts['padded']} padded, {counts['refused']} refused; the worst difference is {worst:.1e};"
        f" {len(failures)} fail"
    )
    for row in failures:
        print(row)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
