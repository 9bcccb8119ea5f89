"""Which samples form a group, and which share their reference text."""

from __future__ import annotations

import itertools
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
        ("sample_id", "every sample has one of its own: name another, such as domain, complexity, source"),
        ("alike", "1 different value, where a report has room for 2 to 30"),
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


def field(made, name, values):
    for row, value in zip(made.metrics, itertools.cycle(values), strict=False):
        row["extra"] = json.dumps(json.loads(row["extra"]) | {name: value})
    grouping, _ = groups(made, name)
    assert len(set(grouping.names)) == len(grouping.names) == len(set(grouping.group.tolist()) - {-1})
    return grouping.names


def test_texts_that_begin_alike_are_groups_of_their_own(made):
    begun = "https://example.org/" + "deep/" * 20
    names = field(made, "page", [begun + "A", begun + "B", begun + "A" + "x" * 80 + "C", "short"])
    assert max(map(len, names)) <= 60
    assert [name[-1] for name in names] == ["A", "C", "B", "t"]


def test_texts_alike_at_both_ends_are_numbered(made):
    names = field(made, "page", ["a" * 90 + str(number) + "b" * 90 for number in range(3)])
    assert [name[-3:] for name in names] == ["(1)", "(2)", "(3)"]


def test_whole_numbers_are_shown_with_all_their_digits(made):
    assert field(made, "year", [20240101, 20240102, 5]) == ("5", "20240101", "20240102")
    assert field(made, "year", [2**53, 2**53 + 1]) == (str(2**53), str(2**53 + 1))
    assert field(made, "year", [0.1, 0.10000000001, 2.0, 10]) == ("0.1", "0.10000000001", "2", "10")
    names = field(made, "year", list(range(20240101, 20240141)))
    assert names[0] == "20240101 to 20240110"
    assert names[-1] == "20240131 to 20240140"


def test_a_number_and_its_text_are_two_groups(made):
    assert field(made, "kind", [1, "1", True, "true", 1.0]) == ("1", "true", '"1"', '"true"')


def test_numbers_beyond_float64_are_text(made):
    assert field(made, "huge", [10**400, 10**400 + 1, 3])[0] == "3"
    assert len(field(made, "huge", [10**400 + number for number in range(12)])) == 12


def test_numbers_that_are_none_are_no_values(made):
    assert field(made, "part", [1.5, float("nan"), 2.5, float("inf"), None])[:2] == ("1.5", "2.5")


def clusters(made):
    made.write()
    found, note = clusters_of(open_study([made.path]), "prompt")
    return found.tolist(), note


def same_clusters(found, keys):
    return len(set(found)) == len(set(keys)) == len(set(zip(found, keys, strict=True)))


def test_equal_prompts_are_one_cluster(made):
    prompts = [row["content"] for row in made.texts if row["text"] == "prompt"]
    found, note = clusters(made)
    assert same_clusters(found, prompts)
    assert max(found) + 1 == 20
    assert note == ""


def test_numbers_of_clusters_do_not_depend_on_the_order_of_samples(made, tmp_path):
    other = make(tmp_path / f"b-{'2' * 12}", 30, seed=6, first_record=100)
    for row in other.texts[:40]:
        row["content"] += " too"
    paths = [made.write(), other.write()]
    by_path = []
    for order in (paths, paths[::-1]):
        study = open_study(order)
        found = clusters_of(study, "prompt")[0]
        parts = [found[first:last].tolist() for first, last in itertools.pairwise(study.starts)]
        by_path.append({folder.path: part for folder, part in zip(study.folders, parts, strict=True)})
    assert by_path[0] == by_path[1]


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
    assert same_clusters(found, prompts)
    assert "no texts.parquet" in note


def test_a_lost_text_is_one_line(made):
    made.texts = [row for row in made.texts if row["sample_id"] != "s4"]
    with pytest.raises(ConfigError, match=r"texts\.parquet: has no text prompt of record_index 4"):
        clusters(made)
