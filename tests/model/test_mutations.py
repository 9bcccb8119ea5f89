"""Random damage to models, dictionaries and configurations: one line, or the numbers of plain libraries.

LENSD_TEST_MUTATIONS and LENSD_TEST_SEED set how many and which; with a seed of its own, each case repeats
alone.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model_wiring import load_engine, tokenizer_of
from tests.model.mutations import Case, mutate
from tests.support import tiny

MUTATIONS = int(os.environ.get("LENSD_TEST_MUTATIONS", "200"))
SEED = int(os.environ.get("LENSD_TEST_SEED", "0"))
AT_A_TIME = 20  # in a test
LONGEST_LINE = 500
TEXTS = ["The number after one is 2", "b", "zzz aé\n"]
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> list[tuple[Path, list[Path]]]:
    """Models of two families, each with dictionaries of several kinds."""
    root = tmp_path_factory.mktemp("valid")
    kinds = [("standard", "blocks.0.hook_resid_post"), ("jumprelu", "blocks.1.hook_resid_post")]
    kinds.append(("topk", "blocks.2.hook_resid_pre"))
    found = []
    for name, save in (("llama", tiny.save_llama), ("gpt2", tiny.save_gpt2)):
        model = save(root / name, n_layers=3)
        for number in (0, 1):
            saes = [
                tiny.save_sae(root / f"{name}-{number}-{kind}", hook, architecture=kind, seed=number)
                for kind, hook in kinds[number : number + 2]
            ]
            found.append((model, saes))
    return found


def copied(folder: Path, rng: random.Random, valid: list[tuple[Path, list[Path]]]) -> Case:
    model, saes = rng.choice(valid)
    shutil.rmtree(folder, ignore_errors=True)
    case = Case(
        model=Path(shutil.copytree(model, folder / "model")),
        saes=[Path(shutil.copytree(sae, folder / f"sae-{number}")) for number, sae in enumerate(saes)],
        toml=folder / "lensd.toml",
    )
    case.toml.write_text(
        tiny.Tiny(case.model, tuple(case.saes)).toml() + "\n[batching]\nmax_batch_tokens = 64\n",
        encoding="utf-8",
    )
    return case


def of_lensd(toml: Path) -> list[tuple[str, list[list[int]], torch.Tensor, torch.Tensor]]:
    """Per dictionary its folder, the token ids of each text, what it read there, and what fired."""
    config = load_config(toml, {}, {})
    engine, model = load_engine(config)
    saes = engine.info.saes
    of_way = {sae.prepend_bos: tokenizer_of(model, config, [sae]).encode(TEXTS) for sae in saes}
    longest = of_way.get(True, of_way.get(False, []))
    kept = [
        number
        for number, ids in enumerate(longest)
        if max(ids, default=0) < model.vocabulary and (model.context is None or len(ids) <= model.context)
    ]
    texts = {way: [list(of_way[way][number]) for number in kept] for way in sorted(of_way, reverse=True)}
    if not kept:
        return []
    extraction = engine.extract([ids for of_one in texts.values() for ids in of_one])
    if extraction.not_finite:  # rows that come out as rejects
        return []
    return [
        (info.source, texts[info.prepend_bos], layer.x, layer.acts.to_dense(info.d_sae))
        for info, layer in zip(saes, extraction.layers, strict=True)
    ]


def of_plain_libraries(case: Case, dtype: torch.dtype) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
    """The same by Transformers and SAELens alone, one text at a time: per dictionary's folder the token ids
    of all texts, and a function.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            case.model, dtype=dtype, attn_implementation="eager"
        ).eval()
        tokenizer = AutoTokenizer.from_pretrained(case.model)
        saes = {folder.name: SAE.load_from_disk(folder, dtype="float32") for folder in case.saes}
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    bare = [tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    habit = tokenizer("a").input_ids[:1] == [bos]
    texts = {
        name: [[bos, *ids] if (habit if said is None else said) else ids for ids in bare]
        for name, sae in saes.items()
        for said in [sae.cfg.metadata.prepend_bos]
    }

    def read(name: str, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        sae = saes[name]
        found = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", sae.cfg.metadata.hook_name)
        if found is None:
            return None
        number = int(found[1]) + (found[2] == "post")
        with torch.inference_mode():
            hidden = residual_stream(model, ids)[number][-1].float()
            if (sae.cfg.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
                hidden = hidden - hidden.mean()
            return hidden, sae.encode(hidden[None])[0]

    return texts, dict.fromkeys(saes, read)


def residual_stream(model: Any, ids: list[int]) -> list[torch.Tensor]:
    """(length, d) before the first layer and after each, by hooks: the last is not normed yet."""
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    stream: list[torch.Tensor] = []
    handles = [
        layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: stream.append((args or list(kwargs.values()))[0][0]), with_kwargs=True
        )
    ]
    handles += [
        layer.register_forward_hook(
            lambda _, args, out: stream.append((out if isinstance(out, torch.Tensor) else out[0])[0])
        )
        for layer in layers
    ]
    try:
        model(torch.tensor([ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return stream


def judge(case: Case) -> str:
    """How one case ended: "refused" or "right". Raises AssertionError for anything else."""
    try:
        got = of_lensd(case.toml)
    except ConfigError as error:
        line = str(error)
        assert "\n" not in line and 10 < len(line) < LONGEST_LINE, (
            f"{case.did}: {len(line)} characters: {line}"
        )
        return f"refused: {line}"
    config = load_config(case.toml, {}, {})
    case.model = Path(config.model.name)
    case.saes = [section.path for section in config.sae]
    expected_texts, plain = of_plain_libraries(case, getattr(torch, config.model.dtype))
    for name, texts, x, acts in got:
        assert all(ids in expected_texts[name] for ids in texts), case.did
        for row, ids in enumerate(texts):
            expected = plain[name](name, ids)
            if expected is None:
                continue
            for what, one, other in (
                ("x", x[row].float(), expected[0]),
                ("acts", acts[row].float(), expected[1]),
            ):
                scale = max(1.0, float(other.abs().nan_to_num(0, 0, 0).max()))
                both = torch.isfinite(one) & torch.isfinite(other)
                assert torch.equal(torch.isfinite(one), torch.isfinite(other)) or what == "acts", (
                    f"{case.did}: {what}"
                )
                close = np.allclose(one[both] / scale, other[both] / scale, rtol=0, atol=TOLERANCE)
                assert close, (
                    f"{case.did}: {name} {what} differs by {float((one[both] - other[both]).abs().max())}"
                )
    return "right"


@pytest.mark.parametrize(
    "first",
    [0, *(pytest.param(first, marks=pytest.mark.slow) for first in range(AT_A_TIME, MUTATIONS, AT_A_TIME))],
)
def test_random_damage_ends_in_one_line_or_in_right_numbers(first, valid, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    ends = []
    for number in range(first, min(first + AT_A_TIME, MUTATIONS)):
        rng = random.Random(SEED * 1_000_003 + number)
        case = copied(tmp_path / "case", rng, valid)
        mutate(rng, case)
        try:
            ends.append((case.did, judge(case)))
        except Exception as error:
            raise AssertionError(
                f"mutation {number} of seed {SEED}: {case.did}: {type(error).__name__}: {error}"
            ) from error
    for did, end in ends:
        print(did, "->", end)  # noqa: T201  # shown where a later one fails
    assert any(end == "right" for _, end in ends) or first + AT_A_TIME > MUTATIONS
    assert any(end != "right" for _, end in ends)
