"""Preference sets as TRL has them run as contrasts, without any configuration of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from daemon.config import Config, load_config
from daemon.observe.recorder import Tally
from daemon.service import serve
from tests.support import tiny
from tests.support.chats import CHATML, chat_tokenizer, save_chat_llama

QUESTIONS = ["What color is the sky?", "Is it warm?", "Who won?"]
CHOSEN = ["Blue.", "Yes, it is.", "We did."]
REJECTED = ["Green, I think.", "No.", "They did, of course."]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


TRIPLES = list(zip(QUESTIONS, CHOSEN, REJECTED, strict=True))
SHAPES: dict[str, list[dict[str, Any]]] = {
    "strings": [{"prompt": q, "chosen": f" {c}", "rejected": f" {r}"} for q, c, r in TRIPLES],
    "strings, the prompt in them": [{"chosen": f"{q} {c}", "rejected": f"{q} {r}"} for q, c, r in TRIPLES],
    "conversations": [
        {"prompt": [user(q)], "chosen": [assistant(c)], "rejected": [assistant(r)]} for q, c, r in TRIPLES
    ],
    "conversations, the prompt in them": [
        {"chosen": [user(q), assistant(c)], "rejected": [user(q), assistant(r)], "score": 1.5}
        for q, c, r in TRIPLES
    ],
    "conversations, the prompt as a string too": [
        {"prompt": q, "chosen": [user(q), assistant(c)], "rejected": [user(q), assistant(r)]}
        for q, c, r in TRIPLES
    ],
}


@pytest.fixture(scope="module")
def toml(tmp_path_factory) -> Path:
    """A model with a chat template, and two dictionaries."""
    folder = tmp_path_factory.mktemp("chat-llama")
    saes = [tiny.save_sae(folder / f"sae-{n}", f"blocks.{n}.hook_resid_post", seed=n) for n in (0, 1)]
    made = tiny.Tiny(save_chat_llama(folder / "model", CHATML), tuple(saes))
    (folder / "lensd.toml").write_text(made.toml())
    return folder / "lensd.toml"


def configured(toml: Path, folder: Path, **settings: Any) -> Config:
    flags = {"inbox.path": folder / "inbox", "outbox.path": folder / "outbox", "inbox.settle_seconds": 0}
    flags |= {"http.enabled": False, "batching.max_batch_tokens": 200}
    return load_config(toml, {}, flags | {key.replace("__", "."): value for key, value in settings.items()})


def run(config: Config, name: str, records: list[dict[str, Any]]) -> Tally:
    inbox = config.inbox.path
    inbox.mkdir(exist_ok=True, parents=True)
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(records), inbox / name)
    else:
        (inbox / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return serve(config, once=True)


def published(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """The manifest, the rows of metrics and those of features of the only folder."""
    (manifest,) = config.outbox.path.glob("*/manifest.json")
    tables = [
        pq.read_table(manifest.parent / f"{table}.parquet").to_pylist() for table in ("metrics", "features")
    ]
    return json.loads(manifest.read_text()), *tables


def own_ids(shape: str) -> list[list[list[int]]]:
    """The ids of each record's prompt, chosen and rejected by the tokenizer itself."""
    tokenizer = chat_tokenizer(CHATML)
    if shape.startswith("strings"):
        texts = [(q, f"{q} {c}", f"{q} {r}") for q, c, r in TRIPLES]
        return [[[tiny.BOS, *tokenizer(text)["input_ids"]] for text in three] for three in texts]
    chats = [([user(q)], [user(q), assistant(c)], [user(q), assistant(r)]) for q, c, r in TRIPLES]
    return [
        [
            [
                tiny.BOS,
                *tokenizer.apply_chat_template(chat, add_generation_prompt=len(chat) == 1)["input_ids"],
            ]
            for chat in three
        ]
        for three in chats
    ]


@pytest.mark.parametrize("name", ["set.jsonl", "set.parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_contrast_of_the_tokenizers_own_ids(toml, tmp_path, shape, name):
    config = configured(toml, tmp_path, analysis__positions="all")
    tally = run(config, name, SHAPES[shape])
    assert (tally.committed, tally.rows, tally.rejects) == (1, 3, 0)
    manifest, metrics, features = published(config)
    assert manifest["recipe"]["contrast"] == {
        "reference": "prompt",
        "positive": "chosen",
        "negative": "rejected",
    }
    expected = own_ids(shape)
    for row, texts in zip(metrics, expected, strict=True):
        counts = [row[f"n_tokens_{text}"] for text in ("prompt", "chosen", "rejected")]
        assert counts == list(map(len, texts))
        assert row["stability_diff"] is not None and row["centroid_drift_diff"] is not None
    for record, texts in enumerate(expected):
        for text, ids in zip(("prompt", "chosen", "rejected"), texts, strict=True):
            of_text = [row for row in features if (row["record_index"], row["text"]) == (record, text)]
            read = [row["token_id"] for row in of_text if row["layer"] == 0]
            assert read == ids[1:]


@pytest.mark.parametrize("shape", ["strings", "conversations"])
def test_the_completions_alone_can_be_read(toml, tmp_path, shape):
    config = configured(toml, tmp_path, analysis__tokens="completion", analysis__positions="all")
    assert run(config, "set.jsonl", SHAPES[shape]).rows == 3
    _, _, features = published(config)
    tokenizer = chat_tokenizer(CHATML)
    for record, (_, chosen, _) in enumerate(TRIPLES):
        of_text = [row for row in features if (row["record_index"], row["text"]) == (record, "chosen")]
        read = tokenizer.decode([row["token_id"] for row in of_text if row["layer"] == 0])
        assert read == (f" {chosen}" if shape == "strings" else f"{chosen}<|im_end|>\n")


def test_every_file_of_a_daemon_takes_its_own_recipe(toml, tmp_path):
    own = [{"name": "deep", "texts": {"said": "{turns[-1][text]} ({meta.source})"}}]
    config = configured(toml, tmp_path, recipe=own)
    config.inbox.path.mkdir(parents=True)
    (config.inbox.path / "deep.jsonl").write_text(
        '{"turns": [{"text": "a"}, {"text": "b"}], "meta": {"source": "s"}}'
    )
    (config.inbox.path / "chat.jsonl").write_text(json.dumps({"messages": [user("hi"), assistant("ho")]}))
    tally = run(config, "set.jsonl", SHAPES["strings"])
    assert (tally.committed, tally.rows) == (3, 5)
    manifests = [json.loads(path.read_text()) for path in config.outbox.path.glob("*/manifest.json")]
    assert sorted(manifest["recipe"]["name"] for manifest in manifests) == [
        "deep",
        "messages",
        "prompt-chosen-rejected",
    ]


def test_a_conversation_without_a_chat_template_fails_its_file_with_the_reason(tiny_toml, tmp_path):
    config = configured(tiny_toml, tmp_path)
    assert run(config, "set.jsonl", SHAPES["conversations"]).failed == 1
    (reason,) = (config.inbox.path / "failed").glob("*.reason.json")
    assert "the model's tokenizer has no chat template: use a model that has one" in reason.read_text()


def test_long_texts_are_cut_and_counted(toml, tmp_path):
    config = configured(toml, tmp_path, batching__max_text_tokens=20, batching__long_texts="keep_end")
    tally = run(config, "set.jsonl", SHAPES["conversations"])
    assert (tally.rows, tally.rejects) == (3, 0)
    _, metrics, _ = published(config)
    assert {row[f"n_tokens_{text}"] for row in metrics for text in ("prompt", "chosen", "rejected")} == {20}
