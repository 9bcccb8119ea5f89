from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daemon.model.attention import masked
from daemon.model.trie import Trie, attention_blocks, build_trie

texts = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=12)


def slow_trie(given_texts: list[list[int]]) -> list[tuple[int, ...]]:
    """Every prefix of every text once, parents before children, in order of their tokens."""
    return sorted({tuple(text[: n + 1]) for text in given_texts for n in range(len(text))})


def attended(packed: Trie, block: int) -> np.ndarray:
    """(n, n) whether a node, down, attends to another, across, by blocks of so many queries."""
    pairs = np.zeros((len(packed), len(packed)), bool)
    nodes = np.arange(len(packed))
    for entry in attention_blocks(packed.end, block):
        end, depth = torch.from_numpy(packed.end), torch.from_numpy(packed.depth)
        mask = (masked(entry, end, depth, None, torch.float32).mask == 0).numpy()
        assert mask.any(axis=0).all()  # no key is read in vain
        pairs[np.ix_(nodes[entry.queries], nodes[entry.keys])] = mask
    return pairs


@given(texts)
@settings(deadline=None)
def test_every_prefix_is_one_node_with_its_token_depth_and_descendants(given_texts):
    packed = build_trie(given_texts)
    nodes = slow_trie(given_texts)
    assert packed.tokens.tolist() == [node[-1] for node in nodes]
    assert packed.depth.tolist() == [len(node) - 1 for node in nodes]
    for j, node in enumerate(nodes):
        descendants = [i for i, other in enumerate(nodes) if other[: len(node)] == node]
        assert descendants == list(range(j, packed.end[j]))


@given(texts)
@settings(deadline=None)
def test_paths_lead_through_the_prefixes_of_each_text(given_texts):
    packed = build_trie(given_texts)
    nodes = slow_trie(given_texts)
    for number, text in enumerate(given_texts):
        path = packed.path[packed.offsets[number] : packed.offsets[number + 1]]
        assert [nodes[node] for node in path] == [tuple(text[: n + 1]) for n in range(len(text))]
        assert nodes[packed.leaf[number]] == tuple(text)


@given(texts, st.integers(1, 9))
@settings(deadline=None)
def test_blocks_hold_exactly_the_pairs_of_a_token_and_what_came_before_it(given_texts, block):
    packed = build_trie(given_texts)
    nodes = slow_trie(given_texts)
    expected = [[query[: len(key)] == key for key in nodes] for query in nodes]
    assert attended(packed, block).tolist() == expected


@given(texts, st.integers(1, 9))
@settings(deadline=None)
def test_blocks_take_every_query_once_and_no_more_than_told_at_a_time(given_texts, block):
    packed = build_trie(given_texts)
    runs = [range(len(packed))[entry.queries] for entry in attention_blocks(packed.end, block)]
    assert [query for run in runs for query in run] == list(range(len(packed)))
    assert all(len(run) == block for run in runs[:-1]) and 1 <= len(runs[-1]) <= block


@given(texts, st.integers(0, 40), st.integers(1, 9))
@settings(deadline=None)
def test_nodes_to_fill_up_with_are_by_themselves(given_texts, more, block):
    packed = build_trie(given_texts)
    filled = packed.filled(len(packed) + more)
    assert filled.path.tolist() == packed.path.tolist()
    assert filled.tokens.tolist() == packed.tokens.tolist() + more * [packed.tokens[0]]
    assert filled.depth.tolist() == packed.depth.tolist() + more * [0]
    expected = np.eye(len(filled), dtype=bool)
    expected[: len(packed), : len(packed)] = attended(packed, block)
    assert attended(filled, block).tolist() == expected.tolist()


def test_a_shared_beginning_is_counted_once():
    system = list(range(300))
    packed = build_trie([[*system, 1000 + n, 7] for n in range(50)])
    assert len(packed) == 300 + 50 * 2


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text 1 is empty"):
        build_trie([[1], []])
