"""Writers of dictionaries with random weights, in the files and names that each loader of SAELens reads.

Knows the formats as their publishers upload them, and no hub.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

VERSION_6 = "6.22.2"


@dataclass(frozen=True, slots=True)
class Shape:
    """What a writer needs to know of a dictionary."""

    hook_name: str
    d_in: int
    d_sae: int
    hook_name_out: str = ""
    d_out: int = 0  # of a transcoder
    model: str = "tiny"
    seed: int = 0
    factor: float = 1.0  # norm_scaling_factor of the registry
    layers: int = 4  # of the model

    @property
    def layer(self) -> int:
        return int(self.hook_name.split(".")[1]) if "." in self.hook_name else 0


Writer = Callable[[Path, str, Shape], None]  # the repository's folder, the path in it that the registry names


def weights(shape: Shape) -> dict[str, Tensor]:
    """W_enc (d_in, d_sae), W_dec (d_sae, d_out), biases and a threshold, in SAELens's orientation."""
    generator = torch.Generator().manual_seed(shape.seed)
    d_out = shape.d_out or shape.d_in

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator) / shape.d_in**0.5

    return {
        "W_enc": randn(shape.d_in, shape.d_sae),
        "W_dec": randn(shape.d_sae, d_out),
        "b_enc": randn(shape.d_sae),
        "b_dec": randn(d_out),
        "threshold": randn(shape.d_sae).abs() * 0.5,
    }


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save_tensors(path: Path, **tensors: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(packed(tensors), path)


def save_pickled(path: Path, **tensors: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {name: value.contiguous() if isinstance(value, Tensor) else value for name, value in tensors.items()},
        path,
    )


def save_json(path: Path, **settings: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def save_yaml(path: Path, **settings: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings))


def sae_lens(architecture: str = "jumprelu", **settings: object) -> Writer:
    """cfg.json as SAELens 6 writes it."""

    def write(repo: Path, path: str, shape: Shape) -> None:
        kinds = {
            "topk": ("W_enc", "W_dec", "b_enc", "b_dec"),
            "standard": ("W_enc", "W_dec", "b_enc", "b_dec"),
        }
        tensors = {
            name: tensor
            for name, tensor in weights(shape).items()
            if name in kinds.get(architecture, weights(shape))
        }
        save_tensors(repo / path / "sae_weights.safetensors", **tensors)
        metadata = {
            "sae_lens_version": VERSION_6,
            "sae_lens_training_version": VERSION_6,
            "dataset_path": "monology/pile-uncopyrighted",
            "hook_name": shape.hook_name,
            "model_name": shape.model,
            "model_class_name": "HookedTransformer",
            "hook_head_index": None,
            "context_size": 1024,
            "seqpos_slice": [None],
            "model_from_pretrained_kwargs": {"center_writing_weights": False},
            "prepend_bos": True,
            "exclude_special_tokens": False,
        }
        cfg = {
            "architecture": architecture,
            "d_in": shape.d_in,
            "d_sae": shape.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": metadata,
        }
        save_json(repo / path / "cfg.json", **cfg | settings)

    return write


def sae_lens_before_6(**settings: object) -> Writer:
    """cfg.json as SAELens 2 to 5 wrote it: a runner's settings, flat."""

    def write(repo: Path, path: str, shape: Shape) -> None:
        tensors = weights(shape)
        del tensors["threshold"]
        save_tensors(repo / path / "sae_weights.safetensors", **tensors)
        cfg = {
            "model_name": shape.model,
            "hook_point": shape.hook_name,
            "hook_point_layer": shape.layer,
            "hook_point_head_index": None,
            "dataset_path": "Skylion007/openwebtext",
            "context_size": 128,
            "d_in": shape.d_in,
            "d_sae": shape.d_sae,
            "dtype": "torch.float32",
            "device": "cpu",
            "finetuning_scaling_factor": False,
        }
        save_json(repo / path / "cfg.json", **cfg | settings)

    return write


def connor_rob(repo: Path, path: str, shape: Shape) -> None:
    tensors = weights(shape)
    save_pickled(repo / path, **{name: tensors[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")})
    save_json(
        repo / (path.removesuffix(".pt") + "_cfg.json"),
        act_name=shape.hook_name,
        act_size=shape.d_in,
        dict_size=shape.d_sae,
        enc_dtype="fp32",
        layer=shape.layer,
        seq_len=128,
    )


def gemma_scope_1(repo: Path, path: str, shape: Shape) -> None:
    """Transcoders of Gemma Scope 1 are of the same form."""
    (repo / path).mkdir(parents=True, exist_ok=True)
    np.savez(repo / path / "params.npz", **{name: tensor.numpy() for name, tensor in weights(shape).items()})


def gemma_scope_2(*, affine: bool = False) -> Writer:
    def write(repo: Path, path: str, shape: Shape) -> None:
        tensors = {name.lower(): tensor for name, tensor in weights(shape).items()}
        place = f"model.layers.{shape.layer}"
        settings: dict[str, object] = {"hf_hook_point_in": f"{place}.output"}
        if shape.d_out:
            settings = {
                "hf_hook_point_in": f"{place}.pre_feedforward_layernorm.output",
                "hf_hook_point_out": f"{place}.post_feedforward_layernorm.output",
                "affine_connection": affine,
            }
        if affine:
            skip = weights(replace(shape, d_sae=shape.d_out, seed=shape.seed + 1))["W_enc"]
            tensors["affine_skip_connection"] = skip
        save_tensors(repo / path / "params.safetensors", **tensors)
        save_json(
            repo / path / "config.json",
            architecture="jump_relu",
            model_name="google/gemma-v3-1b-pt",
            width=shape.d_sae,
            **settings,
        )

    return write


def llama_scope(repo: Path, path: str, shape: Shape) -> None:
    tensors = weights(shape)
    save_tensors(repo / path / "checkpoints" / "final.safetensors", **openmoss(tensors))
    save_json(
        repo / path / "hyperparams.json",
        d_model=shape.d_in,
        d_sae=shape.d_sae,
        hook_point_in=shape.hook_name,
        hook_point_out=shape.hook_name,
        jump_relu_threshold=0.5,
        dataset_average_activation_norm={"in": shape.d_in**0.5 / shape.factor, "out": 1.0},
        norm_activation="dataset-wise",
    )


def llama_scope_r1(repo: Path, path: str, shape: Shape) -> None:
    tensors = weights(shape)
    log_threshold = tensors["threshold"].clamp_min(1e-3).log()
    save_tensors(
        repo / path / "sae_weights.safetensors", **openmoss(tensors), log_jumprelu_threshold=log_threshold
    )
    save_json(
        repo / path / "config.json",
        d_model=shape.d_in,
        expansion_factor=shape.d_sae // shape.d_in,
        hook_point_in=shape.hook_name,
        hook_point_out=shape.hook_name,
        act_fn="jumprelu",
    )


def openmoss(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "encoder.weight": tensors["W_enc"].T,
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": tensors["W_dec"].T,
        "decoder.bias": tensors["b_dec"],
    }


def dictionary_learning(kind: str, *, k: int = 12) -> Writer:
    """ae.pt and config.json of https://github.com/saprmarks/dictionary_learning, by `dict_class`."""

    def write(repo: Path, path: str, shape: Shape) -> None:
        has = weights(shape)
        linear = {"encoder.weight": has["W_enc"].T, "decoder.weight": has["W_dec"].T}
        if kind == "AutoEncoder":
            tensors = linear | {"encoder.bias": has["b_enc"], "bias": has["b_dec"]}
        elif kind == "GatedAutoEncoder":
            tensors = linear | {
                "decoder_bias": has["b_dec"],
                "r_mag": has["threshold"],
                "gate_bias": has["b_enc"],
                "mag_bias": has["b_enc"].flip(0),
            }
        elif kind == "JumpReluAutoEncoder":
            tensors = has
        else:
            known = {"k": torch.tensor(k), "threshold": torch.tensor(0.25)}
            matrices = (
                {"W_enc": has["W_enc"], "W_dec": has["W_dec"], "b_enc": has["b_enc"]}
                if kind == "MatryoshkaBatchTopKSAE"
                else linear | {"encoder.bias": has["b_enc"]}
            )
            tensors = matrices | {"b_dec": has["b_dec"]} | known
        save_pickled(repo / path / "ae.pt", **tensors)
        trainer = {
            "trainer_class": f"{kind}Trainer",
            "dict_class": kind,
            "activation_dim": shape.d_in,
            "dict_size": shape.d_sae,
            "k": k,
            "layer": shape.layer,
            "lm_name": shape.model,
            "submodule_name": f"resid_post_layer_{shape.layer}",
        }
        save_json(
            repo / path / "config.json", trainer=trainer, buffer={"d_submodule": shape.d_in, "ctx_len": 128}
        )

    return write


def deepseek_r1(repo: Path, path: str, shape: Shape) -> None:
    save_pickled(repo / path, **openmoss(weights(shape)))


def goodfire(repo: Path, path: str, shape: Shape) -> None:
    named = {
        name.replace("coder.", "coder_linear."): tensor.bfloat16()
        for name, tensor in openmoss(weights(shape)).items()
    }
    save_pickled(repo / path, **named)


def qwen_scope(repo: Path, path: str, shape: Shape) -> None:
    has = weights(shape)
    save_pickled(
        repo / path, W_enc=has["W_enc"].T, W_dec=has["W_dec"].T, b_enc=has["b_enc"], b_dec=has["b_dec"]
    )


def sparsify(repo: Path, path: str, shape: Shape) -> None:
    has = weights(shape)
    tensors = {"encoder.weight": has["W_enc"].T, "encoder.bias": has["b_enc"]}
    save_tensors(repo / path / "sae.safetensors", **tensors, W_dec=has["W_dec"].T, b_dec=has["b_dec"])
    save_json(
        repo / path / "cfg.json",
        d_in=shape.d_in,
        expansion_factor=shape.d_sae // shape.d_in,
        num_latents=shape.d_sae,
        normalize_decoder=True,
        k=12,
        signed=False,
    )


def mwhanna(repo: Path, path: str, shape: Shape) -> None:
    """The weights of one layer, and the two files that all layers share."""
    has = weights(shape)
    tensors = {name: has[name] for name in ("W_dec", "b_enc", "b_dec")}
    save_tensors(repo / path, **tensors, W_enc=has["W_enc"].T)
    values = {"d_model": shape.d_in, "d_feature": shape.d_sae, "batch_size": 4096}
    save_yaml(repo / "wandb-config.yaml", **{name: {"value": value} for name, value in values.items()})
    save_yaml(repo / "config.yaml", model_name=shape.model, model_kind="transcoder_set")


def mntss(repo: Path, path: str, shape: Shape) -> None:
    """One layer of a cross-layer transcoder, which writes to its own layer and to those after it."""
    has = weights(shape)
    targets = shape.layers - shape.layer
    decoders = torch.stack([has["W_dec"].roll(place, 0) / (place + 1) for place in range(targets)], dim=1)
    named = {f"W_enc_{path}": has["W_enc"].T, f"b_enc_{path}": has["b_enc"], f"b_dec_{path}": has["b_dec"]}
    save_tensors(repo / f"W_enc_{path}.safetensors", **named)
    save_tensors(repo / f"W_dec_{path}.safetensors", **{f"W_dec_{path}": decoders})  # (d_sae, targets, d_out)
    save_yaml(
        repo / "config.yaml",
        model_name=shape.model,
        model_kind="cross_layer_transcoder",
        feature_input_hook=shape.hook_name.partition(f".{shape.layer}.")[2],
        feature_output_hook=shape.hook_name_out.partition(f".{shape.layer}.")[2],
    )


def temporal(repo: Path, path: str, shape: Shape) -> None:
    has = weights(shape)
    heads, bottleneck = 2, 4
    inner = shape.d_sae // bottleneck
    tensors = {"D": has["W_dec"], "E": has["W_enc"], "b": has["b_dec"]}
    for name, rows in (
        ("k_ctx", inner),
        ("q_target", inner),
        ("v_ctx", shape.d_sae),
        ("c_proj", shape.d_sae),
    ):
        tensors[f"attn_layers.0.{name}.weight"] = torch.eye(rows, shape.d_sae)
        tensors[f"attn_layers.0.{name}.bias"] = torch.zeros(rows)
    save_tensors(repo / path / "latest_ckpt.safetensors", **tensors)
    save_yaml(
        repo / path / "conf.yaml",
        llm={"dimin": shape.d_in},
        data={"dtype": "float32"},
        sae={
            "exp_factor": shape.d_sae / shape.d_in,
            "n_heads": heads,
            "n_attn_layers": 1,
            "bottleneck_factor": bottleneck,
            "sae_diff_type": "topk",
            "kval_topk": 12,
            "tied_weights": False,
            "scaling_factor": 0.0067,
        },
    )
