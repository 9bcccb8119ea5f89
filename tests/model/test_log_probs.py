"""Log-probabilities of tokens against plain Hugging Face logits, one text at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model import log_probs
from daemon.model.extraction import Extraction
from daemon.model.float64 import full_precision
from daemon.model.unembedding import Unembedding
from daemon.model_wiring import load_engine
from daemon.tools.verify import verify
from tests.support import families, tiny
from tests.support.engines import random_texts
from tests.test_end_to_end import configured, drain, manifest_of
from tests.test_not_finite import TOKENIZER, UNPROBED

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


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "cohere", "granite", "mixtral", "gptj", "mamba"]
)
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
        np.testing.assert_allclose(of_text(extraction, number), expected, rtol=0, atol=1e-9)
    assert not len(of_text(engine.extract([[tiny.BOS]]), 0))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("llama"))


def plain_llama(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("rows", [3])  # whose logits are held at a time
def test_of_each_text_the_tokens_that_count_are_predicted(rows, family, tmp_path, monkeypatch):
    """Where texts come both ways, of those with BOS."""
    monkeypatch.setitem(log_probs.LOGITS, "cpu", rows * (tiny.BOS + 1))
    model = families.save_family(tmp_path / "m", family)
    saes = [
        tiny.save_sae(
            tmp_path / str(way), "blocks.3.hook_resid_post", seed=way, prepend_bos=bool(way), d_sae=90 + way
        )
        for way in (0, 1)
    ]
    engine = engine_of(tmp_path, model, *saes)
    added = [text for text in texts() if len(text) > 1]
    masks = [bytes(at % 3 == 0 for at in range(len(text))) for text in added]
    masks[2] = b"\1" + bytes(len(added[2]) - 2) + b"\1"
    bare, bare_masks = [text[1:] for text in added], [mask[:-1] for mask in masks]
    extraction = engine.finish(engine.start([*added, *bare], [*masks, *bare_masks]))
    plain = plain_llama(model)
    assert extraction.log_probs.n_texts == len(added)
    for number, (text, mask) in enumerate(zip(added, masks, strict=True)):
        expected = [value for at, value in enumerate(plain_log_probs(plain, text)) if at and mask[at]]
        np.testing.assert_allclose(of_text(extraction, number), expected, rtol=0, atol=1e-9)


def save_overflowing_late(folder: Path) -> Path:
    """A Llama whose third MLP gives no finite number for one letter; what two layers give is finite."""
    model = AutoModelForCausalLM.from_pretrained(tiny.save_llama(folder), dtype=torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[TOKENIZER(UNPROBED)["input_ids"][0], 0] = 1
        for layer in model.model.layers[:3]:
            layer.self_attn.o_proj.weight[0] = 0
        for layer in model.model.layers[:2]:
            layer.mlp.down_proj.weight[0] = 0
        mlp = model.model.layers[2].mlp
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[:, 0] = 0
            linear.weight[5, 0] = torch.finfo(torch.float64).max ** 0.6
    model.save_pretrained(folder)
    return folder


def test_a_text_that_overflows_leaves_its_neighbours_their_numbers(tmp_path):
    model = save_overflowing_late(tmp_path / "m")
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    engine = engine_of(tmp_path, model, sae)
    letter = TOKENIZER(UNPROBED)["input_ids"]
    good = random_texts([30, 12, 21])
    good = [[token for token in text if token != letter[0]] for text in good]
    bad = [[*good[0][:5], *letter, *good[0][5:]], [tiny.BOS, *letter, 70]]
    read = [good[0], bad[0], good[1], bad[1], good[2]]
    extraction = engine.extract(read)
    assert not extraction.not_finite
    for number, text in enumerate(read):
        values = of_text(extraction, number)
        if text in bad:
            assert not np.isfinite(values).all()
        else:
            alone = of_text(engine.extract([text]), 0)
            np.testing.assert_allclose(values, alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("family", ["gemma3n", "opt_post_norm", "bert_decoder"])
def test_a_family_whose_logits_are_made_otherwise_is_refused(family, tmp_path):
    model = families.save_family(tmp_path / "m", family)
    with pytest.raises(ConfigError, match=r"set analysis\.log_probs to false") as refused:
        engine_of(tmp_path, model, tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("lm_head.weight", "missing"),
        ("lm_head.weight", "nan"),
        ("model.norm.weight", "missing"),
        ("model.layers.3.mlp.up_proj.weight", "nan"),
    ],
)
def test_weights_beyond_the_last_dictionary_must_be_whole_only_where_they_run(name, how, tmp_path):
    model = tiny.save_llama(tmp_path / "m")
    tensors = load_file(model / "model.safetensors")
    if how == "missing":
        del tensors[name]
    else:
        tensors[name].view(-1)[3] = math.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        engine_of(tmp_path, model, sae)
    engine_of(tmp_path, model, sae, **{"analysis.log_probs": False})


@pytest.mark.parametrize(("family", "tokens"), [("llama", "completion"), ("gptj", "all")])
def test_verify_finds_wrong_log_probs(tokens, family, tmp_path, monkeypatch):
    model = families.save_family(tmp_path / "m", family)
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(model, (sae,)).toml())
    settings = {"model.dtype": "float64", "analysis.log_probs": True, "batching.max_batch_tokens": 512}
    config = load_config(tmp_path / "lensd.toml", {}, {**settings, "analysis.tokens": tokens})
    file = tiny.write_json(tmp_path / "in.json", tiny.contrast_records(4))
    found = verify(config, file, samples=None, batch_sizes=(1, 4))
    assert found.passed
    columns = [difference.column for difference in found.reports[0].columns]
    assert columns[3:9] == [
        f"{kind}_log_prob_{text}" for text in ("prompt", "fact", "hall") for kind in ("mean", "last")
    ]
    assert columns[-2:] == ["mean_log_prob_diff", "last_log_prob_diff"]
    right = Unembedding.logits
    monkeypatch.setattr(Unembedding, "logits", lambda end, hidden: right(end, hidden) * 1.01)
    assert not verify(config, file, samples=None, batch_sizes=(4,)).passed


def test_the_columns_are_there_where_they_are_asked_for(llama, tmp_path):
    """A text of one token has none: null. Off, nothing changes."""
    (tmp_path / "inbox").mkdir()
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post", prepend_bos=False)
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(llama, (sae,)).toml())
    units = []
    for asked in (False, True):
        tiny.write_json(tmp_path / "inbox" / "in.json", [{"text": "a"}, {"text": "abc"}])
        flags = {"analysis__log_probs": asked, "batching__max_batch_tokens": 512, "model__dtype": "float64"}
        _, (outcome,) = drain(configured(toml, tmp_path / "inbox", **flags))
        units.append(outcome.unit)
        table = pq.read_table(outcome.folder / "metrics.parquet")
        assert "log_probs" not in manifest_of(outcome.folder)["model"]
        assert [name for name in table.column_names if "log_prob" in name] == (
            ["mean_log_prob_text", "last_log_prob_text"] if asked else []
        )
    assert len(set(units)) == 2
    text = tiny.byte_tokenizer().encode("abc", add_special_tokens=False)
    expected = plain_log_probs(plain_llama(llama), text)[1:]
    rows = table.to_pylist()
    assert (rows[0]["mean_log_prob_text"], rows[0]["last_log_prob_text"]) == (None, None)
    assert rows[1]["mean_log_prob_text"] == pytest.approx(expected.mean(), abs=1e-9)
    assert rows[1]["last_log_prob_text"] == pytest.approx(expected[-1], abs=1e-9)
