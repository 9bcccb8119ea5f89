"""A text's values are the same bits whatever else its batch holds, and however many threads work on it."""

from __future__ import annotations

import pytest
import torch

from daemon.native.rmsnorm_rope_attention import routines
from tests.support import tiny
from tests.support.engines import packed, random_texts
from tests.support.families import PACKED, save_family

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")

pytestmark = pytest.mark.skipif(routines() is None, reason="lensd was installed without a C compiler")


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    return [tiny.save_sae(folder / hook, hook, seed=number) for number, hook in enumerate(HOOKS)]


def sharing_texts() -> list[list[int]]:
    a, b, c = random_texts([90, 40, 13])
    return [a, a[:30] + b[1:], b, a[:30], c, c[:1], a[:30] + c[1:], b + c, *random_texts([3, 17, 1, 64, 5])]


def bits(engine, texts: list[list[int]]) -> list[list[torch.Tensor]]:
    """Of each text what each SAE reads, its features and its reconstruction."""
    with torch.inference_mode():
        layers = engine.extract(texts).layers
    return [
        [
            values[row]
            for layer in layers
            for values in (layer.x, layer.acts.to_dense(tiny.D_SAE), layer.reconstruction)
        ]
        for row in range(len(texts))
    ]


def assert_same_bits(expected: list[torch.Tensor], got: list[torch.Tensor]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(expected, got, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", PACKED)
def test_a_text_is_the_same_alone_and_in_any_company(family, dtype, saes, tmp_path):
    engine = packed(save_family(tmp_path / family, family), saes, dtype)
    texts = sharing_texts()
    together = bits(engine, texts)
    for row, text in enumerate(texts):
        assert_same_bits(together[row], bits(engine, [text])[0])
    for row, alike in enumerate(bits(engine, texts[::-1])[::-1]):
        assert_same_bits(together[row], alike)
