"""`lensd explore`: hands published folders to embedding-atlas, which shows them in a browser.

Makes its tables in a temporary folder, starts its server on loopback, and ends both. embedding-atlas is a
program of its own here: this module imports nothing of it. `atlas_server` runs it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from daemon.errors import ConfigError, MachineError
from daemon.escaping import cut_short
from daemon.findings import compare
from daemon.findings.activations import count_activations
from daemon.findings.atlas_tables import SIDE, Drawn, draw, feature_table, gather, text_table
from daemon.findings.atlas_texts import read_contents
from daemon.findings.grouping import group_samples
from daemon.findings.layout import equal_shares, principal_components
from daemon.findings.paired_features import PairedSettings
from daemon.findings.progress import ReportProgress
from daemon.findings.study import TEXTS, Study, open_study

HOST = "127.0.0.1"
START_SECONDS = 120.0  # imports and reads the tables
SAMPLES_FILE, FEATURES_FILE, STATE_FILE, LOG_FILE = "samples.parquet", "features.parquet", "state.json", "log"
FEATURES_TABLE = "features"


def explore(paths: Sequence[Path], port: int | None, say: Callable[[str], None]) -> None:
    """Serve outboxes or published folders until Ctrl-C or SIGTERM; says the address.

    Raises ConfigError where embedding-atlas is missing, folders can't be read together or the port is taken,
    and MachineError where its server ends by itself.
    """
    require_embedding_atlas()
    study = open_study(paths)
    port = free_port(port)
    with interrupted_by_sigterm(), tempfile.TemporaryDirectory(prefix="lensd-explore-") as name:
        folder = Path(name)
        drawn = draw(study)
        for note in notes(drawn):
            say(note)
        write_tables(drawn, folder)
        with serving(folder, port) as server:
            say(f"http://{HOST}:{port}/")
            sys.stdout.flush()
            code = server.wait()
            raise MachineError(f"embedding-atlas ended with exit code {code}: {last_line(folder)}")


def require_embedding_atlas() -> None:
    if importlib.util.find_spec("embedding_atlas") is None:
        raise ConfigError('lensd explore needs embedding-atlas: pip install "lensd[explore]"')


def notes(drawn: Drawn) -> list[str]:
    """Return a line for each thing that is not shown as one would expect."""
    found = [] if drawn.note is None else [drawn.note]
    if not drawn.study.has(TEXTS):
        found.append(
            f"no {TEXTS} in every folder: samples without one are shown by their ids, not by their texts"
        )
    contrast = drawn.study.manifest.recipe.contrast
    if contrast is not None:
        one, other = (compare.tokens_of(drawn.study, text) for text in (contrast.positive, contrast.negative))
        if not (one == other).any():
            found.append(
                "no pair is of equal length: what holds does so by extrapolation of a regression alone"
            )
    return found


def write_tables(drawn: Drawn, folder: Path) -> None:
    """Write the two tables, and how the page begins."""
    gathered, read = gather(drawn), read_contents(drawn.study, drawn.samples)
    rows = equal_shares(gathered.by_text, [sae.d_sae for sae in drawn.study.saes])
    places = principal_components(rows)
    texts = text_table(drawn, read.contents, gathered.by_text, places)
    pq.write_table(texts, folder / SAMPLES_FILE)
    features = feature_table(drawn, read.words, gathered, verdicts_of(drawn.study))
    pq.write_table(features, folder / FEATURES_FILE)
    (folder / STATE_FILE).write_text(json.dumps(first_view(drawn, texts)))


def verdicts_of(study: Study) -> list[str] | None:
    """Return what a report says of each feature of each dictionary; None without a contrast."""
    contrast = study.manifest.recipe.contrast
    if contrast is None:
        return None
    pairs, _ = compare.pairs_of(study, contrast, group_samples(study, None))
    counts = count_activations(study)
    with ReportProgress() as progress, np.errstate(divide="ignore", invalid="ignore"):
        compared = compare.compare_features(study, contrast, pairs, counts, PairedSettings(), progress)
    found = compared.features
    begins = np.cumsum([0, *(sae.d_sae for sae in study.saes)])
    verdicts = np.full(begins[-1], "few", object)
    verdicts[begins[found.sae] + found.feature] = found.verdict
    return [str(verdict) for verdict in verdicts]


def first_view(drawn: Drawn, texts: pa.Table) -> dict[str, Any]:
    """Return the charts that the page begins with, as embedding-atlas describes them.

    With a contrast its list of features tells how well each tells the two texts apart.
    """
    features: dict[str, Any] = {
        "type": "features-list",
        "title": "Features",
        "data": {"features": "features"},
        "metadata": {
            "table": FEATURES_TABLE,
            "feature": "feature",
            "description": "description",
            "topics": "topics",
        },
        "sort": "frequency-descending",
    }
    hidden = "FILE_NAME, __row_index__, topics, description"
    if SIDE in texts.column_names:
        features["data"]["predict"] = SIDE
        features["sort"] = "predictiveness-descending"
    layout = {"x": "x", "y": "y", "text": "content", "category": "text"}
    shown = [name for name in texts.column_names if name not in ("features", "x", "y")]
    charts: list[dict[str, Any]] = [
        {"type": "embedding", "title": "Texts by their features", "data": layout},
        features,
        *(
            {"type": "count-plot", "title": name, "data": {"field": name}}
            for name in ("text", "domain", "folder")
            if texts[name].null_count < len(texts)
        ),
        {"type": "predicates", "title": "SQL predicates"},
        {"type": "instances", "title": "Texts", "columns": shown},
        {
            "type": "instances",
            "title": "Feature table",
            "query": f"SELECT * EXCLUDE ({hidden}) FROM {FEATURES_TABLE}",
        },
    ]
    return {"charts": {str(number): chart for number, chart in enumerate(charts, 1)}}


def free_port(port: int | None) -> int:
    """Return the port, or one that is free. Raises ConfigError where it is taken."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port or 0))
        except (OSError, OverflowError) as error:
            said = getattr(error, "strerror", None) or "no such port"
            raise ConfigError(f"--port {port}: {said}: name another, or leave it out") from None
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serving(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server of embedding-atlas until the block ends. Raises MachineError where none comes up."""
    with (folder / LOG_FILE).open("wb") as log:
        server = subprocess.Popen(
            command_line(port),
            cwd=folder,
            env=os.environ | offline(folder),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, which ends that one
        )
    try:
        wait_until_answers(server, folder, port)
        yield server
    finally:
        server.kill()  # it keeps nothing, and would wait for a browser's connections
        server.wait()


def command_line(port: int) -> list[str]:
    columns = ["--text", "content", "--x", "x", "--y", "y", "--features", "features", "--disable-projection"]
    table = ["--table", FEATURES_TABLE, FEATURES_FILE]
    table += ["--table-relation", FEATURES_TABLE, "mainKey=UNNEST(features);key=feature"]
    place = ["--duckdb", "wasm", "--host", HOST, "--port", str(port), "--no-auto-port"]
    command = [sys.executable, "-P", "-m", "daemon.findings.atlas_server", SAMPLES_FILE]
    return [*command, *columns, *table, "--state", STATE_FILE, *place]


def offline(folder: Path) -> dict[str, str]:
    """Return an environment without a hub, and without its cache, whose keys are names of files."""
    return {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }


def wait_until_answers(server: subprocess.Popen[bytes], folder: Path, port: int) -> None:
    limit = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=1):
            return
        if server.poll() is not None:
            raise MachineError(f"embedding-atlas did not start: {last_line(folder)}")
        if time.monotonic() > limit:
            raise MachineError(
                f"embedding-atlas did not answer in {START_SECONDS:.0f} s: {last_line(folder)}"
            )
        time.sleep(0.1)


def last_line(folder: Path) -> str:
    lines = (folder / LOG_FILE).read_text(errors="replace").split("\n")
    return cut_short(next((line for line in reversed(lines) if line.strip()), "it said nothing"), 300)


@contextlib.contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM and Ctrl-C end the block, after what it holds is let go."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, before)
