"""All ways to attend, against one query at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from daemon.devices import to_device, to_exact
from daemon.model.attention import BlockPlan, Call, Plan
from daemon.model.compiled_layers import BLOCK, FlexPlan, block_pattern
from daemon.model.trie import build_trie
from tests.support.engines import random_texts
from tests.support.mps_stand_in import mps_stand_in

HEADS, KEY_HEADS, D_HEAD = 4, 2, 8


def sharing_texts() -> list[list[int]]:
    a, b, c = random_texts([90, 40, 13])
    return [a, a[:30] + b[1:], b, c, a[:30] + c[1:]]


def plans(texts: list[list[int]]) -> list[Plan]:
    trie = build_trie(texts)
    return [BlockPlan(trie, "cpu", torch.float64), FlexPlan.of(trie, "cpu")]


def slowly(call: Call, texts: list[list[int]]) -> torch.Tensor:
    """(n, heads, d_head): each text by itself, each query by itself."""
    packed = build_trie(texts)
    n = len(packed)
    result = torch.full((n, HEADS, D_HEAD), torch.nan, dtype=torch.float64)
    for start, stop in zip(packed.offsets, packed.offsets[1:], strict=False):
        path = torch.from_numpy(packed.path[start:stop])
        for position, node in enumerate(path):
            seen = path[max(0, position + 1 - (call.window or n)) : position + 1]
            for head in range(HEADS):
                key_head = head // (HEADS // KEY_HEADS)
                scores = call.scale * call.key[0, key_head, seen] @ call.query[0, head, node]
                if call.softcap is not None:
                    scores = call.softcap * torch.tanh(scores / call.softcap)
                result[node, head] = scores.softmax(0) @ call.value[0, key_head, seen]
    return result


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 9])
def test_a_query_sees_its_own_text_and_of_it_what_came_before(window, softcap):
    texts = sharing_texts()
    n = len(build_trie(texts))
    chance = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, n, D_HEAD, generator=chance, dtype=torch.float64)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    call = Call(query, key, value, window, 0.4, softcap)
    expected = slowly(call, texts)
    for plan in plans(texts):
        assert_close(plan.attend(call)[0], expected)
    with mps_stand_in(), torch.inference_mode():
        there = (to_device(heads.float(), "mps") for heads in (query, key, value))
        attended = BlockPlan(build_trie(texts), "mps", torch.float32).attend(
            Call(*there, window, 0.4, softcap)
        )
        assert_close(to_exact(attended)[0].double(), expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_keys_are_skipped_only_where_no_query_attends_and_whole_only_where_all_do():
    a, b, c = random_texts([500, 300, 140])
    packed = build_trie([a, a[:200] + b, a[:200] + c, b, *([n] for n in range(90))])
    n = len(packed)
    query, key = np.arange(n)[:, None], np.arange(n)
    attends = (key <= query) & (query < packed.end)
    starts = np.arange(0, n, BLOCK)
    by_block = [[attends[q : q + BLOCK, k : k + BLOCK] for k in starts] for q in starts]
    needed, whole = block_pattern(packed)
    assert needed.tolist() == [[bool(tile.any()) for tile in row] for row in by_block]
    assert whole.tolist() == [[bool(tile.all()) for tile in row] for row in by_block]
    assert whole.any()
    assert not needed.all()
