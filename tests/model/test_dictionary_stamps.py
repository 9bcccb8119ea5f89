from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from structlog.testing import capture_logs

from daemon.config import SaeSection
from daemon.model import saelens
from daemon.model.dictionary import WEIGHTS_NAME, Dictionary
from daemon.model.dictionary_stamps import DictionaryStamps
from daemon.model.encoding import PlainEncoder, encoder_of
from daemon.model.hub import Hub
from daemon.model.sae import LoadedSae, load_sae
from daemon.model.stamps import Stamps
from tests.support import tiny
from tests.support.hub import hub_here, running_hub

HOOK = "blocks.1.hook_resid_post"
ARCHITECTURES = ["standard", "jumprelu", "topk", "gated", *tiny.TRANSCODERS]


@pytest.fixture
def stamps(tmp_path) -> DictionaryStamps:
    return DictionaryStamps(Stamps(tmp_path / "stamps"), torch.float32, torch.float32)


def saved(folder, architecture: str = "jumprelu", **changes: object):
    if architecture in tiny.TRANSCODERS:
        tiny.save_transcoder(folder, HOOK, "blocks.2.hook_resid_post", architecture=architecture)
    else:
        tiny.save_sae(folder, HOOK, architecture=architecture)
    if changes:
        tiny.overwrite_sae_config(folder, **changes)
    return folder


def load(folder, stamps: DictionaryStamps) -> LoadedSae:
    return load_sae(SaeSection(path=folder), device="cpu", dtype=torch.float32, stamps=stamps)


def remembered(folder, stamps: DictionaryStamps) -> LoadedSae:
    """The dictionary as SAELens loads it, with its stamp written."""
    entry = load(folder, stamps)
    assert not entry.vouched
    assert entry.origin is not None
    assert not isinstance(encoder_of(entry), PlainEncoder)
    stamps.remember(entry.sae, entry.origin)
    return entry


@pytest.fixture
def no_saelens(monkeypatch):
    """From its call on, SAELens loads nothing."""

    def forbid() -> None:
        monkeypatch.setattr(saelens, "read_folder", None)
        monkeypatch.setattr(saelens, "read_hub", None)

    return forbid


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["none", "layer_norm"])
def test_a_dictionary_is_the_same_with_its_stamp_and_without(
    architecture, mode, tmp_path, stamps, no_saelens
):
    folder = saved(tmp_path / "sae", architecture, normalize_activations=mode)
    first = remembered(folder, stamps)
    no_saelens()
    second = load(folder, stamps)
    assert second.vouched
    assert isinstance(second.sae, Dictionary)
    assert second.info == first.info
    assert second.info.identity == first.info.identity
    assert second.info.neuronpedia_id == first.info.neuronpedia_id
    assert (second.card, second.center_residual, second.reconstructs, second.hook_names) == (
        first.card,
        first.center_residual,
        first.reconstructs,
        first.hook_names,
    )
    x = torch.randn(24, tiny.D_MODEL, generator=torch.Generator().manual_seed(1))
    encoders = [encoder_of(entry) for entry in (first, second)]
    assert type(encoders[0]) is type(encoders[1])
    assert encoders[0].bounds == encoders[1].bounds
    (a, b) = (encoder.encode(x) for encoder in encoders)
    assert (a.values > 0).any()
    assert torch.equal(a.to_dense(tiny.D_SAE), b.to_dense(tiny.D_SAE))
    assert torch.equal(*(encoder.decode(a, x) for encoder in encoders))
    assert torch.equal(*(encoder.project(x) for encoder in encoders))


def test_a_changed_file_is_loaded_by_saelens(tmp_path, stamps):
    folder = saved(tmp_path / "sae")
    first = remembered(folder, stamps)
    assert load(folder, stamps).vouched
    tensors = load_file(folder / WEIGHTS_NAME)
    save_file({**tensors, "b_dec": tensors["b_dec"] + 1}, folder / WEIGHTS_NAME)
    changed = load(folder, stamps)
    assert not changed.vouched
    assert changed.info.weights_sha256 != first.info.weights_sha256
    save_file(tensors, folder / WEIGHTS_NAME)
    tiny.overwrite_sae_config(folder, apply_b_dec_to_input=False)
    assert not load(folder, stamps).vouched
    (folder / "activation_scaler.json").write_text("{}")
    assert not load(folder, stamps).vouched


def test_a_copy_elsewhere_has_the_same_stamp_under_its_own_name(tmp_path, stamps):
    first = remembered(saved(tmp_path / "sae"), stamps)
    copy = load(shutil.copytree(tmp_path / "sae", tmp_path / "copy"), stamps)
    assert copy.vouched
    assert (first.info.source, copy.info.source) == ("sae", "copy")


def test_a_damaged_stamp_is_passed_over(tmp_path, stamps):
    folder = saved(tmp_path / "sae")
    first = remembered(folder, stamps)
    (path,) = stamps.stamps.folder.iterdir()
    whole = json.loads(path.read_text())
    for content in (
        {},
        {**whole["content"], "tensors": ["W_gone"]},
        {**whole["content"], "facts": {"d_in": 1}},
    ):
        stamps.stamps.write(whole["identity"]["subject"], content)
        entry = load(folder, stamps)
        assert not entry.vouched
        assert entry.info == first.info


def test_what_saelens_changed_or_warned_of_gets_no_stamp(tmp_path, stamps):
    folded = saved(tmp_path / "folded", "standard", normalize_activations="expected_average_only_in")
    (folded / "activation_scaler.json").write_text('{"scaling_factor": 2.0}')
    entry = load(folded, stamps)
    assert entry.origin is not None
    stamps.remember(entry.sae, entry.origin)
    assert not load(folded, stamps).vouched
    odd = saved(tmp_path / "odd", "standard", made_by="nobody")
    with capture_logs() as logs:
        assert load(odd, stamps).origin is None
    assert [line["event"] for line in logs] == ["sae.unknown_settings"]


def test_prepend_bos_is_asked_for_at_each_start(tmp_path, stamps):
    folder = tiny.save_sae(tmp_path / "sae", HOOK, prepend_bos=None)
    remembered(folder, stamps)
    for habit in (True, False):
        entry = load_sae(
            SaeSection(path=folder),
            device="cpu",
            dtype=torch.float32,
            bos_habit=lambda habit=habit: habit,
            stamps=stamps,
        )
        assert entry.vouched
        assert entry.info.prepend_bos is habit


def test_a_hubs_dictionary_goes_by_its_commit(tmp_path, stamps, no_saelens):
    tiny.save_sae(tmp_path / "one" / HOOK, HOOK)
    tiny.save_sae(tmp_path / "two" / HOOK, HOOK, seed=1)

    def from_hub() -> LoadedSae:
        section = SaeSection(release="x/saes", id=HOOK)
        return load_sae(section, device="cpu", dtype=torch.float32, hub=Hub(), stamps=stamps)

    with running_hub() as hub, hub_here(hub, tmp_path / "cache"):
        commit = hub.add("x/saes", tmp_path / "one")
        first = from_hub()
        assert first.origin is not None
        stamps.remember(first.sae, first.origin)
        second = from_hub()
        assert second.vouched
        assert second.info == first.info
        assert second.info.revision == commit
        assert torch.equal(second.W_dec, first.W_dec)
        newer = hub.add("x/saes", tmp_path / "two")
        third = from_hub()
        assert not third.vouched
        assert third.info.revision == newer
        hub.add("x/saes", tmp_path / "one")
        no_saelens()
        assert from_hub().info == first.info
        hub.down()
        assert from_hub().info == first.info
