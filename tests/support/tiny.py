"""A tiny random model, its byte-level tokenizer and random SAEs, as folders in the formats users have."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

D_MODEL = 32
D_SAE = 96
D_OUT = 20  # of a transcoder that writes elsewhere
BOS = 256
TRANSCODERS = {
    "transcoder": (Transcoder, TranscoderConfig),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
}


@dataclass(frozen=True, slots=True)
class Tiny:
    """Folders of a model and of its SAEs."""

    model: Path
    saes: tuple[Path, ...]

    def toml(self) -> str:
        """The configuration that names them."""
        lines = [f'[model]\nname = "{self.model}"\ndevice = "cpu"\n']
        lines += [f'[[sae]]\npath = "{path}"\n' for path in self.saes]
        return "\n".join(lines)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then BOS: 257 tokens, no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<bos>")


def save_llama(folder: Path, n_layers: int = 4) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BOS + 1,
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_gpt2(folder: Path, n_layers: int = 3) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=BOS + 1,
        n_embd=D_MODEL,
        n_layer=n_layers,
        n_head=4,
        n_positions=512,
        n_ctx=512,
        bos_token_id=BOS,
        eos_token_id=BOS,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_sae(
    hook_name: str,
    *,
    architecture: str = "jumprelu",
    d_in: int = D_MODEL,
    d_sae: int = D_SAE,
    seed: int = 0,
    **metadata: object,
):
    """An untrained SAE of which about a third of the features fire on a unit-scale residual."""
    settings = {
        "d_in": d_in,
        "d_sae": d_sae,
        "metadata": SAEMetadata(model_name="tiny", hook_name=hook_name, prepend_bos=True),
    }
    if architecture == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**settings))
    elif architecture == "topk":
        sae = TopKSAE(TopKSAEConfig(**settings, k=12))
    elif architecture == "gated":
        sae = GatedSAE(GatedSAEConfig(**settings))
    else:
        sae = StandardSAE(StandardSAEConfig(**settings))
    for key, value in metadata.items():
        setattr(sae.cfg.metadata, key, value)
    return randomise(sae, d_in, seed)


def randomise(sae, d_in: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) / d_in**0.5
        parameter.data = values.abs() * 0.05 if name == "threshold" else values
    return sae


def random_transcoder(
    hook_name: str,
    hook_name_out: str,
    *,
    architecture: str = "jumprelu_transcoder",
    d_in: int = D_MODEL,
    d_out: int = D_OUT,
    seed: int = 0,
):
    """An untrained transcoder from one place of a model to another."""
    kind, config = TRANSCODERS[architecture]
    metadata = SAEMetadata(
        model_name="tiny", hook_name=hook_name, hook_name_out=hook_name_out, prepend_bos=True
    )
    sae = kind(config(d_in=d_in, d_out=d_out, d_sae=D_SAE, apply_b_dec_to_input=False, metadata=metadata))
    return randomise(sae, d_in, seed)


def save_sae(folder: Path, hook_name: str, **options: object) -> Path:
    random_sae(hook_name, **options).save_model(folder)
    return folder


def save_transcoder(folder: Path, hook_name: str, hook_name_out: str, **options: object) -> Path:
    random_transcoder(hook_name, hook_name_out, **options).save_model(folder)
    return folder


def make_tiny(folder: Path) -> Tiny:
    """A 4-layer Llama with three JumpReLU SAEs after blocks 0, 1 and 2."""
    return Tiny(
        model=save_llama(folder / "model"),
        saes=tuple(
            save_sae(folder / f"sae-{layer}", f"blocks.{layer}.hook_resid_post", seed=layer)
            for layer in (0, 1, 2)
        ),
    )


def contrast_records(n: int) -> list[dict[str, object]]:
    """n records of the contrast recipe, of various lengths."""
    return [
        {
            "id": f"s{i}",
            "domain": ("entity", "logical")[i % 2],
            "complexity": 1 + i % 10,
            "prompt": "The number after " + "one " * (i % 7) + str(i) + " is",
            "fact": str(i + 1),
            "hallucination": str(i + 2 + i % 3),
            "source": "made up",
        }
        for i in range(n)
    ]


def write_json(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text(json.dumps(records))
    return path


def overwrite_sae_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "cfg.json").read_text())
    config.update(changes)
    (folder / "cfg.json").write_text(json.dumps(config))
