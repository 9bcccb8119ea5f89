"""On MPS the model and the product of each dictionary run on the device, all else on the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from daemon.config import Config, load_config
from daemon.devices import to_device, to_exact
from daemon.errors import ConfigError
from daemon.executor.runner import BatchRunner, not_finite_message
from daemon.model import device_check, encoding
from daemon.model.encoding import FusedEncoder, NormalisingEncoder, PlainEncoder
from daemon.model.engine import Engine
from daemon.model.extraction import NotFinite
from daemon.model.loading import resolve_device
from daemon.model_wiring import study_settings, try_engines
from daemon.recipes import CONTRAST_RECIPE
from daemon.records import Batch, BatchResult
from daemon.tools.oracle import Oracle
from tests.batching.test_splitting import batch_of
from tests.support import tiny
from tests.support.families import save_family
from tests.support.mps_stand_in import OnMps, RefusedOnMps, mps_stand_in
from tests.test_not_finite import UNPROBED, save_overflowing

POSITIONS = ("last", "all", "mean", "max")
KINDS = {  # a family, and where its dictionaries read
    "packed": ("llama", ["hook_resid_post", "hook_mlp_out", "hook_resid_post", "hook_resid_post"]),
    "padded": ("gptj", ["hook_mlp_out"] * 4),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture
def mps():
    with mps_stand_in() as mode:
        yield mode


def configured(folder: Path, model: Path, saes: list[Path], device: str, **options: str) -> Config:
    folder.mkdir(exist_ok=True)
    (folder / "lensd.toml").write_text(tiny.Tiny(model, tuple(saes)).toml())
    given = {"model.device": device, **{key.replace("_", ".", 1): value for key, value in options.items()}}
    return load_config(folder / "lensd.toml", {}, given)


def samples(records: list[dict[str, object]]) -> Batch:
    tokenizer = tiny.byte_tokenizer()
    texts = [
        CONTRAST_RECIPE.render({name: str(record[name]) for name in ("prompt", "fact", "hallucination")})
        for record in records
    ]
    ids = [tuple((tiny.BOS, *tokenizer(text)["input_ids"]) for text in each) for each in texts]
    return batch_of(ids, CONTRAST_RECIPE)


def ran(config: Config, batch: Batch) -> tuple[Engine, BatchResult]:
    with torch.inference_mode():
        engine, _ = try_engines(config)
        return engine, BatchRunner(engine, study_settings(config)).run(batch)


def assert_same(got: BatchResult, expected: BatchResult) -> None:
    assert got.not_finite == expected.not_finite
    assert got.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        if column.dtype == np.float64:
            np.testing.assert_allclose(got.columns[name], column, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(got.columns[name], column, name)
    np.testing.assert_array_equal(got.features.indices, expected.features.indices)
    np.testing.assert_allclose(got.features.values, expected.features.values, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(got.layers, expected.layers, strict=True):
        np.testing.assert_allclose(ours.total, theirs.total, rtol=1e-3, atol=1e-4)
        assert ours.total.dtype == np.float64


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_keeps_to_what_mps_has_and_gives_what_the_cpu_gives(kind, positions, tmp_path):
    family, hooks = KINDS[kind]
    model = save_family(tmp_path / "m", family)
    architectures = ("jumprelu", "standard", "topk", "gated")
    saes = [
        tiny.save_sae(
            tmp_path / f"s{layer}", f"blocks.{layer}.{hooks[layer]}", seed=layer, architecture=architecture
        )
        for layer, architecture in enumerate(architectures)
    ]
    batch = samples(tiny.contrast_records(6))
    options = {"analysis_positions": positions}
    _, expected = ran(configured(tmp_path / "cpu", model, saes, "cpu", **options), batch)
    with mps_stand_in() as mode:
        engine, got = ran(configured(tmp_path / "mps", model, saes, "mps", **options), batch)
        for encoder in engine.encoders:
            assert isinstance(encoder, FusedEncoder)
            assert encoder.decoder.W_dec.device.type == "cpu"
            assert isinstance(encoder.pre_acts(torch.zeros(1, tiny.D_MODEL)), OnMps)
    assert (engine.info.engine, engine.info.device) == (kind, "mps")
    assert mode.moved_to_host
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_half_precision_keep_to_what_mps_has(dtype, model, tmp_path, mps):
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    config = configured(tmp_path / "c", model, [sae], "mps", model_dtype=dtype)
    engine, result = ran(config, samples(tiny.contrast_records(3)))
    assert engine.info.dtype == dtype
    assert len(result.features.values)


@pytest.mark.parametrize("positions", POSITIONS)
def test_dictionaries_that_normalise_do_so_on_the_host(positions, model, tmp_path, mps):
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post", architecture="topk")
    tiny.overwrite_sae_config(sae, normalize_activations="layer_norm")
    batch = samples(tiny.contrast_records(3))
    config = configured(tmp_path / "c", model, [sae], "mps", analysis_positions=positions)
    engine, result = ran(config, batch)
    (encoder,) = engine.encoders
    assert isinstance(encoder, NormalisingEncoder)
    assert type(encoder.pre_acts(torch.zeros(1, tiny.D_MODEL))) is torch.Tensor
    assert len(result.features.values)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3_moe", "falcon"])
def test_other_families_keep_to_what_mps_has(family, tmp_path):
    """With learned positions, soft caps and sliding windows, experts, and indices that are lists."""
    folder = save_family(tmp_path / "m", family)
    sae = tiny.save_sae(tmp_path / "s", "blocks.2.hook_resid_post")
    batch = samples(tiny.contrast_records(3))
    _, expected = ran(configured(tmp_path / "cpu", folder, [sae], "cpu"), batch)
    with mps_stand_in():
        _, got = ran(configured(tmp_path / "mps", folder, [sae], "mps"), batch)
    assert_same(got, expected)


@pytest.mark.parametrize("architecture", tiny.TRANSCODERS)
def test_transcoders_keep_to_what_mps_has(architecture, model, tmp_path):
    sae = tiny.save_transcoder(
        tmp_path / "s",
        "blocks.1.ln2.hook_normalized",
        "blocks.1.hook_mlp_out",
        architecture=architecture,
        d_out=tiny.D_MODEL,
    )
    batch = samples(tiny.contrast_records(3))
    _, expected = ran(configured(tmp_path / "cpu", model, [sae], "cpu"), batch)
    with mps_stand_in():
        _, got = ran(configured(tmp_path / "mps", model, [sae], "mps"), batch)
    assert_same(got, expected)


@pytest.mark.parametrize("positions", POSITIONS)
def test_texts_that_are_not_finite_are_told_apart_as_on_the_cpu(positions, tmp_path):
    folder = save_overflowing(tmp_path / "m", UNPROBED)
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    records = tiny.contrast_records(5)
    records[3]["fact"] = UNPROBED
    batch = samples(records)
    options = {"analysis_positions": positions}
    _, expected = ran(configured(tmp_path / "cpu", folder, [sae], "cpu", **options), batch)
    with mps_stand_in():
        _, got = ran(configured(tmp_path / "mps", folder, [sae], "mps", **options), batch)
    assert (
        [message.row for message in got.not_finite] == [message.row for message in expected.not_finite] == [3]
    )


def test_many_rows_are_encoded_in_pieces(model, tmp_path, mps, monkeypatch):
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    with torch.inference_mode():
        engine, _ = try_engines(configured(tmp_path / "c", model, [sae], "mps"))
        (encoder,) = engine.encoders
        x = torch.randn(40, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
        whole = encoder.encode(x)
        monkeypatch.setitem(encoding.PIECE_NUMBERS, "mps", 16 * tiny.D_SAE)
        pieces = encoder.encode(x)
    torch.testing.assert_close(pieces.to_dense(tiny.D_SAE), whole.to_dense(tiny.D_SAE))


def test_a_device_that_computes_wrong_is_refused(model, tmp_path, mps, monkeypatch):
    """As torch 2.8 did in products of views."""
    monkeypatch.setattr(OnMps, "spoiled", {"linear": 1.1})
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    refused = pytest.raises(
        ConfigError, match=r"mps gives other values than the host.*set model.device to cpu"
    )
    with torch.inference_mode(), refused:
        try_engines(configured(tmp_path / "c", model, [sae], "mps"))


def test_the_oracle_of_verify_checks_mps_from_the_host(model, tmp_path, mps):
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    oracle = Oracle(configured(tmp_path / "c", model, [sae], "mps"))
    oracle.layers([[tiny.BOS, 97]])
    assert type(oracle.dictionaries[0].sae.W_dec.data) is torch.Tensor
    assert mps.moved_to_host == 0


def test_an_activation_that_mps_lacks_is_left_to_the_host(model, tmp_path, mps, monkeypatch):
    def lacking(sae, device):
        def activate(pre_acts):
            raise NotImplementedError(
                "The operator 'aten::relu' is not currently implemented for the MPS device"
            )

        return activate

    monkeypatch.setitem(encoding.ACTIVATIONS, "standard", lacking)
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post", architecture="standard")
    with torch.inference_mode():
        engine, _ = try_engines(configured(tmp_path / "c", model, [sae], "mps"))
    assert isinstance(engine.encoders[0], PlainEncoder)


def test_float64_is_refused_and_auto_passes_mps_over_for_it(mps):
    with pytest.raises(
        ConfigError, match=r"MPS has no float64: set model\.dtype to float32, or model\.device"
    ):
        resolve_device("mps", torch.float64)
    assert resolve_device("auto") == resolve_device("mps:0", torch.bfloat16) == "mps"
    assert resolve_device("auto", torch.float64) == "cpu"


def test_auto_takes_cuda_before_mps(mps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda"


def test_mps_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match="no MPS device here: use auto or cpu"):
        resolve_device("mps")


class TestTheStandIn:
    """Refuses what MPS does not have: without it these tests would hold nothing."""

    @pytest.mark.parametrize(
        "operation",
        [
            lambda: torch.zeros(2, dtype=torch.float64, device="mps"),
            lambda: torch.tensor([1.0], dtype=torch.float64).to("mps"),
            lambda: torch.zeros(2, device="mps").double(),
            lambda: torch.zeros(2, device="mps").to(torch.float64),
            lambda: torch.zeros(2, device="mps").sum(dtype=torch.float64),
            lambda: torch.zeros(2, device="mps").to(torch.complex64),
            lambda: torch.zeros(2, device="mps").to("cpu", torch.float64),
            lambda: torch.zeros(2, device="mps") + torch.zeros(2),
            lambda: torch.ones(2, device="mps").nonzero(),
            lambda: torch.ones(2, device="mps")[torch.ones(2, device="mps") > 0],
            lambda: torch.ones(2, dtype=torch.int64, device="mps").cumsum(0),
            lambda: torch.linalg.eigvalsh(torch.eye(2, device="mps")),
            lambda: torch.linalg.svd(torch.eye(2, device="mps")),
            lambda: torch.ones(2, device="mps").unique(),
            lambda: torch.ones(2, device="mps").numpy(),
            lambda: torch.ones(2, device="mps").pin_memory(),
            lambda: torch.eye(2, device="mps").to_sparse(),
            lambda: F.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2, device="mps")] * 3),
            lambda: torch.add(torch.ones(2, device="mps"), 1, out=torch.ones(2, 2, device="mps")[:, 0]),
        ],
    )
    def test_refuses(self, operation, mps):
        with pytest.raises(RefusedOnMps):
            operation()

    def test_fails_a_run_that_puts_float64_on_the_device(self, model, tmp_path, mps, monkeypatch):
        sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
        config = configured(tmp_path / "c", model, [sae], "mps")
        batch = samples(tiny.contrast_records(2))
        ran(config, batch)
        monkeypatch.setattr(
            encoding.FusedEncoder,
            "pre_acts",
            lambda encoder, x: encoder._product(to_device(x.double(), "mps")).float(),
        )
        with pytest.raises(RefusedOnMps, match="float64"):
            ran(config, batch)

    def test_fails_a_run_that_moves_tensors_by_itself(self, model, tmp_path, mps, monkeypatch):
        from daemon.model import positions

        monkeypatch.setattr(positions, "to_exact", lambda values: moved_by_the_product(values))
        sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
        with pytest.raises(RefusedOnMps, match=r"move tensors by daemon.devices"):
            ran(configured(tmp_path / "c", model, [sae], "mps"), samples(tiny.contrast_records(2)))

    def test_computes_as_the_cpu_does(self, mps):
        x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
        there = to_device(x, "mps")
        there[1] = 0
        there.mul_(2)
        assert there.device.type == "mps" and there.tolist() == to_exact(there).tolist()
        x[1] = 0
        torch.testing.assert_close(to_exact(there @ there.T), (2 * x) @ (2 * x).T)


def moved_by_the_product(values: torch.Tensor) -> torch.Tensor:
    return values.cpu()


def test_the_message_of_a_text_that_is_not_finite_names_a_device_that_has_float64(model, tmp_path, mps):
    sae = tiny.save_sae(tmp_path / "s", "blocks.1.hook_resid_post")
    with torch.inference_mode():
        engine, _ = try_engines(configured(tmp_path / "c", model, [sae], "mps"))
    message = not_finite_message("fact", NotFinite(0, 0, True), engine.info)
    assert message.endswith("set model.dtype to float64 and model.device to cpu")
    assert device_check.TOKENS <= 64
