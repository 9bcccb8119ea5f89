"""Apache Spark, in a process of its own, as its users run it: local, with its vectorized Parquet reader."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SESSION = """
import json, os, sys
os.environ["PYSPARK_PYTHON"] = sys.executable
from pyspark.sql import SparkSession
spark = (
    SparkSession.builder.master("local[1]")
    .config("spark.ui.enabled", "false")
    .config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.driver.host", "127.0.0.1")
    .getOrCreate()
)
assert spark.conf.get("spark.sql.parquet.enableVectorizedReader") == "true"
answers = []
for expression in json.loads(sys.stdin.read()):
    try:
        found = eval(expression)
        answer = {"columns": found.dtypes, "rows": [row.asDict() for row in found.collect()]}
    except Exception as error:
        answer = {"error": str(error)}
    answers.append(answer)
sys.stdout.write("answers:" + json.dumps(answers))
"""


def missing() -> str | None:
    """Why Spark can't run here."""
    if importlib.util.find_spec("pyspark") is None:
        return "needs pyspark: pip install -c deploy/constraints.txt -e '.[spark]'"
    if shutil.which("java") is None:
        return "needs java (Debian: default-jre-headless)"
    return None


needs_spark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


def ask(*expressions: str, cwd: Path) -> list[dict[str, Any]]:
    """The answer to each expression over `spark`: `columns` with their types and `rows`, or an `error`."""
    environment = {name: value for name, value in os.environ.items() if name != "JAVA_TOOL_OPTIONS"}
    ran = subprocess.run(
        [sys.executable, "-c", SESSION],
        input=json.dumps(expressions),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    _, found, answers = ran.stdout.rpartition("answers:")
    assert found, ran.stderr[-3000:]
    return json.loads(answers)
