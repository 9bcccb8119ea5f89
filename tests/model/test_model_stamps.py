from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch

from daemon import model_wiring
from daemon.config import load_config
from daemon.errors import ConfigError
from daemon.model import onednn
from daemon.model.engine import Engine
from daemon.model.fused_decoder import FusedDecoder
from daemon.model.loading import LoadedModel
from daemon.model.stored_tokenizer import StoredTokenizer
from daemon.native.rmsnorm_rope_attention import routines
from daemon.recipes import Conversation, Message
from daemon.source.chat import ChatTemplate
from tests.support import tiny
from tests.support.engines import random_texts
from tests.support.families import save_family

HOOKS = ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre")
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TEXTS = [9, 4, 40, 1, 17]

pytestmark = pytest.mark.skipif(routines() is None, reason="installed without a C compiler")


@pytest.fixture(params=["onednn", "torch"])
def products(request, monkeypatch) -> None:
    if request.param == "onednn" and not onednn.works(torch.float32):
        pytest.skip("needs oneDNN's packed products")
    monkeypatch.setattr(onednn, "faster", lambda dtype: request.param == "onednn")


class Start:
    """Starts of one configuration, and whether each had Transformers load the model."""

    def __init__(self, folder, monkeypatch, family: str = "llama", hooks=HOOKS) -> None:
        monkeypatch.setenv("LENSD_CACHE_DIR", str(folder / "cache"))
        self.model = save_family(folder / "model", family)
        saes = [tiny.save_sae(folder / f"sae{n}", hook, seed=n) for n, hook in enumerate(hooks)]
        self.toml = folder / "lensd.toml"
        self.toml.write_text(tiny.Tiny(self.model, tuple(saes)).toml())
        self.loads = 0
        load = model_wiring.load_model

        def counted(*args: object, **options: object) -> LoadedModel:
            self.loads += 1
            return load(*args, **options)

        monkeypatch.setattr(model_wiring, "load_model", counted)

    def __call__(self, **flags: object) -> tuple[Engine, LoadedModel]:
        return model_wiring.load_engine(load_config(self.toml, {}, flags))


def assert_same(one: Engine, other: Engine) -> None:
    assert one.info == other.info
    assert [sae.identity for sae in one.info.saes] == [sae.identity for sae in other.info.saes]
    texts = random_texts(TEXTS)
    for a, b in zip(one.extract(texts).layers, other.extract(texts).layers, strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.acts.indices, b.acts.indices)
        assert torch.equal(a.acts.values, b.acts.values)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_model_is_the_same_with_its_stamp_and_without(family, products, tmp_path, monkeypatch):
    start = Start(tmp_path, monkeypatch, family)
    first, _ = start()
    assert start.loads == 1
    second, loaded = start()
    assert start.loads == 1
    assert isinstance(loaded.model, FusedDecoder)
    assert_same(first, second)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "qwen3"])
def test_a_model_of_another_kind_is_loaded_by_transformers_each_time(family, tmp_path, monkeypatch):
    start = Start(tmp_path, monkeypatch, family)
    first, _ = start()
    second, loaded = start()
    assert start.loads == 2
    assert not isinstance(loaded.model, FusedDecoder)
    assert_same(first, second)


def test_places_inside_layers_other_types_and_predictions_need_transformers(tmp_path, monkeypatch):
    start = Start(tmp_path, monkeypatch, hooks=("blocks.1.hook_mlp_out",))
    for flags in ({}, {"model.dtype": "float64"}, {"model.dtype": "bfloat16"}, {"analysis.log_probs": True}):
        for _ in range(2):
            _, loaded = start(**flags)
            assert not isinstance(loaded.model, FusedDecoder)


def test_a_changed_file_of_the_model_is_read_anew(tmp_path, monkeypatch):
    start = Start(tmp_path, monkeypatch)
    start()
    for name, key, value in (
        ("config.json", "rope_theta", 5000.0),
        ("tokenizer_config.json", "chat_template", TEMPLATE),
    ):
        path = start.model / name
        settings = json.loads(path.read_text())
        settings.pop("rope_parameters", None)
        path.write_text(json.dumps({**settings, key: value}))
        before = start.loads
        changed, _ = start()
        assert start.loads == before + 1
        again, _ = start()
        assert start.loads == before + 1
        assert_same(changed, again)
    shutil.rmtree(start.model)
    start.model = save_family(start.model, "gpt2")
    start()
    assert start.loads == 4


def test_values_that_are_not_the_stamps_are_not_believed(tmp_path, monkeypatch):
    """Whatever a stamp says, an engine must give the plain modules' values."""
    start = Start(tmp_path, monkeypatch)
    first, _ = start()
    (path,) = (tmp_path / "cache" / "vouched-models").iterdir()
    whole = json.loads(path.read_text())
    stamps = model_wiring.model_stamps(load_config(start.toml, {}, {}))
    assert stamps is not None
    content = whole["content"]
    slower = [2 * one for one in content["shape"]["inv_freq"]]
    stamps.stamps.write(
        whole["identity"]["subject"], {**content, "shape": {**content["shape"], "inv_freq": slower}}
    )
    second, loaded = start()
    assert start.loads == 2
    assert not isinstance(loaded.model, FusedDecoder)
    assert_same(first, second)
    third, loaded = start()
    assert isinstance(loaded.model, FusedDecoder)  # the stamp was written again
    assert_same(first, third)


def test_a_stamped_model_refuses_the_same_dictionaries(tmp_path, monkeypatch):
    start = Start(tmp_path, monkeypatch)
    start()
    tiny.save_sae(tmp_path / "sae1", "blocks.99.hook_resid_post")
    with pytest.raises(ConfigError, match="but the model has"):
        start()
    tiny.save_sae(tmp_path / "sae1", "blocks.0.hook_resid_post")
    moved, _ = start()
    assert start.loads == 2
    assert_same(moved, start()[0])


def test_a_stored_tokenizer_reads_as_transformers_own(tmp_path, monkeypatch):
    start = Start(tmp_path, monkeypatch)
    settings = start.model / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": TEMPLATE}))
    _, plain = start()
    _, loaded = start()
    stored = loaded.tokenizer
    assert isinstance(stored, StoredTokenizer)
    assert stored.backend_tokenizer.to_str() == plain.tokenizer.backend_tokenizer.to_str()
    assert (stored.bos_token_id, stored.eos_token_id) == (
        plain.tokenizer.bos_token_id,
        plain.tokenizer.eos_token_id,
    )
    chat = Conversation((Message("user", "one"), Message("assistant", "two")))
    expected = ChatTemplate.of(plain.tokenizer)
    assert expected is not None
    for tokenizer in (stored, pickle.loads(pickle.dumps(stored))):
        template = ChatTemplate.of(tokenizer)
        assert template is not None
        assert template.encode(chat, "all", None) == expected.encode(chat, "all", None)
