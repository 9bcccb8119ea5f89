from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, BloomConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, Phi3Config

from daemon.errors import ConfigError
from daemon.model.loading import context_of, load_model, load_tokenizer, settings_sha256
from daemon.model.location import locate_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
}


def rotary(rope_type: str, **more: float) -> LlamaConfig:
    rope = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 4.0, **more}
    return LlamaConfig(max_position_embeddings=4096, rope_parameters=rope)


def longrope() -> Phi3Config:
    return Phi3Config(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=dict(LONGROPE),
    )


@pytest.mark.parametrize(
    ("config", "context"),
    [
        (lambda: GPT2Config(n_positions=77), 77),
        (lambda: Gemma3TextConfig(max_position_embeddings=99), 99),  # rotary embeddings of two kinds
        (lambda: rotary("yarn", original_max_position_embeddings=1024), 4096),  # the same for every text
        (lambda: rotary("dynamic"), 4096),
        (longrope, 4096),
        (BloomConfig, None),
    ],
    ids=["learned", "two kinds", "yarn", "dynamic", "longrope", "none"],
)
def test_the_context_is_what_a_model_reads_whatever_is_beside(config, context):
    assert context_of(config()) == context


def refusal(folder: Path) -> str:
    """Why a folder is not loaded, in one line."""
    with pytest.raises(ConfigError) as caught:
        load_model(locate_model(str(folder), folder), device="cpu", dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 450 and message.startswith("model ")
    return message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"hidden_act": "siluu"},
            "hidden_act = 'siluu' in its config.json is not known: did you mean silu? correct it",
        ),
        (
            {"rope_parameters": {"rope_type": "yarm", "rope_theta": 10000.0}},
            "rope_parameters.rope_type = 'yarm' in its config.json is not known: did you mean yarn?",
        ),
        (
            {"rope_scaling": {"type": "wunder", "factor": 2.0}},
            "type = 'wunder' in its config.json is not known",
        ),
        (
            {"rope_scaling": {"rope_type": "wunder", "factor": 2.0}},
            "rope_type = 'wunder' in its config.json is not known",
        ),
    ],
)
def test_a_name_in_the_configuration_that_nobody_knows_is_told_with_its_field(settings, said, folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    assert said in refusal(folder)


def test_a_folder_without_a_tokenizer_says_how_to_add_it(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert "holds no tokenizer (tokenizer.json): add the one that belongs to the model" in refusal(folder)


def test_a_tokenizer_whose_file_is_lost_says_how_to_add_it(folder):
    (folder / "tokenizer.json").unlink()
    assert "holds no tokenizer (tokenizer.json): add the one that belongs to the model" in refusal(folder)


def test_shards_without_their_index_say_that_it_is_missing(folder):
    for number in (1, 2):
        shutil.copy(folder / "model.safetensors", folder / f"model-0000{number}-of-00002.safetensors")
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors.index.json there, which its 2 shards need: add it" in refusal(folder)


def test_weights_by_another_name_say_which_is_expected(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert "no model.safetensors there: rename weights.safetensors" in refusal(folder)


def test_another_chat_template_is_another_model(folder):
    config, tokenizer = AutoConfig.from_pretrained(folder), load_tokenizer(locate_model(str(folder), folder))
    before = settings_sha256(config, tokenizer, None)
    tokenizer.chat_template = "{{ messages }}"
    assert settings_sha256(config, tokenizer, None) != before
