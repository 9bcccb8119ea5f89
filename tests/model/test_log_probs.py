"""Log-probabilities of tokens against plain Hugging Face logits, one text at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model import log_probs
from daemon.model.extraction import Extraction
from daemon.model.float64 import full_precision
from daemon.model_wiring import load_engine
from tests.support import families, tiny
from tests.support.engines import random_texts

CHANGES: dict[str, dict[str, object]] = {  # so that what a family does to its logits shows
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 3.0},
    "gpt2": {"tie_word_embeddings": False},
}


def engine_of(folder: Path, model: Path, *saes: Path, **settings: object) -> Any:
    toml = folder / "lensd.toml"
    toml.write_text(tiny.Tiny(model, saes).toml())
    flags = {"model.dtype": "float64", "analysis.log_probs": True, **settings}
    return load_engine(load_config(toml, {}, flags))[0]


def texts() -> list[list[int]]:
    """Of different lengths; some begin alike, one comes twice, one is a single token."""
    a, b, c = random_texts([40, 17, 5])
    return [a, a[:20] + b[1:], c, a[:20], c[:1], a]


def plain_log_probs(model: Any, text: Sequence[int]) -> np.ndarray:
    """(tokens,) of one text alone; of the first there is none."""
    with torch.inference_mode(), full_precision(torch.float64):
        logits = model(torch.tensor([list(text)]), use_cache=False).logits[0].double()
    found = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(text[1:]).view(-1, 1))
    return np.concatenate(([np.nan], found.flatten().numpy()))


def of_text(extraction: Extraction, text: int) -> np.ndarray:
    assert extraction.log_probs is not None
    return extraction.log_probs.values[extraction.log_probs.texts == text]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite", "mixtral", "gptj", "mamba"])
def test_log_probs_are_those_of_plain_logits(family, tmp_path):
    model = families.save_family(tmp_path / "m", family, **CHANGES.get(family, {}))
    engine = engine_of(tmp_path, model, tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post"))
    assert engine.info.engine == ("padded" if family in ("gptj", "mamba") else "packed")
    assert engine.info.log_probs
    plain = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    extraction = engine.extract(texts())
    for number, text in enumerate(texts()):
        expected = plain_log_probs(plain, text)[1:]
        tolerance = 1e-5 if family == "mamba" else 1e-9  # whose own logits are float32
        np.testing.assert_allclose(of_text(extraction, number), expected, rtol=0, atol=tolerance)
