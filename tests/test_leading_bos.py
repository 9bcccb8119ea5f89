"""A BOS token at a text's beginning, whoever put it there, is none of those read with all, mean and max."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from daemon.config import load_config
from daemon.service import serve
from tests.support import tiny
from tests.support.chats import save_chat_llama

ENDED = "{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}"  # by what BOS is, too
HOOK = "blocks.0.hook_resid_post"
NAMES = {True: "bos", False: "bare"}
WAYS = {"with": [True], "without": [False], "both": [True, False]}


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return save_chat_llama(folder / "model", ENDED), tiny.save_sae(folder / "sae", HOOK)


def run(parts, folder: Path, records: list[object], ways: list[bool], **flags: object) -> dict[str, list]:
    model, sae = parts
    text = f'[model]\nname = "{model}"\n'
    for way in ways:
        text += f'[[sae]]\npath = "{sae}"\nname = "{NAMES[way]}"\nprepend_bos = {str(way).lower()}\n'
    (folder / "lensd.toml").write_text(text)
    (folder / "in").mkdir()
    (folder / "in" / "some.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    named = {"inbox.path": folder / "in", "outbox.path": folder / "out", "inbox.settle_seconds": 0}
    named |= {"http.enabled": False, "batching.max_batch_tokens": 99}
    named |= {name.replace("__", "."): value for name, value in flags.items()}
    serve(load_config(folder / "lensd.toml", {}, named), once=True)
    (published,) = (folder / "out").glob("some-*")
    rejects = published / "rejects.jsonl"
    return {
        "metrics": pq.read_table(published / "metrics.parquet").to_pylist(),
        "features": pq.read_table(published / "features.parquet").to_pylist(),
        "texts": pq.read_table(published / "texts.parquet").to_pylist(),
        "rejects": [json.loads(line) for line in rejects.read_text().splitlines()]
        if rejects.is_file()
        else [],
    }


def test_a_token_that_is_read_without_the_bos_that_was_added_is_one_further_in_its_text(parts, tmp_path):
    records = [{"text": "ab"}, {"text": "<bos>cd"}]
    found = run(parts, tmp_path, records, [True, False], analysis__positions="all")
    ids = [row["token_ids"] for row in found["texts"]]
    assert [row["content"] for row in found["texts"]] == ["ab", "<bos>cd"]
    assert [row["token_starts"] for row in found["texts"]] == [[0, 0, 1], [0, 5, 6]]
    assert {(row["sae"], row["record_index"]) for row in found["features"]} == {
        (sae, record) for sae in ("bos", "bare") for record in (0, 1)
    }
    for row in found["features"]:
        further = int(row["sae"] == "bare" and row["record_index"] == 0)
        assert ids[row["record_index"]][row["position"] + further] == row["token_id"]


def chat(name: str, asked: str) -> dict[str, object]:
    said = {"user": asked, "assistant": "yo"}
    return {"id": name, "messages": [{"role": role, "content": content} for role, content in said.items()]}


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("positions", ["all", "mean", "max"])
def test_a_text_of_which_its_bos_alone_counts_is_a_reject(parts, tmp_path, positions, ways):
    records = [chat("good", "hi"), chat("bad", ""), chat("fine", "ho")]
    flags = {"analysis__tokens": "user", "analysis__positions": positions}
    found = run(parts, tmp_path, records, WAYS[ways], **flags)
    assert [row["sample_id"] for row in found["metrics"]] == ["good", "fine"]
    (reject,) = found["rejects"]
    assert reject["reason"] == "no_token_counts" and "has no token of the user" in reject["message"]


@pytest.mark.parametrize("positions", ["all", "mean", "max"])
def test_a_text_that_is_nothing_but_bos_is_a_reject(parts, tmp_path, positions):
    records = [{"id": "good", "text": "hi"}, {"id": "bad", "text": "<bos>"}]
    found = run(parts, tmp_path, records, [False], analysis__positions=positions)
    assert [row["sample_id"] for row in found["metrics"]] == ["good"]
    (reject,) = found["rejects"]
    assert reject["reason"] == "no_token_counts" and "has no token but BOS" in reject["message"]


@pytest.mark.parametrize("positions", ["all", "mean", "max"])
def test_a_texts_own_bos_is_left_out_by_each_dictionary(parts, tmp_path, positions):
    """The same dictionary twice: what a text begins with itself, both read alike."""
    found = run(
        parts, tmp_path, [{"text": "<bos>hi"}, {"text": "ho"}], [True, False], analysis__positions=positions
    )
    bos, bare = ([row for row in found["features"] if row["sae"] == NAMES[way]] for way in (True, False))
    own = len(bos) // 2  # rows of the first sample
    for ours, theirs in zip(bos[:own], bare[:own], strict=True):
        assert (ours["indices"], ours["values"]) == (theirs["indices"], pytest.approx(theirs["values"]))
        assert ours["position"] == theirs["position"] != 0
    if positions == "all":
        assert [[row["position"] for row in rows] for rows in (bos, bare)] == [[1, 2, 1, 2], [1, 2, 0, 1]]


def test_the_last_token_may_be_bos(parts, tmp_path):
    found = run(parts, tmp_path, [chat("one", "")], [True], analysis__tokens="user")
    assert [row["position"] for row in found["features"]] == [0]
