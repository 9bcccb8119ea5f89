"""Published folders made by hand: random numbers in the form of a run, and the same as plain rows."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from daemon.analysis.columns import analysis_columns
from daemon.recipes import CONTRAST_RECIPE, Recipe

SAES = (("l1", 1, 40), ("l3", 3, 25))  # name, layer, width
CLASSES = ("None", "Oblate", "Prolate", "Triaxial")
KINDS = {"int": pa.int32(), "float": pa.float64(), "class": pa.string()}


@dataclass
class Made:
    """A folder and what is in it, a row at a time."""

    path: Path
    metrics: list[dict[str, Any]]
    features: list[dict[str, Any]]
    texts: list[dict[str, Any]]
    manifest: dict[str, Any]
    changes: dict[str, Any] = field(default_factory=dict)

    def write(self, *, group_rows: int = 64) -> Path:
        """Write all files; `changes` of the manifest win."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._store("metrics.parquet", pa.Table.from_pylist(self.metrics))
        schema = pa.schema(
            [
                ("sample_id", pa.string()),
                ("record_index", pa.int64()),
                ("text", pa.string()),
                ("sae", pa.string()),
                ("layer", pa.int32()),
                ("hook_name", pa.string()),
                ("position", pa.int32()),
                ("token_id", pa.int32()),
                ("indices", pa.list_(pa.uint32())),
                ("values", pa.list_(pa.float32())),
            ]
        )
        table = pa.Table.from_pylist(self.features, schema)
        self._store("features.parquet", table, row_group_size=group_rows)
        if self.texts:
            self._store("texts.parquet", pa.Table.from_pylist(self.texts))
        (self.path / "manifest.json").write_text(json.dumps(self.manifest | self.changes))
        return self.path

    def _store(self, name: str, table: pa.Table, **options: int) -> None:
        with (self.path / name).open("wb") as file:  # the folder's name need not be UTF-8
            pq.write_table(table, file, **options)


def make(
    path: Path,
    n: int = 12,
    *,
    seed: int = 0,
    recipe: Recipe = CONTRAST_RECIPE,
    positions: str = "last",
    first_record: int = 0,
    texts: bool = True,
) -> Made:
    """n samples with a gap in their record indices; equal prompts come in twos."""
    rng = random.Random(seed)
    names = [name for name, _, _ in SAES]
    metrics, features, texts_rows = [], [], []
    for row in range(n):
        index = first_record + row + row // 3
        metrics.append(
            {
                "sample_id": f"s{index}",
                "record_index": index,
                "domain": ("north", "south")[row % 2],
                "complexity": float(row % 5),
                "extra": json.dumps({"source": f"src {row % 3}", "score": row * 1.5}),
            }
        )
        for column in analysis_columns(names, recipe):
            value: Any = rng.uniform(-1, 1)
            if column.kind == "int":
                value = rng.randrange(1, 30)
            elif column.kind == "class":
                value = rng.choice(CLASSES)
            metrics[-1][column.name] = value
        for name in recipe.text_names:
            of = row // 2 if name == recipe.text_names[0] else row
            words = [f"{name}{of}", *(f" w{place}" for place in range(rng.randrange(3, 6)))]
            words = words if name != recipe.text_names[0] else [f"{name}{of}", " and"]
            ids = [1, *(100 * len(word) + place for place, word in enumerate(words))]
            starts = [0]
            for word in words:
                starts.append(starts[-1] + len(word))
            texts_rows.append(
                {
                    "sample_id": f"s{index}",
                    "record_index": index,
                    "text": name,
                    "content": "".join(words),
                    "token_ids": ids,
                    "token_starts": [0, *starts[:-1]],
                }
            )
            read = range(1, len(ids)) if positions == "all" else [len(ids) - 1]
            if positions in ("mean", "max"):
                read = [-1]
            for sae, layer, width in SAES:
                for position in read:
                    active = sorted(rng.sample(range(width), rng.choice([0, 1, 3, 8])))
                    features.append(
                        {
                            "sample_id": f"s{index}",
                            "record_index": index,
                            "text": name,
                            "sae": sae,
                            "layer": layer,
                            "hook_name": f"blocks.{layer}.hook_resid_post",
                            "position": position,
                            "token_id": ids[position] if position >= 0 else -1,
                            "indices": active,
                            "values": [rng.randrange(1, 400) / 8 for _ in active],
                        }
                    )
    return Made(
        path,
        metrics,
        features,
        texts_rows if texts else [],
        manifest_of(path, n, recipe, positions),
    )


def manifest_of(path: Path, n: int, recipe: Recipe, positions: str) -> dict[str, Any]:
    contrast = recipe.contrast
    return {
        "unit": path.name[-12:],
        "created": "2026-02-03T04:05:06+00:00",
        "input": {
            "name": f"{path.name}.jsonl",
            "sha256": hashlib.sha256(path.name.encode("utf-8", "surrogateescape")).hexdigest(),
            "bytes": 1,
        },
        "records": n,
        "rows": n,
        "rejects": 0,
        "model": {
            "name": "made-up",
            "architecture": "LlamaForCausalLM",
            "d_model": 8,
            "n_layers": 4,
            "dtype": "float32",
            "device": "cpu",
            "weights_sha256": "a" * 64,
            "settings_sha256": "b" * 64,
            "revision": None,
        },
        "saes": [
            {
                "name": name,
                "hook": f"blocks.{layer}.hook_resid_post",
                "layer": layer,
                "source": f"sae-{layer}",
                "architecture": "jumprelu",
                "hook_out": f"blocks.{layer}.hook_resid_post",
                "d_in": 8,
                "d_sae": width,
                "d_out": 8,
                "weights_sha256": str(layer) * 64,
                "prepend_bos": True,
                "revision": None,
                "card": {"mean_l0": None, "fvu": None},
                "fvu": 0.25,
                "mean_l0": 3.0,
                "far_from_card": None,
            }
            for name, layer, width in SAES
        ],
        "analysis_version": 4,
        "recipe": {
            "name": recipe.name,
            "texts": dict(recipe.templates),
            "contrast": None
            if contrast is None
            else {
                "reference": contrast.reference,
                "positive": contrast.positive,
                "negative": contrast.negative,
            },
            "joins": recipe.joins,
        },
        "config": {"analysis": {"positions": positions}, "model": {"name": "/nowhere/made-up"}, "sae": []},
        "versions": {"python": "3.11.7", "lensd": "0.1.0"},
        "files": [],
    }
