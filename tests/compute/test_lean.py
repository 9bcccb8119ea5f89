from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from daemon.model import lean
from daemon.model.between import routines
from daemon.model.lean import CompiledAttention, LeanLayer, TorchAttention
from daemon.model.onednn import LEAST_STEP, filled_rows, row_chunks, works
from daemon.model.trie import preorder
from tests import tiny
from tests.compute.engines import packed, random_texts
from tests.families import COMMON, FAMILIES, GROUPED, PACKED, save_family

LEAN = {"llama", "mistral", "qwen2"}  # with a window that counts, and with biases

pytestmark = pytest.mark.skipif(not works(torch.float32), reason="needs oneDNN's packed products")


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return tiny.save_sae(tmp_path_factory.mktemp("sae"), "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


def layers_of(engine) -> list[nn.Module]:
    return engine._trunk.layers


@pytest.mark.parametrize("family", PACKED)
def test_layers_of_the_kind_are_lean_in_float32_and_all_others_as_they_were(family, sae, tmp_path):
    model = save_family(tmp_path / family, family)
    engine = packed(model, [sae], torch.float32)
    assert [type(layer) is LeanLayer for layer in layers_of(engine)] == 3 * [family in LEAN]
    engine = packed(model, [sae], torch.float64)
    assert not any(isinstance(layer, LeanLayer) for layer in layers_of(engine))


@pytest.mark.parametrize("kept", [[5], [60, 3, 3, 17, 60], list(range(70, -1, -1)), [0] * 200])
def test_the_last_layer_gives_the_tokens_that_are_read_in_the_order_asked_for(kept, llama, tmp_path):
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in (1, 2)] + ["blocks.3.hook_resid_pre"]
    engine = packed(llama, [tiny.save_sae(tmp_path / hook, hook) for hook in hooks], torch.float32)
    nodes = preorder(random_texts([40, 50]))
    widths: list[int] = []
    last = layers_of(engine)[-1]
    last.register_forward_hook(lambda layer, args, output: widths.append(output.shape[1]), prepend=True)
    every = engine.residuals(nodes, torch.arange(len(nodes)))
    some = engine.residuals(nodes, torch.tensor(kept))
    for got, expected in zip(some, every, strict=True):
        assert_close(got, expected[kept], rtol=1e-5, atol=1e-5)
    assert widths == [len(nodes), min(len(kept), len(nodes))]


def test_products_see_few_numbers_of_rows(llama, sae):
    engine = packed(llama, [sae], torch.float32)
    met: set[int] = set()
    for layer in layers_of(engine):
        for product in layer.products:
            product.register_forward_pre_hook(lambda module, args: met.add(len(args[0])))
    texts = random_texts([50 + n % 40 for n in range(60)])
    engine.extract(texts)
    pieces = {
        rows.stop - rows.start for n in (60, len(preorder(texts))) for rows in row_chunks(filled_rows(n))
    }
    assert met == pieces
    assert all(rows % LEAST_STEP == 0 for rows in met)


@pytest.mark.parametrize("family", sorted(LEAN))
@pytest.mark.parametrize("compiled", [True, False])
def test_attention_of_either_kind_gives_what_the_model_gives(family, compiled, sae, tmp_path, monkeypatch):
    if compiled and routines() is None:
        pytest.skip("installed without a C compiler")
    if not compiled:
        monkeypatch.setattr(lean, "routines", lambda: None)
    model = save_family(tmp_path / family, family, head_dim=32)
    kind = CompiledAttention if compiled else TorchAttention
    engine = packed(model, [sae], torch.float32)
    assert all(type(layer._attention) is kind for layer in layers_of(engine))
    texts = random_texts([40, 3, 200])
    texts += [texts[0][:20] + texts[1], texts[2][:90]]
    (got,), (expected,) = (one.extract(texts).layers for one in (engine, packed(model, [sae])))
    error = torch.linalg.vector_norm(got.x - expected.x, dim=1) / torch.linalg.vector_norm(expected.x, dim=1)
    assert error.max() < 1e-4


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Glm4MoeConfig", {"first_k_dense_replace": 3, "n_routed_experts": 4, "use_qk_norm": False}),
        (
            "MiMoV2FlashConfig",
            {"v_head_dim": 16, "mlp_layer_types": 4 * ["dense"], "partial_rotary_factor": 1.0},
        ),
    ],
    ids=["of which a part turns", "with narrower values"],
)
def test_heads_that_the_compiled_routine_does_not_know_never_reach_it(
    kind, settings, sae, tmp_path, monkeypatch
):
    shape = COMMON | GROUPED | {"head_dim": 32, "layer_types": 4 * ["full_attention"]}
    monkeypatch.setitem(FAMILIES, "other", (kind, shape | settings))
    reached: list[object] = []
    monkeypatch.setattr(LeanLayer, "forward", lambda self, x, **given: reached.append(self) or x)
    layers = layers_of(packed(save_family(tmp_path, "other"), [sae], torch.float32))
    assert not reached
    assert not any(isinstance(layer, LeanLayer) for layer in layers)


class TwiceTheMlp(LlamaMLP):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_layer_that_does_more_than_its_parts_tell_is_left_alone(llama, sae, monkeypatch):
    monkeypatch.setattr(LlamaDecoderLayer, "__init__", with_another_mlp(LlamaDecoderLayer.__init__))
    engine = packed(llama, [sae], torch.float32)
    assert [type(layer) for layer in layers_of(engine)] == 3 * [LlamaDecoderLayer]


def with_another_mlp(make):
    def init(self, config, layer_idx):
        make(self, config, layer_idx)
        self.mlp = TwiceTheMlp(config)

    return init


def test_a_norm_with_another_epsilon_than_it_seems_to_have_is_left_alone(llama, sae, monkeypatch):
    epsilon = lean.epsilon
    monkeypatch.setattr(lean, "epsilon", lambda norm: 3 * epsilon(norm))
    engine = packed(llama, [sae], torch.float32)
    assert [type(layer) for layer in layers_of(engine)] == 3 * [LlamaDecoderLayer]
