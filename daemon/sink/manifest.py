"""The manifest of a published folder. Pure: reads no file and no clock.

Knows how results are described, not how they are computed or published.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import asdict
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from daemon.analysis.columns import ANALYSIS_VERSION
from daemon.analysis.sae_fit import far_from_card
from daemon.escaping import printable_name
from daemon.model_info import Fit, ModelInfo, SaeInfo
from daemon.recipes import Recipe
from daemon.records import InputFile, StageSeconds, UnitTotals
from daemon.sink.jsontext import fields_of

DISTRIBUTIONS = ("lensd", "torch", "transformers", "transformer-lens", "sae-lens", "numpy", "pyarrow")


def manifest(
    *,
    file: InputFile,
    recipe: Recipe,
    info: ModelInfo,
    totals: UnitTotals,
    settings: dict[str, Any],
    seconds: float,
    created: datetime,
) -> dict[str, Any]:
    """The content of `manifest.json`, keys in the order of the file.

    `settings` is the configuration as JSON values; `seconds` runs from the first read of the file to its
    commit; `created` is in UTC.
    """
    return {
        "unit": file.unit,
        "created": created.isoformat(timespec="seconds"),
        "input": {
            "name": printable_name(file.claim.name),
            "sha256": file.sha256,
            "bytes": file.size,
        },
        "records": totals.records,
        "rows": totals.rows,
        "rejects": totals.rejects,
        "clipped": totals.clipped,
        "seconds": round(seconds, 6),
        "stage_seconds": describe_stages(totals.seconds),
        "model": describe_model(info),
        "saes": [
            describe_dictionary(sae, card)
            | {
                "fvu": fvu,
                "mean_l0": layer.mean_l0(),
                "far_from_card": far_from_card(Fit(layer.mean_l0(), fvu), card, layer.rows),
            }
            for sae, card, layer, fvu in zip(
                info.saes, info.known_fits, totals.layers, totals.fvu, strict=True
            )
        ],
        "analysis_version": ANALYSIS_VERSION,
        "recipe": describe_recipe(recipe),
        "config": settings,
        "versions": versions(),
        "files": [fields_of(file) for file in totals.files],
    }


def describe_stages(seconds: StageSeconds) -> dict[str, float]:
    return {stage: round(value, 6) for stage, value in fields_of(seconds).items()}


@functools.cache
def describe_model(info: ModelInfo) -> dict[str, Any]:
    fields = asdict(info)
    del fields["saes"], fields["cards"], fields["log_probs"]  # the last is in the settings
    return fields


def describe_dictionary(sae: SaeInfo, card: Fit) -> dict[str, Any]:
    return {
        "name": sae.name,
        "hook": sae.hook_name,
        "layer": sae.layer,
        "source": sae.source,
        "architecture": sae.architecture,
        "hook_out": sae.hook_name_out,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "d_out": sae.d_out,
        "weights_sha256": sae.weights_sha256,
        "settings_sha256": sae.settings_sha256,
        "prepend_bos": sae.prepend_bos,
        "revision": sae.revision,
        "neuronpedia_id": sae.neuronpedia_id,
        "card": {"mean_l0": card.l0, "fvu": card.fvu},
    }


def describe_recipe(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "texts": dict(recipe.templates),
        "contrast": asdict(recipe.contrast) if recipe.contrast else None,
        "joins": recipe.joins,
    }


@functools.cache
def versions() -> dict[str, str | None]:
    """Of Python and of the distributions that shape results, without importing them."""
    return {"python": platform.python_version()} | {name: installed(name) for name in DISTRIBUTIONS}


def installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
