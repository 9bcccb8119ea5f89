from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

from daemon.model import fused_layers, onednn
from daemon.model.fused_layers import FusedDecoderLayer
from daemon.model.onednn import OneDnnLinear, works
from daemon.model.row_sizes import ROW_STEP, RowSizes
from daemon.model.trie import build_trie
from daemon.native.rmsnorm_rope_attention import routines
from tests.support import tiny
from tests.support.engines import packed, random_texts
from tests.support.families import COMMON, FAMILIES, GROUPED, PACKED, save_family

FUSED = {"llama", "mistral", "qwen2"}  # with a window that counts, and with biases

pytestmark = pytest.mark.skipif(routines() is None, reason="installed without a C compiler")


@pytest.fixture(params=["onednn", "torch"], autouse=True)
def products(request, monkeypatch) -> str:
    """Every test here runs with the products of both."""
    if request.param == "onednn" and not works(torch.float32):
        pytest.skip("needs oneDNN's packed products")
    monkeypatch.setattr(onednn, "faster", lambda dtype: request.param == "onednn")
    return request.param


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    return tiny.save_sae(tmp_path_factory.mktemp("sae"), "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


def layers_of(engine) -> list[nn.Module]:
    return engine._trunk.layers


@pytest.mark.parametrize("family", PACKED)
def test_layers_of_the_kind_are_fused_in_float32_and_all_others_as_they_were(family, sae, tmp_path):
    model = save_family(tmp_path / family, family)
    engine = packed(model, [sae], torch.float32)
    assert [type(layer) is FusedDecoderLayer for layer in layers_of(engine)] == 3 * [family in FUSED]
    engine = packed(model, [sae], torch.float64)
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers_of(engine))


def test_products_of_onednn_see_few_numbers_of_rows(products, llama, sae, monkeypatch):
    if products == "torch":
        pytest.skip("makes no kernels by the number of rows")
    engine = packed(llama, [sae], torch.float32)
    met: set[int] = set()
    multiply = OneDnnLinear.multiply
    monkeypatch.setattr(OneDnnLinear, "multiply", lambda self, x: met.add(len(x)) or multiply(self, x))
    for layer in layers_of(engine):
        layer.products[2].register_forward_pre_hook(lambda module, args: met.add(len(args[0])))
    texts = random_texts([50 + n % 40 for n in range(60)])
    engine.extract(texts)
    sizes, threads = RowSizes(), torch.get_num_threads()
    numbers = [sizes.padded(n) for n in (len(build_trie(texts)), len(texts))]
    assert met == {chunk.stop - chunk.start for n in numbers for chunk in sizes.chunks(n, threads)}
    assert all(rows % ROW_STEP == 0 for rows in met)


@pytest.mark.parametrize("family", sorted(FUSED))
@pytest.mark.parametrize("compiled", [True, False])
def test_layers_with_and_without_compiled_code_give_the_models_values(
    family, compiled, sae, tmp_path, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(fused_layers, "routines", lambda: None)
    model = save_family(tmp_path / family, family, head_dim=32)
    engine = packed(model, [sae], torch.float32)
    assert [type(layer) is FusedDecoderLayer for layer in layers_of(engine)] == 3 * [compiled]
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
    monkeypatch.setattr(FusedDecoderLayer, "forward", lambda self, x, **given: reached.append(self) or x)
    layers = layers_of(packed(save_family(tmp_path, "other"), [sae], torch.float32))
    assert not reached
    assert not any(isinstance(layer, FusedDecoderLayer) for layer in layers)


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
    epsilon = fused_layers.epsilon
    monkeypatch.setattr(fused_layers, "epsilon", lambda norm: 3 * epsilon(norm))
    engine = packed(llama, [sae], torch.float32)
    assert [type(layer) for layer in layers_of(engine)] == 3 * [LlamaDecoderLayer]
