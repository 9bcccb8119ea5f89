from __future__ import annotations

import json
from collections import Counter

from daemon.config import PRESETS

RECORDS = [json.loads(line) for line in (PRESETS / "demo.jsonl").read_text(encoding="utf-8").splitlines()]
FIELDS = ["id", "domain", "complexity", "prompt", "fact", "hallucination"]


def test_there_are_fifty_samples_of_each_domain():
    assert Counter(record["domain"] for record in RECORDS) == {
        "entity": 50,
        "temporal": 50,
        "logical": 50,
        "adversarial": 50,
    }


def test_every_sample_is_complete_and_unlike_the_others():
    assert all(list(record) == FIELDS for record in RECORDS)
    assert len({record["id"] for record in RECORDS}) == len({record["prompt"] for record in RECORDS}) == 200
    for record in RECORDS:
        assert record["fact"] != record["hallucination"]
        assert all(record[field] == record[field].strip() != "" for field in FIELDS if field != "complexity")


def test_difficulty_runs_from_one_to_ten():
    assert {record["complexity"] for record in RECORDS} == set(range(1, 11))
