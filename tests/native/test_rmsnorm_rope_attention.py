"""The compiled code against torch in float64, one text and one query at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from daemon.model.trie import Trie, build_trie
from daemon.native import rmsnorm_rope_attention as module
from daemon.native.rmsnorm_rope_attention import BLOCK, WIDTH, Heads, InputNorm, Nodes, add_norm, routines
from tests.support.effort import examples
from tests.support.torch_threads import torch_threads

FOUND = routines()
EPSILON = 1e-5
D_MODEL = 50

pytestmark = pytest.mark.skipif(FOUND is None, reason="installed without a C compiler")


def case(heads: Heads, n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, what products made of them, cosines and sines, both halves of which are alike."""
    chance = torch.Generator().manual_seed(seed)
    width = (heads.heads + 2 * heads.key_heads) * heads.d_head
    x, qkv = torch.randn(n, D_MODEL, generator=chance), torch.randn(n, width, generator=chance)
    angle = torch.rand(n, heads.d_head // 2, generator=chance).repeat(1, 2) * 7
    return 10 * x, 3 * qkv, angle.cos(), angle.sin()


def nodes_of(packed: Trie) -> Nodes:
    return Nodes.of(torch.from_numpy(packed.end), torch.from_numpy(packed.depth))


def attended(
    heads: Heads, packed: Trie, given: tuple[torch.Tensor, ...], bias: torch.Tensor | None = None
) -> torch.Tensor:
    x, qkv, cos, sin = given
    return heads.attended_after_norm(FOUND, nodes_of(packed), qkv, InputNorm(x, EPSILON, bias), cos, sin)


def slowly(
    heads: Heads, packed: Trie, given: tuple[torch.Tensor, ...], bias: torch.Tensor | None = None
) -> torch.Tensor:
    x, qkv, cos, sin = (tensor.double() for tensor in given)
    qkv = qkv / (x.square().mean(1, keepdim=True) + EPSILON).sqrt()
    if bias is not None:
        qkv = qkv + bias.double()
    qkv = qkv.view(len(x), -1, heads.d_head)
    turned = qkv * cos.unsqueeze(1) + torch.cat(
        [-qkv[..., heads.d_head // 2 :], qkv[..., : heads.d_head // 2]], dim=-1
    ) * sin.unsqueeze(1)
    return one_at_a_time(heads, packed, turned, qkv)


def one_at_a_time(heads: Heads, packed: Trie, turned: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
    """`turned` (n, all heads, d_head) has queries and keys, `qkv` the values."""
    result = torch.full((len(qkv), heads.heads, heads.d_head), torch.nan, dtype=torch.float64)
    for start, stop in zip(packed.offsets, packed.offsets[1:], strict=False):
        path = torch.from_numpy(packed.path[start:stop])
        for position, node in enumerate(path):
            seen = path[max(0, position + 1 - (heads.window or len(path))) : position + 1]
            for head in range(heads.heads):
                key_head = heads.heads + head // (heads.heads // heads.key_heads)
                scores = heads.scale * turned[seen, key_head] @ turned[node, head]
                if heads.softcap is not None:
                    scores = heads.softcap * (scores / heads.softcap).tanh()
                result[node, head] = scores.softmax(0) @ qkv[seen, key_head + heads.key_heads]
    return result.flatten(1)


def texts_of(lengths: list[int], shared: int) -> list[list[int]]:
    """Texts that share as many tokens as they have of a beginning."""
    return [
        [*range(shared)][:length] + [1000 * number + i for i in range(length - shared)]
        for number, length in enumerate(lengths, 1)
    ]


@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=8),
    shared=st.integers(0, 40),
    shape=st.sampled_from([(1, 1), (3, 1), (6, 2), (4, 4)]),
    vectors=st.integers(1, 5),
    window=st.none() | st.integers(1, 50),
    biased=st.booleans(),
)
@settings(max_examples=examples(60), deadline=None)
def test_attention_is_what_one_query_at_a_time_gives(lengths, shared, shape, vectors, window, biased):
    d_head = vectors * WIDTH
    bias = torch.linspace(-1, 1, (shape[0] + 2 * shape[1]) * d_head) if biased else None
    heads = Heads(*shape, d_head, d_head**-0.5, window)
    packed = build_trie(texts_of(lengths, shared))
    given = case(heads, len(packed))
    got, expected = (way(heads, packed, given, bias) for way in (attended, slowly))
    assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("softcap", [None, 5.0, 50.0])
@pytest.mark.parametrize("window", [None, 9])
def test_heads_that_are_turned_already_attend_as_they_are(softcap, window):
    heads = Heads(6, 2, 2 * WIDTH, 0.3, window, softcap)
    packed = build_trie(texts_of([70, 5, 41, 33], 20))
    _, qkv, _, _ = case(heads, len(packed))
    by_head = qkv.double().view(len(qkv), -1, heads.d_head)
    got = heads.attended(FOUND, nodes_of(packed), qkv)
    expected = one_at_a_time(heads, packed, by_head, by_head).flatten(1)
    assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_a_text_attends_in_the_same_bits_whatever_is_beside_it():
    heads = Heads(2, 1, 2 * WIDTH, 0.3, None)
    texts = texts_of([70, 5, 41, 33, 64, 1], 20)
    together = build_trie(texts)
    _, qkv, _, _ = case(heads, len(together))
    result = heads.attended(FOUND, nodes_of(together), qkv)
    for start, stop, text in zip(together.offsets, together.offsets[1:], texts, strict=False):
        path = together.path[start:stop]
        alone = heads.attended(FOUND, nodes_of(build_trie([text])), qkv[path])
        assert torch.equal(result[path], alone)


def test_threads_share_the_work_and_change_no_bit():
    heads = Heads(6, 2, 4 * WIDTH, 0.1, None)
    packed = build_trie(texts_of([300, 5, 170, 64], 33))
    given = case(heads, len(packed))
    results = []
    for threads in (1, 2):
        with torch_threads(threads):
            results.append(attended(heads, packed, given))
    assert torch.equal(*results)


def test_what_is_not_a_number_stays_so_and_reaches_only_those_who_attend_to_it():
    heads = Heads(2, 1, 2 * WIDTH, 0.1, None)
    packed = build_trie(texts_of([40, 40], 10))
    given = case(heads, len(packed))
    given[0][15] = torch.nan  # in the first text
    result = attended(heads, packed, given)
    of_first, of_second = (packed.path[:40], packed.path[40:])
    assert result[of_first[15:]].isnan().all()
    assert result[of_second].isfinite().all()
    assert result[of_first[:15]].isfinite().all()


def test_large_scores_do_not_overflow():
    heads = Heads(2, 1, WIDTH, 30.0, None)
    packed = build_trie(texts_of([50], 0))
    given = case(heads, len(packed))
    assert_close(attended(heads, packed, given).double(), slowly(heads, packed, given), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", [0, 1, BLOCK, 3 * BLOCK + 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_add_norm_adds_and_norms(rows, threads):
    chance = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, D_MODEL, generator=chance) for _ in range(2))
    added = x.double() + y.double()
    with torch_threads(threads):
        normed = add_norm(FOUND, x, y, EPSILON)
    assert_close(x.double(), added, rtol=1e-6, atol=1e-6)
    expected = added / (added.square().mean(1, keepdim=True) + EPSILON).sqrt()
    assert_close(normed.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_library_of_another_version_is_not_called(monkeypatch):
    class Older:
        """Tells nothing of its structures."""

    for sizes in (None, (1, 2)):
        monkeypatch.setattr(module, "built_sizes", lambda _, sizes=sizes: sizes)
        assert module.routines.__wrapped__() is None
    monkeypatch.undo()
    assert module.built_sizes(Older()) is None
    assert module.routines.__wrapped__() is not None


def test_heads_that_fill_no_vector_are_left_to_torch():
    assert not Heads(2, 1, WIDTH // 2, 1.0, None).fit
    assert Heads(2, 1, WIDTH, 1.0, None).fit
