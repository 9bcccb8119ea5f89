"""Trains one bundled dictionary with SAELens on harvested activations and saves it in SAELens's format.

A batch-top-k SAE (Bussmann et al. 2024) is trained and saved, as SAELens does, as a JumpReLU SAE with
one threshold for all features. Run it after `daemon.tools.training.harvest`, as
`python -m daemon.tools.training.train --activations DIR --layer L --out DIR`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from daemon.tools.training.harvest import CONTEXT_LENGTHS, SEED, load

D_MODEL = 576
D_SAE = 2304
MEAN_L0 = 64
BATCH = 2048
THRESHOLD_SAMPLE_ROWS = 16  # one row in this many sets a batch's threshold


class SampledBatchTopK(torch.nn.Module):
    """Batch top-k whose threshold comes from a sample of rows: the exact one sorts 9 million numbers."""

    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k

    def forward(self, pre: torch.Tensor) -> torch.Tensor:
        """pre: (rows, d_sae) -> the same with all but about k * rows entries set to zero."""
        acts = pre.relu()
        sample = acts.detach()[::THRESHOLD_SAMPLE_ROWS]
        kept = int(self.k * sample.shape[0])
        threshold = sample.flatten().float().topk(kept).values[-1].to(acts.dtype)
        return acts * (acts >= threshold)


class SampledBatchTopKSAE(BatchTopKTrainingSAE):  # type: ignore[misc]  # the library has no types
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        return SampledBatchTopK(self.cfg.k)


def shuffled(activations: np.ndarray) -> Iterator[torch.Tensor]:
    """Endless (BATCH, d_model) float32 batches, each token once per pass, in a new order every pass."""
    rng = np.random.default_rng(SEED)
    while True:
        order = rng.permutation(len(activations))
        for start in range(0, len(order) - BATCH, BATCH):
            yield torch.from_numpy(activations[np.sort(order[start : start + BATCH])]).float()


def train(activations: np.ndarray, layer: int, passes: float, learning_rate: float) -> BatchTopKTrainingSAE:
    """A batch-top-k SAE after `passes` passes over (tokens, d_model) float16 activations."""
    torch.manual_seed(SEED)
    metadata = SAEMetadata(
        model_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        hook_name=f"blocks.{layer}.hook_resid_post",
        prepend_bos=True,
        context_size=max(CONTEXT_LENGTHS),
    )
    sae = SampledBatchTopKSAE(
        BatchTopKTrainingSAEConfig(
            d_in=D_MODEL,
            d_sae=D_SAE,
            k=MEAN_L0,
            apply_b_dec_to_input=True,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    sample = torch.from_numpy(activations[:: max(1, len(activations) // 50_000)]).float()
    scale = D_MODEL**0.5 / sample.norm(dim=-1).mean()
    sae.b_dec.data = sample.mean(0) * scale
    steps = int(passes * len(activations) / BATCH)
    config = SAETrainerConfig(
        total_training_samples=steps * BATCH,
        train_batch_size_samples=BATCH,
        lr=learning_rate,
        lr_end=learning_rate / 10,
        lr_warm_up_steps=steps // 50,
        lr_decay_steps=steps // 3,
        autocast=True,
        dead_feature_window=100,
        n_batches_for_norm_estimate=20,
    )
    SAETrainer(config, sae, shuffled(activations)).fit()
    return sae


@torch.no_grad()
def calibrate_threshold(sae: SAE, activations: np.ndarray) -> None:
    """Set the single JumpReLU threshold so that the mean L0 on training data is MEAN_L0."""
    sae.threshold.zero_()
    acts = torch.cat(
        [sae.encode(torch.from_numpy(chunk).float()) for chunk in np.array_split(activations, 8)]
    )
    ranked = acts.flatten().topk(MEAN_L0 * len(activations)).values
    sae.threshold.fill_(ranked[-1])


def save(sae: BatchTopKTrainingSAE, activations: np.ndarray, folder: Path) -> None:
    """Write `cfg.json` and `sae_weights.safetensors`, the weights rounded to float16."""
    sae.save_inference_model(folder)
    inference = SAE.load_from_disk(folder)
    calibrate_threshold(inference, activations[:: max(1, len(activations) // 20_000)])
    state = load_file(folder / "sae_weights.safetensors")
    state["threshold"] = inference.threshold.data.clone()
    save_file(
        {name: value.half().contiguous() for name, value in state.items()}, folder / "sae_weights.safetensors"
    )
    config = json.loads((folder / "cfg.json").read_text())
    config["dtype"] = "float32"
    (folder / "cfg.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--activations", type=Path, required=True, help="folder that harvest wrote")
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True, help="parent of the SAE's folder")
    parser.add_argument("--passes", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    args = parser.parse_args()
    activations = load(args.activations, "train", args.layer, D_MODEL)
    sae = train(activations, args.layer, args.passes, args.learning_rate)
    save(sae, activations, args.out / f"blocks.{args.layer}.hook_resid_post")


if __name__ == "__main__":
    main()
