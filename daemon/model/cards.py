"""Reads a dictionary's card: the mean L0 and the FVU that its makers measured, and its id at Neuronpedia.

SAELens's registry has these for releases; the metadata of some dictionaries has them too.
Knows no model.
"""

from __future__ import annotations

import math
import re
from typing import Any

from daemon.model_info import Fit

L0_KEYS = ("expected_l0", "l0")  # of the metadata, the first that is there
FVU_KEYS = ("expected_fvu", "fvu")
EXPLAINED_KEYS = ("expected_var_explained", "variance_explained", "explained_variance")
NEURONPEDIA_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)  # MODEL/SET, which stands in addresses
NO_L0, NO_EXPLAINED = 0.0, 1.0  # what the registry has where nothing is known


def card_of(sae: Any, release: str | None, sae_id: str | None) -> Fit:
    """The card of a SAELens dictionary, which came from a folder where it has no release."""
    metadata = vars(sae.cfg.metadata)
    l0 = first_number(metadata, L0_KEYS)
    fvu = first_number(metadata, FVU_KEYS)
    explained = first_number(metadata, EXPLAINED_KEYS)
    if release is not None and sae_id is not None:
        registered = of_registry(release, sae_id)
        l0 = registered.l0 if l0 is None else l0
        fvu = registered.fvu if fvu is None and explained is None else fvu
    if fvu is None and explained is not None:
        fvu = 1 - explained
    return Fit(l0, fvu)


def neuronpedia_id_of(sae: Any, release: str | None, sae_id: str | None) -> str | None:
    """The id at Neuronpedia, MODEL/SET, of a SAELens dictionary; None where it has none."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    found = [vars(sae.cfg.metadata).get("neuronpedia_id")]
    if release is not None and (known := get_pretrained_saes_directory().get(release)) is not None:
        found.append(known.neuronpedia_id.get(sae_id or ""))
    return next((one for one in found if isinstance(one, str) and NEURONPEDIA_ID.fullmatch(one)), None)


def of_registry(release: str, sae_id: str) -> Fit:
    """The card in SAELens's registry of a dictionary that it names."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    if known is None:
        return Fit()
    l0 = number(known.expected_l0.get(sae_id, NO_L0))
    explained = number(known.expected_var_explained.get(sae_id, NO_EXPLAINED))
    return Fit(
        None if l0 in (None, NO_L0) else l0,
        None if explained in (None, NO_EXPLAINED) else 1 - explained,
    )


def first_number(values: dict[str, Any], keys: tuple[str, ...]) -> float | None:
    return next((found for key in keys if (found := number(values.get(key))) is not None), None)


def number(value: Any) -> float | None:
    """A finite number that is not negative; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        return None
    return float(value)
