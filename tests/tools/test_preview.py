"""`lensd check-config --file` shows how the first records of a file are read, without any weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from daemon import cli
from daemon.config import load_config
from daemon.service import serve
from tests.support import tiny
from tests.support.chats import CHATML, save_chat_llama

CHAT = [{"role": "user", "content": "Hi\u001b[31m"}, {"role": "assistant", "content": "Ho"}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    sae = tiny.save_sae(folder / "sae", "blocks.0.hook_resid_post")
    (folder / "lensd.toml").write_text(tiny.Tiny(save_chat_llama(folder / "model", CHATML), (sae,)).toml())
    return folder


@pytest.fixture
def bare(whole, tmp_path) -> Path:
    """A configuration of a model and a dictionary without weights."""
    for name in ("model", "sae"):
        shutil.copytree(whole / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "lensd.toml").write_text(tiny.Tiny(tmp_path / "model", (tmp_path / "sae",)).toml())
    return tmp_path


def shown(folder: Path, capsys, records: list[object], settings: str = "", code: int = 0) -> list[str]:
    file = folder / "some.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with (folder / "lensd.toml").open("a") as toml:
        toml.write(settings)
    assert cli.main(["check-config", "--config", str(folder / "lensd.toml"), "--file", str(file)]) == code
    told = capsys.readouterr()
    return (told.out if code == 0 else told.err).splitlines()


def test_a_conversation_is_shown_as_the_model_reads_it(bare, capsys):
    lines = shown(
        bare, capsys, [{"id": "a", "messages": CHAT}], '[analysis]\ntokens = "assistant"\npositions = "all"\n'
    )
    user = "<|im_start|>user\\nHi\\x1b[31m<|im_end|>\\n"
    assistant = "<|im_start|>assistant\\nHo<|im_end|>\\n"
    assert lines == [
        "ok: some.jsonl: recipe messages: texts messages",
        "ok: BOS before each text; tokens = assistant, positions = all, long_texts = reject",
        "record 0, line 1, id a",
        f'  messages, 31 tokens: "<bos>{user}{assistant}"',
        '    reads 4: "H" "o" "<|im_end|>" "\\n"',
    ]


def test_a_contrast_and_a_reject_are_shown(bare, capsys):
    records = [{"prompt": "a", "chosen": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c" * 400}]
    lines = shown(bare, capsys, records)
    assert lines[0] == (
        "ok: some.jsonl: recipe prompt-chosen-rejected: texts prompt, chosen, rejected, chosen against"
        " rejected relative to prompt"
    )
    assert lines[2].startswith(
        "record 0: rejected, missing_field: line 1: the record has no field 'rejected'"
    )
    assert lines[3:6] == ["record 1, line 2, id 1", '  prompt, 2 tokens: "<bos>a"', '    reads 1: "a"']
    assert re.fullmatch(r'  rejected, 403 tokens: "<bos>a c{113}" \.\.\. "c{120}"', lines[8])


def test_only_the_first_records_are_shown(bare, capsys):
    lines = shown(bare, capsys, [{"text": str(number)} for number in range(2000)])
    assert [line for line in lines if line.startswith("record")] == [
        f"record {number}, line {number + 1}, id {number}" for number in range(5)
    ]


def test_a_file_that_no_recipe_fits_is_one_line(bare, capsys):
    (line,) = shown(bare, capsys, [{"label": 1}], code=1)
    assert line.startswith(
        "lensd: some.jsonl: the records have neither fact and hallucination and prompt nor"
    )


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([{"text": "b" * 3000}], "its only record can't be used: text_too_long, line 1: text 'text' has "),
        ([{"text": ""}, {"text": "b" * 3000}, {"text": "b" * 3000}], "none of its 3 records can be used: 2 "),
        ([{"text": "b" * 3000}] * 6 + [{"text": "a"}], "none of its first 5 records can be used: 5 text_too"),
    ],
)
def test_a_file_of_which_nothing_shown_can_be_used_is_exit_code_1(bare, capsys, records, said):
    file = bare / "some.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    with (bare / "lensd.toml").open("a") as toml:
        toml.write("[batching]\nmax_text_tokens = 1000\n")
    assert cli.main(["check-config", "--config", str(bare / "lensd.toml"), "--file", str(file)]) == 1
    told = capsys.readouterr()
    assert told.err.startswith(f"lensd: some.jsonl: {said}") and told.err.count("\n") == 1
    assert "ok:" not in told.out
    shown = told.out.splitlines()
    assert shown[0] == "rejected: some.jsonl: recipe text: texts text"
    assert sum(line.startswith("record ") for line in shown) == min(5, len(records))


def test_a_folder_is_no_file_to_show(bare, capsys):
    assert cli.main(["check-config", "--file", str(bare)]) == 2
    assert capsys.readouterr().err == f"lensd: {bare}: is a folder: name a file in it\n"


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("tokens", ["all", "user", "assistant"])
def test_it_shows_the_tokens_that_a_run_reads(whole, tmp_path, capsys, tokens, positions):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    settings = f'[analysis]\ntokens = "{tokens}"\npositions = "{positions}"\n'
    lines = shown(folder, capsys, [{"messages": CHAT}], settings)
    flags = {"inbox.path": tmp_path / "in", "outbox.path": tmp_path / "out", "inbox.settle_seconds": 0}
    flags |= {"http.enabled": False, "batching.max_batch_tokens": 99}
    (tmp_path / "in").mkdir()
    shutil.copy(folder / "some.jsonl", tmp_path / "in" / "some.jsonl")
    assert serve(load_config(folder / "lensd.toml", {}, flags), once=True).rows == 1
    (features,) = (tmp_path / "out").glob("*/features.parquet")
    ids = pq.read_table(features)["token_id"].to_pylist()
    assert lines[-1].startswith(f"    reads {len(ids)}: ")


def test_dictionaries_that_read_both_ways_are_told(bare, capsys):
    shutil.copytree(bare / "sae", bare / "other")
    other = f'[[sae]]\npath = "{bare / "other"}"\nname = "bare"\nprepend_bos = false\n'
    lines = shown(bare, capsys, [{"text": "ab"}], other)
    assert lines[1].startswith("ok: texts are read with BOS, as shown, and without; tokens = all,")
    assert lines[3] == '  text, 3 tokens: "<bos>ab"'
