"""A file of which no record comes to a row has failed, at whatever stage its records were rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daemon import cli
from daemon.config import Config, load_config
from daemon.errors import OutOfMemory
from daemon.executor import runner
from daemon.observe.recorder import Tally
from daemon.records import Outcome
from daemon.service import serve
from daemon.source.tokenizer import Tokenizer

QUESTION = {"q": "{question}"}
BAD = {
    "at the reader": ('{"text": ["a"]}\n' * 5 + "{oops\n" + '{"text": null}\n', {}, "bad_field", 6),
    "at the reader, own texts": ('{"label": "a"}\n' * 7, {"texts": QUESTION}, "missing_field", 7),
    "at the tokenizer": (
        '{"text": ""}\n{"text": "aaaaaaaaa"}\n' * 3 + '{"text": "aaaaaaaaa"}\n',
        {"batching.max_text_tokens": 4},
        "text_too_long",
        4,
    ),
    "at the device": ('{"text": "a"}\n{"text": "b"}\n' * 3 + '{"text": "c"}\n', {}, "out_of_memory", 7),
    "at each of them": (
        '{"text": ""}\n{"text": 1, "text": 2}\n{"text": "a"}\n{"text": ""}\n' + '{"text": "b"}\n' * 3,
        {},
        "out_of_memory",
        4,
    ),
}


def configured(toml: Path, inbox: Path, flags: dict[str, object]) -> Config:
    settings = {
        "inbox.path": inbox,
        "outbox.path": inbox.parent / "outbox",
        "inbox.settle_seconds": 0,
        "http.enabled": False,
    }
    return load_config(toml, {}, {**settings, **flags})


def drain(config: Config) -> tuple[Tally, list[Outcome]]:
    outcomes: list[Outcome] = []
    return serve(config, once=True, on_outcome=outcomes.append), outcomes


def published(inbox: Path) -> list[str]:
    return [path.name for path in (inbox.parent / "outbox").iterdir() if not path.name.startswith(".")]


def no_memory(*_: object) -> None:
    raise OutOfMemory("no memory for it")


@pytest.mark.parametrize("part_records", [1, 3, 100])
@pytest.mark.parametrize("where", BAD)
def test_it_fails_with_its_rejects_counted_and_publishes_nothing(
    tiny_toml, inbox, monkeypatch, where, part_records
):
    content, flags, reason, count = BAD[where]
    if "out_of_memory" in reason:
        monkeypatch.setattr(runner.BatchRunner, "run", no_memory)
    (inbox / "bad.jsonl").write_text(content)
    if "memory" not in reason:
        key = "question" if "texts" in flags else "text"
        (inbox / "good.jsonl").write_text(json.dumps({key: "ab"}) + "\n{oops\n")
    config = configured(tiny_toml, inbox, {**flags, "inbox.part_records": part_records})
    tally, outcomes = drain(config)

    (failed,) = [outcome for outcome in outcomes if outcome.name == "bad.jsonl"]
    note = json.loads((inbox / "failed/bad.jsonl.reason.json").read_text())
    assert (failed.kind, failed.folder) == ("failed", None)
    assert (inbox / "failed/bad.jsonl").read_text() == content
    assert note["reason"] == failed.reason == "no_usable_record"
    if not (where == "at the reader" and part_records < 100):  # where the first records tell no recipe
        assert note["records"] == 7 == sum(entry["count"] for entry in note["rejects"])
    if "own texts" in where or part_records == 100 or "at the tokenizer" in where:
        assert (note["rejects"][0]["reason"], note["rejects"][0]["count"]) == (reason, count)
        assert f"{count} {reason}" in note["message"]
    first = note["rejects"][0]
    assert note["message"].endswith(first["first_message"])
    assert f"line {first['first_line']}: " in note["message"]
    assert content.encode()[first["first_byte_offset"] :].startswith(b"{")
    assert [name for name in published(inbox) if name.startswith("bad")] == []
    assert not list((inbox.parent / "outbox/.staging").glob("*/*"))
    assert (tally.failed, tally.committed) == (1, len(outcomes) - 1)


def test_the_command_says_that_a_file_failed(tiny_toml, inbox, capsys):
    (inbox / "bad.jsonl").write_text('{"text": ""}\n')
    folders = ["--inbox", str(inbox), "--outbox", str(inbox.parent / "outbox")]
    assert cli.main(["run", "--once", "--no-http", "--config", str(tiny_toml), *folders]) == 1
    assert '"failed": 1' in capsys.readouterr().err


def test_one_that_is_dropped_again_with_other_settings_is_new_work(tiny_toml, inbox):
    (inbox / "t.jsonl").write_text('{"text": "too long by far"}\n')
    _, (first,) = drain(configured(tiny_toml, inbox, {"batching.max_text_tokens": 4}))
    assert first.reason == "no_usable_record"
    (inbox / "failed/t.jsonl").rename(inbox / "t.jsonl")
    _, (again,) = drain(configured(tiny_toml, inbox, {}))
    assert (again.kind, again.rows) == ("committed", 1)


def test_a_crash_leaves_it_to_the_next_start(tiny_toml, inbox, monkeypatch):
    (inbox / "bad.jsonl").write_text('{"text": ""}\n' * 5)
    config = configured(tiny_toml, inbox, {"inbox.part_records": 2})
    with monkeypatch.context() as crashing:
        crashing.setattr("daemon.sink.writer.UnitWriter.rejected_whole", lambda self: 1 / 0)
        with pytest.raises(BaseExceptionGroup):
            drain(config)
    assert list((inbox.parent / "outbox/.staging").glob("*/*.parts/*")), "no part was stored"
    tokenized: list[int] = []
    tokenize = Tokenizer.tokenize
    monkeypatch.setattr(
        Tokenizer, "tokenize", lambda self, parts: (tokenized.append(len(parts)), tokenize(self, parts))[1]
    )
    _, (outcome,) = drain(config)
    note = json.loads((inbox / "failed/bad.jsonl.reason.json").read_text())
    assert (outcome.kind, outcome.reason, note["records"]) == ("failed", "no_usable_record", 5)
    assert note["rejects"] == [
        {
            "reason": "empty_text",
            "count": 5,
            "first_line": 1,
            "first_byte_offset": 0,
            "first_message": "text 'text' has no tokens: give it some content",
        }
    ]
    assert not any(tokenized), "a part that is stored was read again"
    assert not list((inbox.parent / "outbox/.staging").glob("*/*"))
