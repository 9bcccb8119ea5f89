from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from sae_lens import GatedSAE, GatedSAEConfig
from torch.testing import assert_close

from daemon.model import encoding, onednn
from daemon.model.encoding import FusedEncoder, NormalisingEncoder, PlainEncoder, encoder_of
from daemon.model.onednn import OneDnnLinear, agrees, pack_linears, product
from daemon.model.sae import LoadedSae
from daemon.model.saeformat import TRANSCODERS
from daemon.model_info import SaeInfo
from tests.support import tiny

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def onednn_is_faster(monkeypatch):
    """On every processor these tests multiply by packed weights."""
    monkeypatch.setattr(onednn, "faster", lambda dtype: True)


def loaded(architecture: str, dtype: torch.dtype = torch.float64, **settings: object) -> LoadedSae:
    if architecture == "gated":
        sae = GatedSAE(GatedSAEConfig(d_in=tiny.D_MODEL, d_sae=tiny.D_SAE))
        generator = torch.Generator().manual_seed(0)
        for parameter in sae.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / tiny.D_MODEL**0.5
    else:
        sae = tiny.random_sae(HOOK, architecture=architecture)
    for name, value in settings.items():
        setattr(sae.cfg, name, value)
    sae = sae.to(dtype).requires_grad_(False)
    sae.dtype = dtype
    info = SaeInfo(HOOK, HOOK, 1, tiny.D_MODEL, tiny.D_SAE, tiny.D_MODEL, architecture, "tiny", "0")
    return LoadedSae(info, sae, center_residual=False)


