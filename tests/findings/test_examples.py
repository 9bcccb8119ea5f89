"""Examples of features on their words, against the rows of both files."""

from __future__ import annotations

import numpy as np
import pytest

from daemon.findings import details, examples
from daemon.findings.activations import count_activations
from daemon.findings.clusters import clusters_of
from daemon.findings.grouping import group_samples
from daemon.findings.progress import ReportProgress
from daemon.findings.results import ShownToken
from daemon.findings.study import open_study
from daemon.findings.words import Words
from tests.support.outboxes import SAES, make

SIDES = ("fact", "hall")
WANTED = [(0, 3), (1, 7), (0, 20), (1, 24)]


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(
        details,
        "words_of",
        lambda study, wanted: {
            (sae, feature): Words(missing="not here")
            for sae, some in wanted.items()
            for feature in some.tolist()
        },
    )


def shown(made):
    study = open_study([made.path])
    counts = count_activations(study)
    cluster, _ = clusters_of(study, "prompt")
    grouping = group_samples(study, None)
    with ReportProgress() as progress:
        return details.details_of(
            study, counts, WANTED, details.Shown(SIDES, cluster, grouping), progress
        ), cluster


def activation_of(made, index, text, sae, feature):
    """By position, and their mean, of one text and feature."""
    rows = [
        row
        for row in made.features
        if (row["record_index"], row["text"], row["sae"]) == (index, text, SAES[sae][0])
    ]
    by_position = {
        row["position"]: dict(zip(row["indices"], row["values"], strict=True)).get(feature, 0.0)
        for row in rows
    }
    return by_position, sum(by_position.values()) / len(by_position)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_examples_are_the_strongest_and_their_tokens_as_stored(tmp_path, positions):
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=8, positions=positions)
    made.write(group_rows=23)
    found, cluster = shown(made)
    contents = {(row["record_index"], row["text"]): row for row in made.texts}
    for detail, (sae, feature) in zip(found, WANTED, strict=True):
        assert (detail.sae, detail.feature) == (sae, feature)
        strength = {
            row["record_index"]: max(
                activation_of(made, row["record_index"], text, sae, feature)[1] for text in SIDES
            )
            for row in made.metrics
        }
        best = {}
        for place, row in enumerate(made.metrics):
            value = strength[row["record_index"]]
            best[cluster[place]] = max(best.get(cluster[place], 0.0), value)
        expected = sorted((value for value in best.values() if value > 0), reverse=True)[:5]
        assert [strength[example.record_index] for example in detail.examples] == pytest.approx(expected)
        for example in detail.examples:
            assert example.sample_id == f"s{example.record_index}"
            for text, name in zip(example.texts, SIDES, strict=True):
                by_position, mean = activation_of(made, example.record_index, name, sae, feature)
                assert text.name == name
                assert text.activation == pytest.approx(mean)
                row = contents[example.record_index, name]
                assert "".join(token.text for token in text.tokens) == row["content"]
                for position, token in enumerate(text.tokens):
                    assert token.activation == by_position.get(position)
                peaks = [position for position, token in enumerate(text.tokens) if token.is_peak]
                top = max(by_position, key=lambda position: by_position[position])
                assert peaks == ([top] if by_position[top] > 0 else [])
                assert text.position == (top if by_position[top] > 0 else None)


def test_histograms_and_groups_count_every_text(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=9)
    made.write()
    found, _ = shown(made)
    for detail, (sae, feature) in zip(found, WANTED, strict=True):
        rates = {}
        for text, counts in detail.histogram:
            values = [activation_of(made, row["record_index"], text, sae, feature)[1] for row in made.metrics]
            positive = [value for value in values if value > 0]
            expected, _ = np.histogram(positive, detail.histogram_edges)
            np.testing.assert_array_equal(counts, expected)
            assert counts.sum() == len(positive)
            for group in ("north", "south"):
                inside = [v for v, row in zip(values, made.metrics, strict=True) if row["domain"] == group]
                rates[group, text] = sum(value > 0 for value in inside) / len(inside)
        assert detail.groups == tuple(
            (group, rates[group, "fact"], rates[group, "hall"], 15) for group in ("north", "south")
        )
        assert detail.words_missing == "not here"
        assert detail.link is None


