"""Names the packages that a quantised checkpoint needs, before a library does at length. Knows no weights."""

from __future__ import annotations

import importlib.util
from typing import Any

from daemon.errors import ConfigError

# By quant_method: what is imported, and the package that brings it.
PACKAGES: dict[str, tuple[tuple[str, str], ...]] = {
    "bitsandbytes": (("bitsandbytes", "bitsandbytes"),),
    "gptq": (("optimum", "optimum"), ("gptqmodel", "gptqmodel")),
    "awq": (("gptqmodel", "gptqmodel"),),
    "auto-round": (("auto_round", "auto-round"),),
    "compressed-tensors": (("compressed_tensors", "compressed-tensors"),),
    "torchao": (("torchao", "torchao"),),
    "quanto": (("optimum.quanto", "optimum-quanto"),),
    "fbgemm_fp8": (("fbgemm_gpu", "fbgemm-gpu"),),
    "hqq": (("hqq", "hqq"),),
    "aqlm": (("aqlm", "aqlm"),),
    "vptq": (("vptq", "vptq"),),
    "higgs": (("flute", "flute-kernel"), ("fast_hadamard_transform", "fast-hadamard-transform")),
    "spqr": (("spqr_quant", "spqr_quant"),),
    "quark": (("quark", "amd-quark"),),
    "eetq": (("kernels", "kernels"),),
    "sinq": (("sinq", "sinq"),),
    "fp_quant": (("fp_quant", "fp_quant"),),
}


def check_packages(quantization: Any, what: str) -> None:
    """Raises ConfigError where a package for a `quantization_config` is missing."""
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    method = method or getattr(quantization, "quant_method", None)
    if (
        method is None
        and isinstance(quantization, dict)
        and {"load_in_8bit", "load_in_4bit"} & set(quantization)
    ):
        method = "bitsandbytes"  # as it was written before there were others
    if method is None:
        raise ConfigError(
            f"{what}: quantization_config in its config.json names no quant_method: complete it, or use the"
            " unquantised version"
        )
    method = str(getattr(method, "value", method))
    if method not in PACKAGES and method not in known_methods():
        raise ConfigError(
            f"{what}: is quantised by {method[:40]!r}, which Transformers does not know and would leave out:"
            " use the unquantised version"
        )
    missing = [package for module, package in PACKAGES.get(method, ()) if not installed(module)]
    if missing:
        raise ConfigError(
            f"{what}: is quantised by {method[:40]}, which needs {' and '.join(missing)}: pip install"
            f" {' '.join(missing)}, or use the unquantised version"
        )


def known_methods() -> set[str]:
    """Every quant_method of this version of Transformers."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    return set(AUTO_QUANTIZATION_CONFIG_MAPPING)


def installed(module: str) -> bool:
    """Whether a module can be imported, found without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # of a parent that is not there
        return False
