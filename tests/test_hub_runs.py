"""The whole daemon on a hub's model and dictionary: what it records, and how it ends when the hub fails."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon import cli
from daemon.config import load_config
from daemon.tools.verify import verify
from tests.support import families, hub_formats, tiny
from tests.support.hub import NONE, TROUBLES, Hub, hub_environment, hub_here, running_hub
from tests.support.hub_dictionaries import GEMMA_2, Dictionary, registered, save_dictionaries

HOOK = "blocks.1.hook_resid_post"
TOML = f"""
[model]
name = "x/y"
device = "cpu"

[[sae]]
release = "x/saes"
id = "{HOOK}"
"""


@pytest.fixture
def hub(tmp_path):
    with running_hub() as hub, hub_here(hub, tmp_path / "cache"):
        hub.add("x/y", tiny.save_llama(tmp_path / "model"))
        tiny.save_sae(tmp_path / "saes" / HOOK, HOOK)
        hub.add("x/saes", tmp_path / "saes")
        yield hub


def run(tmp_path: Path, toml: str = TOML) -> int:
    """Drain an inbox with one file; the exit code."""
    (tmp_path / "lensd.toml").write_text(toml)
    (tmp_path / "inbox").mkdir(exist_ok=True)
    tiny.write_json(tmp_path / "inbox" / "study.json", tiny.contrast_records(3))
    folders = ["--inbox", str(tmp_path / "inbox"), "--outbox", str(tmp_path / "outbox")]
    return cli.main(["run", "--once", "--no-http", "--config", str(tmp_path / "lensd.toml"), *folders])


def manifests(tmp_path: Path) -> list[dict]:
    paths = (tmp_path / "outbox").glob("*/manifest.json")
    return [json.loads(path.read_text()) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]


def test_commits_are_recorded_and_another_one_is_another_unit(hub: Hub, tmp_path):
    assert run(tmp_path) == 0
    (first,) = manifests(tmp_path)
    commits = [hub.repositories[repo].refs["main"] for repo in ("x/y", "x/saes")]
    assert [first["model"]["revision"], first["saes"][0]["revision"]] == commits
    (tmp_path / "saes" / "README.md").write_text("changed")
    commit = hub.add("x/saes", tmp_path / "saes")
    hub.requests.clear()
    assert run(tmp_path) == 0
    assert [asked for asked in hub.requests if "/x/y/" in asked] == ["GET /api/models/x/y/revision/main"]
    second = manifests(tmp_path)[-1]
    assert second["saes"][0]["revision"] == commit != commits[1]
    assert second["unit"] != first["unit"]
    pinned = TOML.replace("[[sae]]", f'[[sae]]\nrevision = "{commits[1]}"')
    hub.down()
    assert run(tmp_path, pinned) == 0
    assert {one["unit"] for one in manifests(tmp_path)} == {first["unit"], second["unit"]}


def test_verify_reads_the_commits_that_a_run_reads(hub: Hub, tmp_path):
    pinned = hub.repositories["x/saes"].refs["main"]
    tiny.save_sae(tmp_path / "other" / HOOK, HOOK, seed=7)
    hub.add("x/saes", tmp_path / "other")
    (tmp_path / "lensd.toml").write_text(TOML.replace("[[sae]]", f'[[sae]]\nrevision = "{pinned}"'))
    config = load_config(tmp_path / "lensd.toml", {}, {})
    file = tiny.write_json(tmp_path / "in.json", tiny.contrast_records(3))
    found = verify(config, file, samples=None, batch_sizes=(1,))
    assert found.passed and found.samples == 3


ENDS = {
    "gated": (2, r"\(http://\S+/x/y\): accept its licence"),
    "no repository": (2, "no such repository"),
    "busy": (3, "429"),
}


def test_a_run_ends_with_the_hubs_line_and_the_code_of_whose_it_is(hub: Hub, tmp_path, capsys):
    for trouble, (code, said) in ENDS.items():
        hub.suffers(dataclasses.replace(TROUBLES[trouble]))
        assert run(tmp_path) == code
        last = json.loads(capsys.readouterr().err.splitlines()[-1])
        assert last["event"] == "service.failed" and re.search(said, last["message"]), last
    hub.suffers(NONE)
    assert run(tmp_path) == 0


def test_from_a_release_and_a_preference_set_to_results(tmp_path, monkeypatch):
    """All that is known is the name of a release, and a set of preferences in Parquet lies there."""
    release, model = "gemma-scope-2b-pt-res-canonical", "google/gemma-2-2b"
    monkeypatch.chdir(tmp_path)
    families.save_family(tmp_path / "model", "gemma2", num_hidden_layers=26)
    preferences = [
        {
            "prompt": f"Is {number} even?",
            "chosen": "Yes." if even else "No.",
            "rejected": "No." if even else "Yes.",
        }
        for number in range(5)
        for even in [number % 2 == 0]
    ]
    pq.write_table(pa.Table.from_pylist(preferences), "train.parquet")
    assert cli.main(["init", "--release", release]) == 0
    picked = [sae.id for sae in load_config(Path("lensd.toml"), {}, {}).sae]
    layers = [int(re.findall(r"\d+", sae_id)[0]) for sae_id in picked]
    dictionaries = [
        Dictionary(
            release,
            sae_id,
            model,
            hub_formats.gemma_scope_1,
            f"blocks.{layer}.hook_resid_post",
            overrides=GEMMA_2,
        )
        for sae_id, layer in zip(picked, layers, strict=True)
    ]
    with running_hub() as hub, hub_here(hub, tmp_path / "cache"), registered(dictionaries):
        hub.add(model, tmp_path / "model")
        save_dictionaries(hub, tmp_path / "files", dictionaries)
        Path("inbox").mkdir()
        shutil.copy("train.parquet", "inbox")
        assert cli.main(["run", "--once", "--config", "lensd.toml"]) == 0
    (manifest,) = manifests(tmp_path)
    assert (manifest["rows"], manifest["rejects"]) == (5, 0)
    metrics = pq.read_table(next((tmp_path / "outbox").glob("*/metrics.parquet")))
    names = [f"l{layer}_{text}_l0_norm" for layer in layers for text in ("prompt", "chosen", "rejected")]
    assert not any(metrics[name].null_count for name in [*names, "centroid_drift_diff"])


CHECK = "import sys; from daemon.cli import main; sys.exit(main(['check-config', '--config', 'lensd.toml']))"


@pytest.mark.slow
def test_a_process_of_its_own_takes_the_hub_of_its_environment(tmp_path):
    """Once with an empty cache, and once from it with the hub away."""
    with running_hub() as hub:
        hub.add("x/y", tiny.save_llama(tmp_path / "model"))
        tiny.save_sae(tmp_path / "saes" / HOOK, HOOK)
        hub.add("x/saes", tmp_path / "saes")
        (tmp_path / "lensd.toml").write_text(TOML)
        own = hub_environment(hub, tmp_path / "hf") | {"PYTHONPATH": os.pathsep.join(sys.path)}

        def check() -> subprocess.CompletedProcess[str]:
            environment = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"} | own
            return subprocess.run(
                [sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True
            )

        assert check().returncode == 0
        hub.down()
        hub.requests.clear()
        away = check()
        assert away.returncode == 0, away.stderr
        assert hub.requests == []
