"""Which samples form a group, and which share their reference text."""

from __future__ import annotations

import json
from collections import defaultdict

import numpy as np
import pytest

from daemon.errors import ConfigError
from daemon.findings.clusters import clusters_of
from daemon.findings.grouping import group_samples
from daemon.findings.study import open_study
from tests.support.outboxes import make


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / f"a-{'1' * 12}", 40, seed=5)


def groups(made, by=None):
    made.write()
    grouping = group_samples(open_study([made.path]), by)
    return grouping, [None if group < 0 else grouping.names[group] for group in grouping.group.tolist()]


def test_domains_are_the_groups_unless_told_otherwise(made):
    made.metrics[3]["domain"] = None
    grouping, named = groups(made)
    assert grouping.column == "domain"
    assert named == [row["domain"] for row in made.metrics]


def test_without_domains_there_are_no_groups(made):
    for row in made.metrics:
        row["domain"] = None
    made.metrics[0]["domain"] = None
    grouping, named = groups(made)
    assert (grouping.column, grouping.names, set(named)) == (None, (), {None})


def test_many_domains_are_no_groups_and_a_note_says_so(made):
    for number, row in enumerate(made.metrics):
        row["domain"] = f"d{number}"
    grouping, named = groups(made)
    assert set(named) == {None}
    assert "domain has 40 different values" in grouping.note


def test_a_field_of_the_records_makes_groups(made):
    grouping, named = groups(made, "source")
    assert named == [json.loads(row["extra"])["source"] for row in made.metrics]
    assert grouping.names == ("src 0", "src 1", "src 2")


def test_numbers_of_few_values_are_groups_of_their_own(made):
    _, named = groups(made, "complexity")
    assert named == [f"{row['complexity']:g}" for row in made.metrics]


def test_numbers_of_many_values_are_cut_at_their_quartiles(made):
    scores = [json.loads(row["extra"])["score"] for row in made.metrics]
    grouping, named = groups(made, "score")
    assert len(grouping.names) == 4
    inside = defaultdict(list)
    for name, score in zip(named, scores, strict=True):
        inside[name].append(score)
    for name in grouping.names:
        assert name == f"{min(inside[name]):g} to {max(inside[name]):g}"
        assert len(inside[name]) == 10
    assert sorted(scores) == [score for name in grouping.names for score in inside[name]]


def test_equal_numbers_are_never_in_two_groups(made):
    rng = np.random.default_rng(0)
    for row in made.metrics:
        row["l1_fact_gini"] = float(rng.integers(0, 12) // 2 * 2 + rng.integers(0, 12) / 12)
        row["l1_fact_gini"] = 1.0 if row["l1_fact_gini"] < 7 else row["l1_fact_gini"]
    _, named = groups(made, "l1_fact_gini")
    by_value = defaultdict(set)
    for name, row in zip(named, made.metrics, strict=True):
        by_value[row["l1_fact_gini"]].add(name)
    assert all(len(names) == 1 for names in by_value.values())


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("nothing", "no sample has a value there: name another, such as domain, complexity, source, score"),
        ("sample_id", "no sample has a value there"),
        ("alike", "1 different values, where a report has room for 2 to 30"),
        ("title", "40 different values"),
    ],
)
def test_what_makes_no_groups_is_one_line(made, by, said):
    for number, row in enumerate(made.metrics):
        row["extra"] = json.dumps(json.loads(row["extra"]) | {"alike": True, "title": f"t{number}"})
    with pytest.raises(ConfigError) as caught:
        groups(made, by)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fields_that_are_no_values_make_no_groups(made):
    made.metrics[0]["extra"] = "no JSON"
    made.metrics[1]["extra"] = "[1]"
    made.metrics[2]["extra"] = '{"source": {"deep": 1}}'
    made.metrics[3]["extra"] = None
    _, named = groups(made, "source")
    assert named[:5] == [None, None, None, None, "src 1"]


def clusters(made):
    made.write()
    found, note = clusters_of(open_study([made.path]), "prompt")
    return found.tolist(), note


def numbered(keys):
    first = {}
    return [first.setdefault(key, len(first)) for key in keys]


def test_equal_prompts_are_one_cluster(made):
    prompts = [row["content"] for row in made.texts if row["text"] == "prompt"]
    found, note = clusters(made)
    assert found == numbered(prompts)
    assert max(found) + 1 == 20
    assert note == ""


def test_without_texts_equal_prompts_are_told_by_what_was_measured(made):
    prompts = [row["content"] for row in made.texts if row["text"] == "prompt"]
    made.texts = []
    rng = np.random.default_rng(1)
    measured = [name for name in made.metrics[0] if "_prompt" in name and "shape" not in name]
    first = {}
    for prompt, row in zip(prompts, made.metrics, strict=True):
        for name in measured:
            value = first.setdefault((prompt, name), row[name])
            row[name] = value if isinstance(value, int) else value * (1 + rng.normal(0, 1e-7))
    found, note = clusters(made)
    assert found == numbered(prompts)
    assert "no texts.parquet" in note


def test_a_lost_text_is_one_line(made):
    made.texts = [row for row in made.texts if row["sample_id"] != "s4"]
    with pytest.raises(ConfigError, match=r"texts\.parquet: has no text prompt of record_index 4"):
        clusters(made)