def test_without_texts_there_are_activations_and_no_words(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=8, texts=False)
    made.write()
    found, _ = shown(made)
    texts = [text for detail in found for example in detail.examples for text in example.texts]
    assert texts
    assert all(text.tokens == () for text in texts)
    assert any(text.activation > 0 for text in texts)


def test_pooled_positions_colour_no_token(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=8, positions="max")
    made.write()
    found, _ = shown(made)
    texts = [text for detail in found for example in detail.examples for text in example.texts]
    assert all(token.activation is None for text in texts for token in text.tokens)
    assert all(text.position is None for text in texts)


def test_links_to_neuronpedia_where_the_dictionary_has_an_id(tmp_path):
    made = make(tmp_path / f"a-{'1' * 12}", 30, seed=8)
    made.manifest["saes"][0]["neuronpedia_id"] = "gpt2-small/4-res-jb"
    made.write()
    found, _ = shown(made)
    assert [detail.link for detail in found] == [
        "https://www.neuronpedia.org/gpt2-small/4-res-jb/3",
        None,
        "https://www.neuronpedia.org/gpt2-small/4-res-jb/20",
        None,
    ]


def row_of(content, ids, starts):
    return examples.TextRow(content, np.array(ids), None if starts is None else np.array(starts))


def read_at(positions, tokens, values):
    return examples.Readings(np.array(positions), np.array(tokens), np.array(values, float))


def test_long_texts_are_cut_around_the_peak():
    content = "".join(f"<{number:03}>" for number in range(100))
    row = row_of(content, list(range(100)), list(range(0, 500, 5)))
    text = examples.show_text("t", row, read_at(range(100), range(100), [0.0] * 60 + [2.0] + [1.0] * 39), 0.4)
    assert [token.text for token in text.tokens] == [f"<{number:03}>" for number in range(40, 81)]
    assert text.tokens[20] == ShownToken("<060>", 2.0, is_peak=True)
    assert (text.cut_before, text.cut_after, text.position) == (True, True, 60)
    end = examples.show_text("t", row, read_at([99], [99], [3.0]), 3.0)
    assert [token.text for token in end.tokens] == [f"<{number:03}>" for number in range(79, 100)]
    assert (end.cut_before, end.cut_after) == (True, False)


def test_positions_that_count_another_bos_are_moved():
    row = row_of("ab", [7, 8], [0, 1])  # without BOS; the SAE read the text with it
    text = examples.show_text("t", row, read_at([1, 2], [7, 8], [0.0, 4.0]), 2.0)
    assert text.tokens == (ShownToken("a", 0.0), ShownToken("b", 4.0, is_peak=True))
    other = row_of("ab", [1, 7, 8], [0, 0, 1])  # with BOS; the SAE read the text without
    text = examples.show_text("t", other, read_at([0, 1], [7, 8], [0.0, 4.0]), 2.0)
    assert text.tokens == (ShownToken("", None), ShownToken("a", 0.0), ShownToken("b", 4.0, is_peak=True))


@pytest.mark.parametrize(
    "row",
    [
        row_of("x" * 500, [7, 8], None),  # places not known
        row_of("x" * 500, [5, 6], [0, 1]),  # other tokens than were read
    ],
)
def test_a_text_whose_tokens_can_t_be_placed_is_shown_as_a_whole(row):
    text = examples.show_text("t", row, read_at([0, 1], [7, 8], [0.0, 4.0]), 2.0)
    assert text.tokens == (ShownToken("x" * examples.MOST_CHARS, None),)
    assert (text.cut_before, text.cut_after, text.activation) == (True, False, 2.0)


def test_starts_that_make_no_sense_are_no_places():
    for starts in ([0], [3, 1], [-1, 0]):
        row = {"content": "abcd", "token_ids": [1, 2], "token_starts": starts}
        assert examples.text_row(row).token_starts is None
    assert examples.text_row({"content": None, "token_ids": None, "token_starts": None}).content == ""


def test_a_word_of_100_kb_is_cut():
    row = row_of("a" + "b" * 100_000, [1, 2], [0, 1])
    text = examples.show_text("t", row, read_at([1], [2], [1.0]), 1.0)
    assert len(text.tokens[1].text) <= examples.MOST_CHARS
