"""Damages valid model folders, dictionary folders and configurations at random, in the ways that people meet.

Each mutation takes a generator of random numbers and a `Case`, changes the case's files in place and says
what it did. A mutation may turn out to be harmless: whoever uses it compares with what plain libraries make
of the files.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import tiny

POINTER = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 1048576\n"
)
JUNK: list[Any] = [
    None,
    "",
    "x",
    "nope",
    -1,
    0,
    1,
    3,
    10**9,
    1.5,
    -0.5,
    [],
    {},
    [1],
    {"a": 1},
    True,
    False,
    "4",
    float("nan"),
]
PREFIXES = (
    "_orig_mod.",
    "module.",
    "base_model.model.",
    "_fsdp_wrapped_module.",
    "module._orig_mod.",
    "model.",
    "language_model.",
    "x.",
    "transformer.",
)
EXTRA_TENSORS = (
    "model.layers.1.self_attn.rotary_emb.inv_freq",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.1.mlp.up_proj.lora_A.weight",
    "model.layers.1.self_attn.q_proj.bias",
    "transformer.h.0.attn.bias",
    "transformer.h.1.attn.masked_bias",
    "h.1.attn.bias",
    "score.weight",
    "v_head.summary.weight",
    "lm_head.bias",
    "model.layers.9.mlp.up_proj.weight",
    "embed_positions.weight",
    "something.else",
)
HOOKS = (
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_pre",
    "blocks.2.hook_resid_post",
    "blocks.9.hook_resid_post",
    "blocks.-1.hook_resid_post",
    "blocks.x.hook_resid_post",
    "blocks.1.hook_nowhere",
    "hook_embed",
    "BLOCKS.1.HOOK_RESID_POST",
    "blocks.1.hook_resid_post ",
    "",
)
ARCHITECTURES = re.findall(
    r"\w+",
    "standard jumprelu topk gated transcoder skip_transcoder jumprelu_transcoder batchtopk"
    " matryoshka_batchtopk temporal matching_pursuit abstopk Standard nope",
)


@dataclass
class Case:
    """A model folder, dictionary folders and a configuration: all valid until something is done to them."""

    model: Path
    saes: list[Path]
    toml: Path
    did: list[str] = field(default_factory=list)

    def say(self, what: str) -> None:
        self.did.append(what)


Mutation = Callable[[random.Random, Case], None]


def chosen_weights(rng: random.Random, case: Case) -> Path:
    return (
        case.model / "model.safetensors"
        if rng.random() < 0.55
        else rng.choice(case.saes) / "sae_weights.safetensors"
    )


def chosen_json(rng: random.Random, case: Case) -> Path:
    return case.model / "config.json" if rng.random() < 0.5 else rng.choice(case.saes) / "cfg.json"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = change(load_file(path))
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"}
    )


def rename_all(rng: random.Random, case: Case) -> None:
    path, prefix = chosen_weights(rng, case), rng.choice(PREFIXES)
    strip = rng.random() < 0.3
    case.say(f"{path.name}: every name {'without its first part' if strip else 'behind ' + prefix}")
    rewrite(
        path,
        lambda tensors: {
            name.partition(".")[2] or name if strip else prefix + name: tensor
            for name, tensor in tensors.items()
        },
    )


def rename_some(rng: random.Random, case: Case) -> None:
    path = chosen_weights(rng, case)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        victims = rng.sample(sorted(tensors), rng.randint(1, min(3, len(tensors))))
        how = rng.choice(["x", "_orig_mod.", ".weight", "swap"])
        case.say(f"{path.name}: {victims} renamed ({how})")
        if how == "swap" and len(victims) > 1:
            first, second = victims[:2]
            return tensors | {first: tensors[second], second: tensors[first]}
        return {
            (how + name if how == "_orig_mod." else name + how) if name in victims else name: tensor
            for name, tensor in tensors.items()
        }

    rewrite(path, change)


def drop_tensors(rng: random.Random, case: Case) -> None:
    path = chosen_weights(rng, case)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        part = rng.choice(["", "mlp", "layers.2", "norm", "embed", "lm_head", "h.2", "wte", "ln_f"])
        pool = [name for name in sorted(tensors) if part in name] or sorted(tensors)
        gone = pool if part and rng.random() < 0.5 else rng.sample(pool, rng.randint(1, min(2, len(pool))))
        case.say(f"{path.name}: without {gone[:4]}")
        return {name: tensor for name, tensor in tensors.items() if name not in gone} or {"x": torch.ones(1)}

    rewrite(path, change)


def reshape_tensor(rng: random.Random, case: Case) -> None:
    path = chosen_weights(rng, case)

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        how = rng.choice(
            ["transpose", "cut", "cut last", "flatten", "unsqueeze", "empty", "scalar", "repeat"]
        )
        case.say(f"{path.name}: {name} {tuple(tensor.shape)} {how}")
        made = {
            "transpose": lambda: tensor.T if tensor.ndim == 2 else tensor[None],
            "cut": lambda: tensor[: max(1, len(tensor) // 2)],
            "cut last": lambda: tensor[..., :-1],
            "flatten": lambda: tensor.flatten(),
            "unsqueeze": lambda: tensor[None],
            "empty": lambda: tensor[:0],
            "scalar": lambda: tensor.flatten()[0],
            "repeat": lambda: torch.cat([tensor, tensor]),
        }[how]()
        return tensors | {name: made.clone()}

    rewrite(path, change)


def spoil_numbers(rng: random.Random, case: Case) -> None:
    path, value = (
        chosen_weights(rng, case),
        rng.choice([float("nan"), float("inf"), float("-inf"), 1e38, 0.0]),
    )

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        name = rng.choice(sorted(tensors))
        tensor = tensors[name].clone().flatten()
        tensor[rng.randrange(len(tensor)) if rng.random() < 0.7 else slice(None)] = value
        case.say(f"{path.name}: {value} in {name}")
        return tensors | {name: tensor.reshape(tensors[name].shape)}

    rewrite(path, change)


def cast_tensors(rng: random.Random, case: Case) -> None:
    path = chosen_weights(rng, case)
    dtype = rng.choice(
        [
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.int8,
            torch.int32,
            torch.int64,
            torch.bool,
            torch.complex64,
            torch.float8_e4m3fn,
            torch.uint8,
        ]
    )

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = sorted(tensors) if rng.random() < 0.5 else [rng.choice(sorted(tensors))]
        case.say(f"{path.name}: {names[:2]} as {dtype}")
        return {name: tensor.to(dtype) if name in names else tensor for name, tensor in tensors.items()}

    rewrite(path, change)


def add_tensor(rng: random.Random, case: Case) -> None:
    path = chosen_weights(rng, case)
    name = rng.choice(
        EXTRA_TENSORS
        if path.parent == case.model
        else ("scaling_factor", "threshold", "x", "topk_threshold", "b_gate")
    )
    value = rng.choice([torch.ones(tiny.D_SAE), torch.full((tiny.D_SAE,), 2.0), torch.ones(4, 4)])
    case.say(f"{path.name}: and {name}")
    rewrite(path, lambda tensors: tensors | {name: value})


def split_shards(rng: random.Random, case: Case) -> None:
    """The model in two files and an index, which may not fit."""
    path = case.model / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    weight_map = {name: shard for shard, part in halves.items() for name in part}
    for shard, part in halves.items():
        save_file({name: tensors[name] for name in part}, case.model / shard, metadata={"format": "pt"})
    path.unlink()
    how = rng.choice(["whole", "lost shard", "lost entry", "wrong entry", "outside", "no map", "pointer"])
    case.say(f"shards: {how}")
    victim = case.model / "model-00002-of-00002.safetensors"
    if how == "lost shard":
        victim.unlink()
    elif how == "pointer":
        victim.write_text(POINTER)
    elif how == "lost entry":
        del weight_map[rng.choice(names)]
    elif how == "wrong entry":
        name = rng.choice(names)
        weight_map[name] = next(shard for shard in halves if shard != weight_map[name])
    elif how == "outside":
        weight_map[rng.choice(names)] = "../../elsewhere.safetensors"
    index: dict[str, Any] = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    if how == "no map":
        index["weight_map"] = rng.choice(JUNK)
    (case.model / "model.safetensors.index.json").write_text(json.dumps(index))


def damage_file(rng: random.Random, case: Case) -> None:
    files = sorted(path for folder in (case.model, *case.saes) for path in folder.iterdir())
    path = rng.choice(files)
    raw = path.read_bytes()
    how = rng.choice(
        [
            "empty",
            "pointer",
            "cut",
            "cut",
            "byte",
            "header",
            "gone",
            "folder",
            "noise",
            "longer",
            "twice",
            "dangling",
        ]
    )
    case.say(f"{path.name}: {how}")
    if how == "empty":
        path.write_bytes(b"")
    elif how == "pointer":
        path.write_text(POINTER)
    elif how == "cut":
        path.write_bytes(raw[: rng.randrange(1, max(2, len(raw)))])
    elif how in ("byte", "header"):
        place = rng.randrange(min(len(raw), 200 if how == "header" else len(raw)))
        path.write_bytes(raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :])
    elif how == "noise":
        path.write_bytes(rng.randbytes(300))
    elif how == "longer":
        path.write_bytes(raw + b"\0" * 40)
    elif how == "twice":
        path.write_bytes(raw + raw)
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "dangling":
            path.symlink_to(path.parent / "nowhere")


def swap_files(rng: random.Random, case: Case) -> None:
    files = sorted(path for folder in (case.model, *case.saes) for path in folder.iterdir())
    first, second = rng.sample(files, 2)
    case.say(f"{first.parent.name}/{first.name} and {second.parent.name}/{second.name} swapped")
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def junk_setting(rng: random.Random, case: Case) -> None:
    path = chosen_json(rng, case)

    def change(settings: dict[str, Any]) -> None:
        inner = settings.get("metadata")
        place = inner if isinstance(inner, dict) and rng.random() < 0.4 else settings
        if place is settings and rng.random() < 0.1 and isinstance(settings.get("rope_parameters"), dict):
            place = settings["rope_parameters"]
        key, value = rng.choice(sorted(place)), rng.choice(JUNK)
        if isinstance(place[key], int | float) and not isinstance(place[key], bool) and rng.random() < 0.5:
            value = rng.choice(
                [-place[key], place[key] * 2, place[key] + 1, place[key] * 10**6, float(place[key])]
            )
        case.say(f"{path.name}: {key} = {value!r} for {place[key]!r}")
        place[key] = value

    edited(path, change)


def drop_setting(rng: random.Random, case: Case) -> None:
    path = chosen_json(rng, case)

    def change(settings: dict[str, Any]) -> None:
        inner = settings.get("metadata")
        place = inner if isinstance(inner, dict) and rng.random() < 0.4 else settings
        key = rng.choice(sorted(place))
        case.say(f"{path.name}: without {key} ({place[key]!r})")
        del place[key]

    edited(path, change)


def add_setting(rng: random.Random, case: Case) -> None:
    """A setting that libraries know, or knew."""
    sae = rng.random() < 0.6
    path = rng.choice(case.saes) / "cfg.json" if sae else case.model / "config.json"
    name, value = rng.choice(
        [
            ("activation_fn_str", "tanh-relu"),
            ("activation_fn", "relu"),
            ("activation_fn_kwargs", {"k": 3}),
            ("finetuning_scaling_factor", True),
            ("hook_head_index", 1),
            ("normalize_activations", "covariance_whitening"),
            ("normalize_activations", "expected_average_only_in"),
            ("normalize_activations", "layer_norm"),
            ("normalize_activations", "constant_norm_rescale"),
            ("normalize_activations", "nope"),
            ("rescale_acts_by_decoder_norm", True),
            ("reshape_activations", "hook_z"),
            ("apply_b_dec_to_input", False),
            ("note", "mine"),
            ("k", 5),
        ]
        if sae
        else [
            ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
            ("quantization_config", {"quant_method": "gptq", "bits": 4}),
            ("quantization_config", {"quant_method": "nope"}),
            ("quantization_config", {}),
            ("quantization_config", 5),
            ("auto_map", {"AutoModelForCausalLM": "modeling_x.X", "AutoConfig": "modeling_x.C"}),
            ("num_experts", 4),
            ("tie_word_embeddings", True),
            ("attention_bias", True),
            ("sliding_window", 4),
            ("layer_types", ["full_attention", "linear_attention", "full_attention"]),
            ("note", "mine"),
            ("torch_dtype", "nope"),
            ("dtype", "int8"),
            ("is_decoder", True),
            ("use_cache", "x"),
            ("attn_implementation", "flash_attention_2"),
            ("_attn_implementation", "nope"),
            ("bos_token_id", 10**6),
            ("id2label", {"0": "a"}),
            ("pruned_heads", {"0": [1]}),
        ]
    )
    case.say(f"{path.name}: and {name} = {value!r}")
    edited(path, lambda settings: settings.__setitem__(name, value))


def change_kind(rng: random.Random, case: Case) -> None:
    """Another architecture, hook or family than the weights are of."""
    how = rng.choice(["architecture", "hook", "model_type", "old", "architectures"])
    sae = rng.choice(case.saes) / "cfg.json"

    def change(settings: dict[str, Any]) -> None:
        if how == "architecture":
            settings["architecture"] = rng.choice(ARCHITECTURES)
        elif how == "hook":
            settings["metadata"]["hook_name"] = rng.choice(HOOKS)
        elif how == "old":  # as before version 6
            metadata = settings.pop("metadata")
            settings.update({key: value for key, value in metadata.items() if "version" not in key})
            settings["activation_fn_str"] = rng.choice(["relu", "relu", "topk", "tanh-relu", None])
            if rng.random() < 0.3:
                settings["activation_fn_kwargs"] = rng.choice([{}, {"k": 12}, {"k": None}, {"slope": 0.1}])
        elif how == "model_type":
            settings["model_type"] = rng.choice(
                ["gpt2", "llama", "mistral", "bert", "t5", "qwen3", "nope", "gemma", "opt"]
            )
        else:
            settings["architectures"] = rng.choice(
                [["BertModel"], [], None, ["LlamaForSequenceClassification"]]
            )
        case.say(
            f"{how}:"
            f" { ({key: settings.get(key) for key in ('architecture', 'model_type', 'architectures')}) }"
        )

    edited(
        case.model / "config.json" if how.startswith("model_type") or how == "architectures" else sae, change
    )


def change_tokenizer(rng: random.Random, case: Case) -> None:
    how = rng.choice(["token", "gone", "config", "more tokens", "model", "no bos", "class"])
    case.say(f"tokenizer: {how}")
    path, config = case.model / "tokenizer.json", case.model / "tokenizer_config.json"
    if how == "gone":
        path.unlink()
    elif how == "config":
        edited(config, lambda settings: settings.__setitem__(rng.choice(sorted(settings)), rng.choice(JUNK)))
    elif how == "class":
        edited(
            config,
            lambda settings: settings.__setitem__(
                "tokenizer_class", rng.choice(["Nope", "BertTokenizer", "LlamaTokenizer", None])
            ),
        )
    elif how == "no bos":
        edited(config, lambda settings: [settings.pop(key, None) for key in ("bos_token", "eos_token")])
    else:

        def change(tokenizer: dict[str, Any]) -> None:
            if how == "token":
                del tokenizer["model"]["vocab"][rng.choice(sorted(tokenizer["model"]["vocab"]))]
            elif how == "model":
                tokenizer["model"][rng.choice(sorted(tokenizer["model"]))] = rng.choice(JUNK)
            else:
                added = {
                    **tokenizer["added_tokens"][0],
                    "id": rng.choice([257, 300, 10**6]),
                    "content": "zzz",
                }
                tokenizer["added_tokens"].append(added)

        edited(path, change)


def change_toml(rng: random.Random, case: Case) -> None:
    text = case.toml.read_text()
    junk = rng.choice(
        ['""', '"x"', "-1", "0", "1e9", "[]", "{}", "true", "nan", '"\\u0000"', "1.5", "99999999999999999999"]
    )
    key = rng.choice(
        [
            "[model]\nname",
            "[model]\ndtype",
            "[model]\ndevice",
            "[analysis]\npositions",
            "[analysis]\nnoise_draws",
            "[analysis]\nnoise_sigma",
            "[batching]\nmax_text_tokens",
            "[batching]\nmax_batch_tokens",
            "[nope]\nx",
            "[model]\nnope",
            "[[sae]]\npath",
            "[[sae]]\nrelease",
            "[texts]\na",
            "[contrast]\nreference",
            "[http]\naddress",
            "[inbox]\nmax_nesting",
            "[outbox]\nvalues",
        ]
    )
    how = rng.choice(
        ["value", "value", "cut", "byte", "twice", "no sae", "same sae", "wrong path", "file path"]
    )
    case.say(f"lensd.toml: {how} {key!r} = {junk}")
    if how == "value":
        section, _, name = key.partition("\n")
        if section in text and not section.startswith("[["):
            text = re.sub(rf"^{name} = .*\n", "", text, flags=re.MULTILINE)
            text = text.replace(section, f"{section}\n{name} = {junk}", 1)
        else:
            text += f"\n{section}\n{name} = {junk}\n"
    elif how == "cut":
        text = text[: rng.randrange(text.index("[[sae]]"), len(text))]
    elif how == "byte":
        place = rng.randrange(len(text))
        text = text[:place] + rng.choice('"[]=\n\\#x') + text[place + 1 :]
    elif how == "twice":
        text += text
    elif how == "no sae":
        text = text.partition("[[sae]]")[0]
    elif how == "same sae":
        text += f'\n[[sae]]\npath = "{case.saes[0]}"\n'
    else:
        old = rng.choice([case.model, *case.saes])
        new = old / ("nowhere" if how == "wrong path" else "config.json" if old == case.model else "cfg.json")
        text = text.replace(f'"{old}"', f'"{new}"')
    case.toml.write_text(text)


def replace_sae(rng: random.Random, case: Case) -> None:
    """Another dictionary, of any shape and place."""
    folder = rng.choice(case.saes)
    shutil.rmtree(folder)
    architecture = rng.choice(["standard", "jumprelu", "topk"])
    d_in = rng.choice([tiny.D_MODEL, 64, 8])
    hook = rng.choice(
        [
            "blocks.0.hook_resid_pre",
            "blocks.1.hook_resid_mid",
            "blocks.2.hook_resid_post",
            "blocks.3.hook_resid_post",
        ]
    )
    processed = rng.choice(
        [None, {"center_writing_weights": True}, {"fold_ln": True}, {"center_writing_weights": "yes"}, []]
    )
    case.say(f"a {architecture} of d_in {d_in} at {hook}, processed {processed}")
    tiny.save_sae(
        folder, hook, architecture=architecture, d_in=d_in, model_from_pretrained_kwargs=processed, seed=7
    )


MUTATIONS: tuple[Mutation, ...] = (
    rename_all,
    rename_some,
    drop_tensors,
    reshape_tensor,
    spoil_numbers,
    cast_tensors,
    add_tensor,
    split_shards,
    damage_file,
    damage_file,
    swap_files,
    junk_setting,
    junk_setting,
    junk_setting,
    drop_setting,
    add_setting,
    change_kind,
    change_tokenizer,
    change_toml,
    replace_sae,
)


def mutate(rng: random.Random, case: Case) -> None:
    """Do one thing to a case, sometimes two."""
    for mutation in rng.sample(MUTATIONS, 1 if rng.random() < 0.85 else 2):
        try:
            mutation(rng, case)
        except Exception as error:
            if not case.did:  # the second may find its file damaged by the first
                raise AssertionError(f"{mutation.__name__} failed on valid files") from error
