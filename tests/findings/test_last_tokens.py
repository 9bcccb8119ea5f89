"""Texts that are all read at one and the same token."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from daemon.findings.last_tokens import alike_note, last_tokens
from daemon.findings.study import open_study
from tests.support.outboxes import make


def test_tokens_are_counted_by_text(tmp_path: Path) -> None:
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=2)
    made.write()
    found = last_tokens(open_study([made.path]))
    for text in ("prompt", "fact", "hall"):
        rows = [row["token_id"] for row in made.features if row["text"] == text]
        assert found[text] == Counter(rows)


@pytest.mark.parametrize(("others", "is_said"), [(0, True), (1, True), (2, False)])
def test_nearly_all_texts_that_end_alike_are_told(tmp_path: Path, others: int, is_said: bool) -> None:
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=2)
    for row in made.features:
        if row["text"] == "fact":
            row["token_id"] = 198 if row["record_index"] >= others else 5
    made.write()
    note = alike_note(open_study([made.path]))
    assert ("of the fact texts it is token 198" in note) == is_said
    assert "hall" not in note


def test_all_positions_end_nowhere(tmp_path: Path) -> None:
    made = make(tmp_path / f"a-{'1' * 12}", 8, seed=2)
    for row in made.features:
        row["token_id"] = 198
    made.manifest["config"]["analysis"]["positions"] = "all"
    made.write()
    assert alike_note(open_study([made.path])) == ""
