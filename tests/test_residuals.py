"""`outbox.residuals`: beside each row's features the vector that its SAE read, as plain modules have it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaForCausalLM

from daemon.analysis.features import StoredFeatures, feature_rows
from daemon.analysis.sparse import from_dense
from daemon.batching.splitting import concat_rows
from tests.support import tiny
from tests.test_end_to_end import configured, drain

RECORDS = tiny.contrast_records(6)


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> tiny.Tiny:
    """SAEs of two widths; one reads texts without BOS."""
    root = tmp_path_factory.mktemp("study")
    saes = (
        tiny.save_sae(root / "a", "blocks.0.mlp.hook_post", d_in=64, prepend_bos=False),
        tiny.save_sae(root / "b", "blocks.1.hook_resid_post", seed=1),
    )
    return tiny.Tiny(tiny.save_llama(root / "model"), saes)


class Plain:
    """What plain modules have at the two places."""

    def __init__(self, model: Path) -> None:
        self.model = LlamaForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
        self.tokenizer = tiny.byte_tokenizer()
        self.known: dict[tuple[str, str], torch.Tensor] = {}
        self.at: dict[str, torch.Tensor] = {}
        layers = self.model.model.layers
        layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: self.at.update(l0=args[0][0]))
        layers[1].register_forward_hook(
            lambda _, args, out: self.at.update(l1=out[0] if out.ndim > 2 else out)
        )

    def read(self, sae: str, text: str) -> torch.Tensor:
        """(tokens, d_in)."""
        if (sae, text) in self.known:
            return self.known[sae, text]
        ids = [tiny.BOS] * (sae == "l1") + self.tokenizer.encode(text, add_special_tokens=False)
        with torch.inference_mode():
            self.model(torch.tensor([ids]))
        self.known[sae, text] = self.at[sae]
        return self.at[sae]


@pytest.mark.parametrize("positions", ["last", "all", "mean", "max"])
def test_the_vector_that_the_sae_read_stands_beside_its_features(positions, study, tmp_path):
    (tmp_path / "inbox").mkdir()
    (tmp_path / "lensd.toml").write_text(study.toml())
    tiny.write_json(tmp_path / "inbox" / "in.json", RECORDS)
    config = configured(
        tmp_path / "lensd.toml",
        tmp_path / "inbox",
        model__dtype="float64",
        analysis__positions=positions,
        outbox__residuals=True,
        inbox__part_records=4,
        batching__max_batch_samples=3,
        batching__max_batch_tokens=512,
    )
    _, (outcome,) = drain(config)
    table = pq.read_table(outcome.folder / "features.parquet")
    assert table.column_names[-2:] == ["values", "residual"]
    assert table.schema.field("residual").type == pa.list_(pa.float32())
    plain = Plain(study.model)
    for row in table.to_pylist():
        record = RECORDS[row["record_index"]]
        ending = {"prompt": "", "fact": f" {record['fact']}", "hall": f" {record['hallucination']}"}
        x = plain.read(row["sae"], f"{record['prompt']}{ending[row['text']]}")
        own = x[int(row["sae"] == "l1") :]
        match positions:
            case "max":
                assert row["residual"] is None
                continue
            case "mean":
                expected = own.mean(0)
            case _:
                expected = x[row["position"]]
        np.testing.assert_allclose(row["residual"], expected.numpy(), rtol=1e-6, atol=1e-6)


def test_what_float32_does_not_hold_is_null_and_the_others_stay():
    """Of a float64 model."""
    acts = from_dense(torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=torch.float64))
    x = torch.tensor([[1e39, 0.0], [1.0, 2.0]], dtype=torch.float64)
    of_texts = np.array([0, 1, 1]), np.array([0, 1, 2, 3]), np.arange(3), np.arange(3)
    rows = feature_rows([StoredFeatures((0,), (acts,), *of_texts, (x,))], 1, residuals=True)
    assert rows.residuals is not None
    assert rows.residuals.row.tolist() == [-1, 1, 1]
    both = concat_rows([rows, rows], [3, 3])
    assert both.residuals is not None
    assert both.residuals.row.tolist() == [-1, 1, 1, -1, 3, 3]
    assert both.residuals.values[0][3].tolist() == [1.0, 2.0]
