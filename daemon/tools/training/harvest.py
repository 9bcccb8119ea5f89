"""Harvests residual activations of the bundled model over a folder of plain text.

Writes one float16 array per hooked layer and split; knows nothing about SAEs. Run it as
`python -m daemon.tools.training.harvest --corpus DIR --out DIR`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaModel

from daemon.model.smollm2 import default_cache_dir, smollm2_folder

LAYERS = (7, 15, 22)
CONTEXT_LENGTHS = (32, 64, 128, 256)  # users send short prompts and long documents alike
BATCH_TOKENS = 2048
HELD_OUT_EVERY = 20  # one stretch of text in this many is never trained on
STRETCH = sum(CONTEXT_LENGTHS)
OUTLIER_RATIO = 10.0  # attention sinks: norm over this many times the median
SEED = 7


def clean(text: str) -> str:
    """Undoes the tokenised spelling of WikiText (` @-@ `, ` , `) so that the text reads as prose."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)%]|'s\b|n't\b)", r"\1", text)
    return re.sub(r"([(]) ", r"\1", text).replace(" <unk>", "")


def contexts(corpus: Path, folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """The corpus as (train, held-out) contexts of token ids, BOS first, shuffled.

    Whole stretches of consecutive text are held out, so no sentence is split between the two.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    for path in sorted(corpus.glob("*.txt")):
        ids = tokenizer(clean(path.read_text(errors="replace"))).input_ids
        for number, start in enumerate(range(0, len(ids) - STRETCH, STRETCH)):
            into = held_out if number % HELD_OUT_EVERY == 0 else train
            at = start
            for length in CONTEXT_LENGTHS:
                into.append([tokenizer.bos_token_id, *ids[at : at + length - 1]])
                at += length
    rng = random.Random(SEED)
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def batches(all_contexts: list[list[int]]) -> Iterator[torch.Tensor]:
    """Contexts of one length at a time, (rows, length) of about BATCH_TOKENS tokens, in order."""
    waiting: dict[int, list[list[int]]] = {length: [] for length in CONTEXT_LENGTHS}
    for context in all_contexts:
        group = waiting[len(context)]
        group.append(context)
        if len(group) * len(context) >= BATCH_TOKENS:
            yield torch.tensor(group)
            group.clear()
    yield from (torch.tensor(group) for group in waiting.values() if group)


def trunk(folder: Path, dtype: torch.dtype) -> LlamaModel:
    """The decoder stack up to the last hooked layer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype).model
    del model.layers[max(LAYERS) + 1 :]
    model.config.num_hidden_layers = max(LAYERS) + 1
    return model.eval()


@torch.inference_mode()
def harvest(model: LlamaModel, all_contexts: list[list[int]], out: Path, split: str) -> dict[str, float]:
    """Writes `<split>-<layer>.f16` with the (tokens, d_model) residuals that are not outliers.

    A token counts as an outlier, and is left out at every layer, where its norm at any hooked
    layer is over OUTLIER_RATIO times that layer's median: BOS and the attention sinks.
    """
    seen: dict[int, torch.Tensor] = {}
    for layer in LAYERS:
        model.layers[layer].register_forward_hook(
            lambda _module, _args, output, layer=layer: seen.__setitem__(layer, output)
        )
    files = {layer: (out / f"{split}-{layer}.f16").open("wb") for layer in LAYERS}
    medians: dict[int, torch.Tensor] = {}
    read = kept = 0
    began = time.monotonic()
    for number, tokens in enumerate(batches(all_contexts)):
        model(input_ids=tokens, use_cache=False)
        residuals = {layer: seen[layer].flatten(0, 1).float() for layer in LAYERS}
        norms = {layer: residual.norm(dim=-1) for layer, residual in residuals.items()}
        if not medians:
            medians = {layer: norm.median() for layer, norm in norms.items()}
        keep = torch.ones(tokens.numel(), dtype=torch.bool)
        for layer in LAYERS:
            keep &= norms[layer] < OUTLIER_RATIO * medians[layer]
        for layer in LAYERS:
            files[layer].write(residuals[layer][keep].half().numpy().tobytes())
        read += tokens.numel()
        kept += int(keep.sum())
        if number % 50 == 0:
            rate = read / (time.monotonic() - began)
            sys.stderr.write(f"{split}: {read} tokens, {kept} kept, {rate:.0f} tokens/s\n")
    for file in files.values():
        file.close()
    return {"tokens": read, "kept": kept, "outlier_share": 1 - kept / read}


def load(out: Path, split: str, layer: int, d_model: int) -> np.ndarray:
    """The harvested residuals of one layer: (tokens, d_model) float16, read into memory."""
    return np.fromfile(out / f"{split}-{layer}.f16", dtype=np.float16).reshape(-1, d_model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the activations (8 GB)")
    parser.add_argument("--tokens", type=int, default=1_800_000, help="tokens to train on, at most")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    folder = smollm2_folder(default_cache_dir())
    train, held_out = contexts(args.corpus, folder)
    limit = total = 0
    while limit < len(train) and total < args.tokens:
        total += len(train[limit])
        limit += 1
    report = {
        "held_out": harvest(trunk(folder, torch.float32), held_out, args.out, "held_out"),
        "train": harvest(trunk(folder, torch.bfloat16), train[:limit], args.out, "train"),
    }
    (args.out / "harvest.json").write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
