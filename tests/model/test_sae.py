from __future__ import annotations

import json

import pytest
import torch
from structlog.testing import capture_logs

from daemon.config import SaeSection
from daemon.errors import ConfigError
from daemon.model.loading import resolve_device
from daemon.model.location import locate_model, official_name
from daemon.model.sae import load_saes
from tests.support import tiny


def load(*folders, d_model: int = tiny.D_MODEL, n_layers: int = 4, bos_habit: bool = True):
    """Dictionaries of these folders, or of whole sections."""
    return load_saes(
        [one if isinstance(one, SaeSection) else SaeSection(path=one) for one in folders],
        d_model=d_model,
        n_layers=n_layers,
        device="cpu",
        dtype=torch.float32,
        bos_habit=lambda: bos_habit,
    )


def test_dictionaries_come_in_order_of_layer_with_their_hash(tmp_path):
    late = tiny.save_sae(tmp_path / "late", "blocks.3.hook_resid_post")
    early = tiny.save_sae(tmp_path / "early", "blocks.1.hook_resid_pre", architecture="standard")
    loaded = load(late, early)
    assert [entry.info.layer for entry in loaded] == [1, 3]
    assert [entry.info.architecture for entry in loaded] == ["standard", "jumprelu"]
    assert loaded[0].info.source == "early"
    assert all(len(entry.info.weights_sha256) == 64 for entry in loaded)
    assert loaded[0].info.weights_sha256 != loaded[1].info.weights_sha256


def test_a_dictionary_of_another_model_is_refused(tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    with pytest.raises(
        ConfigError, match=r"d_in = 32, but the model has d_model = 64: it belongs to another"
    ):
        load(folder, d_model=64)
    with pytest.raises(ConfigError, match=r"hook blocks\.1\.hook_resid_post, but the model has 1 layers"):
        load(folder, n_layers=1)


def test_a_dictionary_that_does_not_say_reads_texts_as_the_tokenizer_begins_them(tmp_path):
    silent = tiny.save_sae(tmp_path / "silent", "blocks.1.hook_resid_post", prepend_bos=None)
    says = tiny.save_sae(tmp_path / "says", "blocks.2.hook_resid_post", prepend_bos=False)
    for habit in (True, False):
        with capture_logs() as logs:
            loaded = load(silent, says, bos_habit=habit)
        assert [entry.info.prepend_bos for entry in loaded] == [habit, False]
        (line,) = [line for line in logs if line["event"] == "sae.prepend_bos"]
        assert (line["sae"], line["prepend_bos"]) == ("silent", habit)
    for setting in (True, False):
        sections = [SaeSection(path=path, prepend_bos=setting) for path in (silent, says)]
        with capture_logs() as logs:
            loaded = load(*sections, bos_habit=not setting)
        assert [entry.info.prepend_bos for entry in loaded] == [setting, setting]
        assert logs == []


def test_dictionaries_of_one_layer_keep_the_order_in_which_they_are_given(tmp_path):
    mlp = tiny.save_sae(tmp_path / "mlp", "blocks.1.hook_mlp_out")
    post = tiny.save_sae(tmp_path / "post", "blocks.1.hook_resid_post")
    early = tiny.save_sae(tmp_path / "early", "blocks.0.hook_resid_post")
    assert [entry.info.name for entry in load(mlp, post, early)] == ["l0", "l1_mlp_96", "l1_96"]
    given = SaeSection(path=post, name="wide")
    assert [entry.info.name for entry in load(given, early, mlp)] == ["l0", "wide", "l1_mlp_96"]


@pytest.mark.parametrize("hook_name", ["hook_embed", "ln_final.hook_normalized", ""])
def test_a_hook_outside_the_layers_is_refused(hook_name, tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", hook_name)
    with pytest.raises(ConfigError, match=r"is not supported: use a dictionary at a hook point"):
        load(folder)


def test_a_transcoder_says_what_it_reads_and_what_it_predicts(tmp_path):
    folder = tiny.save_transcoder(tmp_path / "t", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    (entry,) = load(folder)
    assert entry.hook_names == ("blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    assert (entry.info.layer, entry.info.d_in, entry.info.d_out) == (1, tiny.D_MODEL, tiny.D_OUT)


def test_a_transcoder_that_does_not_say_what_it_predicts_is_refused(tmp_path):
    folder = tiny.save_transcoder(tmp_path / "t", "blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out")
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["hook_name_out"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="a transcoder whose metadata has no hook_name_out"):
        load(folder)


def test_processed_weights_are_followed_only_where_they_can_be(tmp_path):
    processed = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    centred = tiny.save_sae(tmp_path / "mlp", "blocks.1.hook_mlp_out", **processed)
    assert load(centred)[0].center_residual
    scaled = tiny.save_sae(tmp_path / "z", "blocks.1.mlp.hook_post", **processed)
    with pytest.raises(ConfigError, match=r"gives? at blocks\.1\.mlp\.hook_post can't be told"):
        load(scaled)


def test_unfolded_normalisation_is_refused(tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", "blocks.1.hook_resid_post")
    tiny.overwrite_sae_config(folder, normalize_activations="expected_average_only_in")
    with pytest.raises(ConfigError, match="fold it first"):
        load(folder)


def test_a_folder_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(ConfigError, match=r"no cfg\.json there: give a folder in SAELens format"):
        load(tmp_path)


def test_an_unknown_release_lists_what_is_known():
    source = SaeSection(release="no-such-release", id="x")
    with pytest.raises(ConfigError, match="SAE no-such-release/x: Release no-such-release not found"):
        load_saes([source], d_model=1, n_layers=1, device="cpu", dtype=torch.float32, bos_habit=bool)


def test_a_folder_that_holds_no_model_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        locate_model(str(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        locate_model(str(tmp_path / "nowhere"), tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match="lensd loads no pickled weights"):
        locate_model(str(tmp_path), tmp_path)


def test_transformer_lens_names_become_hugging_face_names():
    assert official_name("gpt2-small") == "gpt2"
    assert official_name("gemma-2-2b") == "google/gemma-2-2b"
    assert official_name("x/y") == "x/y"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no CUDA device here: use auto or cpu"):
        resolve_device("cuda")
    with pytest.raises(ConfigError, match=r"model\.device = 'toaster'"):
        resolve_device("toaster")
    assert resolve_device("auto") == "cpu"