def residuals(n: int = 40) -> torch.Tensor:
    return 2 * torch.randn(n, tiny.D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("reads_less_b_dec", [False, True])
def test_the_fast_encoder_is_saelens_encoder(architecture, reads_less_b_dec):
    entry = loaded(architecture, apply_b_dec_to_input=reads_less_b_dec)
    encoder = encoder_of(entry)
    assert isinstance(encoder, FusedEncoder)
    x = residuals()
    feature_acts = entry.sae.encode(x)
    assert (feature_acts > 0).any()
    acts = encoder.encode(x)
    assert_close(acts.to_dense(tiny.D_SAE), feature_acts, rtol=0, atol=1e-12)
    assert_close(encoder.decode(acts, x), entry.sae.decode(feature_acts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
def test_noise_added_to_pre_activations_is_noise_added_to_the_residual(architecture):
    entry = loaded(architecture)
    encoder = encoder_of(entry)
    x, noise = residuals(20), 0.3 * residuals(40)[20:]
    noisy = encoder.activate(encoder.pre_acts(x) + encoder.project(noise))
    assert_close(noisy, entry.sae.encode(x + noise), rtol=0, atol=1e-12)


def test_activations_rescaled_by_the_decoder_are_read_and_written_so():
    entry = loaded("topk", rescale_acts_by_decoder_norm=True)
    encoder = encoder_of(entry)
    assert isinstance(encoder, FusedEncoder)
    x = residuals()
    feature_acts = entry.sae.encode(x)
    acts = encoder.encode(x)
    assert_close(acts.to_dense(tiny.D_SAE), feature_acts, rtol=0, atol=1e-12)
    assert_close(encoder.decode(acts, x), entry.sae.decode(feature_acts), rtol=0, atol=1e-12)


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_the_fast_transcoder_is_saelens_transcoder(architecture):
    sae = tiny.random_transcoder("in", "out", architecture=architecture).to(torch.float64)
    sae.dtype = torch.float64
    info = SaeInfo("in", "out", 1, tiny.D_MODEL, tiny.D_SAE, tiny.D_OUT, architecture, "tiny", "0")
    entry = LoadedSae(info, sae.requires_grad_(False), center_residual=False)
    encoder = encoder_of(entry)
    assert isinstance(encoder, FusedEncoder)
    x = residuals()
    acts = encoder.encode(x)
    feature_acts = sae.encode(x)
    assert (feature_acts > 0).any()
    assert_close(acts.to_dense(tiny.D_SAE), feature_acts, rtol=0, atol=1e-12)
    assert_close(encoder.decode(acts, x), sae(x), rtol=0, atol=1e-12)
    plain = PlainEncoder(entry, encoder.decoder)
    assert_close(plain.decode(plain.encode(x), x), sae(x), rtol=0, atol=1e-12)


def normalising(architecture: str, mode: str) -> LoadedSae:
    entry = loaded(architecture, normalize_activations=mode)
    entry.sae._setup_activation_normalization()
    return entry


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk", "gated"])
@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_a_normalising_dictionary_is_encoded_without_saelens_statistics(architecture, mode):
    entry = normalising(architecture, mode)
    encoder = encoder_of(entry)
    assert isinstance(encoder, NormalisingEncoder)
    x, noise = residuals(), 0.3 * residuals(80)[40:]
    expected = entry.sae.encode(x)
    acts = encoder.encode(x)
    assert_close(acts.to_dense(tiny.D_SAE), expected, rtol=0, atol=1e-12)
    assert_close(encoder.decode(acts, x), entry.sae.decode(expected), rtol=0, atol=1e-12)
    some = torch.arange(0, 40, 3)
    assert_close(encoder.decode(acts.select(some), x[some]), encoder.decode(acts, x)[some], rtol=0, atol=0)
    noisy = encoder.activate(encoder.pre_acts(x) + encoder.project(noise))
    assert_close(noisy, entry.sae.encode(x + noise), rtol=0, atol=1e-12)
    assert not encoder.affine


def test_threads_may_share_a_normalising_dictionary():
    """Rows that other threads encode in between change nothing."""
    entry = normalising("jumprelu", "layer_norm")
    encoder = encoder_of(entry)
    pieces = [scale * residuals(20 + number) for number, scale in enumerate((0.1, 1.0, 10.0, 3.0))]
    expected = [entry.sae(x) for x in pieces]

    def reconstructions(x: torch.Tensor) -> list[torch.Tensor]:
        return [encoder.decode(encoder.encode(x), x) for _ in range(50)]

    with ThreadPoolExecutor(4) as threads:
        for got, other in zip(threads.map(reconstructions, pieces), expected, strict=True):
            for one in got:
                assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["none", "layer_norm"])
def test_rows_encoded_in_pieces_are_those_encoded_at_once(mode, monkeypatch):
    entry = normalising("jumprelu", mode)
    fast = encoder_of(entry)
    for encoder in (fast, PlainEncoder(entry, fast.decoder)):
        monkeypatch.setitem(encoding.PIECE_NUMBERS, "cpu", 1 << 25)
        x = residuals()
        whole = encoder.encode(x)
        monkeypatch.setitem(encoding.PIECE_NUMBERS, "cpu", 16 * tiny.D_SAE)
        pieces = encoder.encode(x)
        assert_close(pieces.to_dense(tiny.D_SAE), whole.to_dense(tiny.D_SAE), rtol=0, atol=1e-12)
        assert_close(encoder.decode(pieces, x), encoder.decode(whole, x), rtol=0, atol=1e-12)


def test_an_encoder_that_differs_is_not_used(monkeypatch):
    monkeypatch.setitem(encoding.ACTIVATIONS, "standard", lambda sae, device: lambda acts: 2 * acts.relu())
    assert isinstance(encoder_of(loaded("standard")), PlainEncoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_product_is_the_product(dtype):
    weight, bias, x = (torch.randn(*shape).to(dtype) for shape in ((48, 32), (48,), (7, 32)))
    assert agrees(torch.nn.functional.linear(x, weight, bias), product(weight, bias)(x))


def test_float64_has_no_packed_product_and_is_exact():
    weight, x = torch.randn(48, 32).double(), torch.randn(7, 32).double()
    assert torch.equal(product(weight, None)(x), torch.nn.functional.linear(x, weight))


def test_linear_layers_are_replaced_whatever_holds_them():
    layer = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.Sequential(torch.nn.Linear(16, 8, bias=False))
    )
    layer.requires_grad_(False)
    x = torch.randn(3, 5, 8)
    expected = layer(x)
    assert pack_linears([layer]) == 2
    assert isinstance(layer[1][0], OneDnnLinear)
    assert_close(layer(x), expected)
