from __future__ import annotations

import shutil

import pytest
import torch
from structlog.testing import capture_logs
from torch.testing import assert_close

from daemon.model.trie_engine import CannotPack
from daemon.model.trunk import Place, Trunk
from tests.support import tiny
from tests.support.engines import dense, loaded, packed, padded, random_texts
from tests.support.families import PACKED, save_family

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post")


@pytest.fixture(scope="module")
def saes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saes")
    return [tiny.save_sae(folder / hook, hook, seed=number) for number, hook in enumerate(HOOKS)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_family(tmp_path_factory.mktemp("llama"), "llama")


def sharing_texts() -> list[list[int]]:
    """Texts that begin alike, contain one another, repeat, and are longer than a block of queries."""
    a, b, c = random_texts([90, 40, 13])
    return [a, a[:30] + b[1:], b, a[:30], c, c, c[:1], a[:30] + c[1:], b + c]


@pytest.mark.parametrize("family", PACKED)
def test_packed_texts_equal_each_text_alone_through_transformer_lens(family, saes, tmp_path):
    model = save_family(tmp_path / family, family)
    fast, plain = packed(model, saes), padded(model, saes)
    texts = sharing_texts()
    together = fast.extract(texts)
    for row, text in enumerate(texts):
        for layer, alone in zip(together.layers, plain.extract([text]).layers, strict=True):
            assert_close(layer.x[row], alone.x[0], rtol=0, atol=1e-10)
            assert_close(dense(layer)[row], dense(alone)[0], rtol=0, atol=1e-10)
            assert_close(layer.reconstruction[row], alone.reconstruction[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", PACKED)
def test_packed_weights_give_what_the_model_gives_in_float32(family, saes, tmp_path):
    model = save_family(tmp_path / family, family)
    fast, plain = packed(model, saes, torch.float32), padded(model, saes, torch.float32)
    texts = sharing_texts()
    for layer, other in zip(fast.extract(texts).layers, plain.extract(texts).layers, strict=True):
        assert_close(layer.x, other.x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_reduced_precision_is_packed_too(dtype, llama, saes):
    extraction = packed(llama, saes, dtype).extract(sharing_texts())
    assert all(layer.x.dtype == torch.float32 and layer.x.isfinite().all() for layer in extraction.layers)


def test_a_token_that_texts_share_is_computed_once(llama, saes):
    shared = random_texts([50])[0]
    extraction = packed(llama, saes).extract([[*shared, n] for n in range(20)])
    assert extraction.computed_tokens - extraction.padding_tokens == 50 + 20


def test_a_family_whose_attention_has_biases_of_its_own_is_not_packed(saes, tmp_path):
    model = save_family(tmp_path / "bloom", "bloom")
    with pytest.raises(CannotPack):
        packed(model, saes)


def test_layers_after_the_last_dictionary_do_not_run(llama, tmp_path):
    hf, _ = loaded(llama, [], torch.float32)
    layers = hf.model.model.layers
    trunk = Trunk(hf.model, [Place(1, "out")])
    ran: list[int] = []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number), prepend=True)
    trunk.run(torch.tensor([[1, 2, 3]]), torch.arange(3)[None], None, None)
    assert ran == [0, 1]
    trunk.drop_idle()
    assert len(layers) == 2


def test_where_only_the_first_layers_input_is_read_a_sliding_window_does_not_matter(tmp_path):
    model = save_family(tmp_path / "gemma2", "gemma2")
    sae = tiny.save_sae(tmp_path / "sae", "blocks.0.hook_resid_pre")
    (got,) = packed(model, [sae]).extract(random_texts([9, 5])).layers
    (expected,) = padded(model, [sae]).extract(random_texts([9, 5])).layers
    assert_close(got.x, expected.x)


@pytest.mark.parametrize("make", [packed, padded])
def test_all_positions_are_what_each_beginning_of_a_text_gives(make, llama, saes):
    text = random_texts([12])[0]
    texts = [text, text[:5] + text[8:]]
    (stored,) = make(llama, saes, positions="all").extract(texts).stored
    last = make(llama, saes)
    assert stored.offsets.tolist() == [0, 11, 11 + 8]
    assert stored.positions.tolist() == [*range(1, 12), *range(1, 9)]
    assert stored.token_ids.tolist() == [*texts[0][1:], *texts[1][1:]]
    beginnings = [given[: n + 1] for given in texts for n in range(1, len(given))]
    for acts, layer in zip(stored.acts, last.extract(beginnings).layers, strict=True):
        rows = acts.to_dense(tiny.D_SAE)[stored.rows]
        assert_close(rows, dense(layer), rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["mean", "max"])
def test_pooled_features_are_those_of_every_token_pooled(positions, llama, saes):
    texts = sharing_texts()
    texts = [text for text in texts if len(text) > 1]
    (each,) = packed(llama, saes, positions="all").extract(texts).stored
    pooled = packed(llama, saes, positions=positions).extract(texts)
    for number, layer in enumerate(pooled.layers):
        rows = each.acts[number].to_dense(tiny.D_SAE)[each.rows]
        for text in range(len(texts)):
            own = rows[each.offsets[text] : each.offsets[text + 1]]
            expected = own.mean(0) if positions == "mean" else own.amax(0)
            assert_close(dense(layer)[text], expected, rtol=0, atol=1e-10)
    assert pooled.stored[0].positions.tolist() == [-1] * len(texts)


def test_every_kind_of_dictionary_reads_the_same_in_both_engines(llama, tmp_path):
    for kind in ("standard", "topk", "jumprelu"):
        sae = tiny.save_sae(tmp_path / kind, "blocks.1.hook_resid_post", architecture=kind)
        texts = sharing_texts()
        fast, plain = (make(llama, [sae]).extract(texts).layers[0] for make in (packed, padded))
        assert_close(dense(fast), dense(plain), rtol=0, atol=1e-10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("positions", ["last", "all", "mean"])
def test_a_cuda_device_gives_what_a_cpu_gives(positions, llama, saes):
    texts = sharing_texts()[:6]
    there, here = (
        packed(llama, saes, positions=positions, device=device).extract(texts) for device in ("cuda", "cpu")
    )
    for layer, other in zip(there.layers, here.layers, strict=True):
        assert_close(dense(layer).cpu(), dense(other), rtol=0, atol=1e-9)
        assert_close(layer.reconstruction.cpu(), other.reconstruction, rtol=0, atol=1e-9)
    for acts, other_acts in zip(there.stored[0].acts, here.stored[0].acts, strict=True):
        assert_close(acts.to_dense(tiny.D_SAE).cpu(), other_acts.to_dense(tiny.D_SAE), rtol=0, atol=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["gemma2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_and_attention_give_what_they_give_uncompiled(dtype, family, saes, tmp_path):
    model = save_family(tmp_path, family, head_dim=32)  # compiled attention takes none below 16
    texts = sharing_texts()
    with capture_logs() as logs:
        compiled = packed(model, saes, dtype, device="cuda", compiles=True).extract(texts)
    assert "engine.compiled" in [entry["event"] for entry in logs]
    plain = packed(model, saes, dtype, device="cuda").extract(texts)
    for layer, other in zip(compiled.layers, plain.layers, strict=True):
        error = torch.linalg.vector_norm(layer.x - other.x) / torch.linalg.vector_norm(other.x)
        assert error < (1e-5 if dtype == torch.float32 else 0.02)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of itself
def test_layers_compiled_for_a_cpu_give_what_they_give_uncompiled(llama, saes):
    texts = sharing_texts()
    with capture_logs() as logs:
        compiled = packed(llama, saes, compiles=True).extract(texts)
    assert "engine.compiled" in [entry["event"] for entry in logs]
    for layer, other in zip(compiled.layers, packed(llama, saes).extract(texts).layers, strict=True):
        assert_close(layer.x, other.x, rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiler_that_fails_leaves_the_engine_as_it_was(llama, saes, monkeypatch):
    def fail(function: object, **options: object) -> None:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    with capture_logs() as logs:
        engine = packed(llama, saes, compiles=True)
    assert [entry["event"] for entry in logs if entry["log_level"] == "warning"] == ["engine.not_compiled"]
    assert len(engine.extract(sharing_texts()).layers) == len(saes)
