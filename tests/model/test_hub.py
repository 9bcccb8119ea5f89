"""A hub that answers, that is in trouble and that is away: what is loaded, what is said, and whose it is."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
import time
from pathlib import Path

import pytest
import structlog
import torch
from transformers import AutoModelForCausalLM

from daemon.cli import exit_code
from daemon.config import SaeSection
from daemon.errors import ConfigError, LensdError
from daemon.model import hub as hubs
from daemon.model.hub import Hub
from daemon.model.loading import LoadedModel, load_model
from daemon.model.location import locate_model
from daemon.model.sae import LoadedSae, load_sae
from tests.support import tiny
from tests.support.hub import TROUBLES, Trouble, hub_here, running_hub
from tests.support.hub_dictionaries import DICTIONARIES, registered, save_dictionaries

HOOK = "blocks.1.hook_resid_post"
WITHIN = 10  # seconds, in which a hub's trouble is told


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    tiny.save_llama(folder / "model")
    tiny.save_sae(folder / "saes" / HOOK, HOOK)
    return folder


@pytest.fixture(autouse=True)
def no_tracebacks():
    """Of each error, in the log: to render one takes seconds."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.INFO))


@pytest.fixture
def hub(files, tmp_path):
    """A hub with a model and a dictionary, and an empty cache."""
    with running_hub() as hub, hub_here(hub, tmp_path / "cache"):
        hub.add("x/y", files / "model")
        hub.add("x/saes", files / "saes")
        yield hub


def model(name: str = "x/y", revision: str | None = None, start: Hub | None = None) -> LoadedModel:
    location = locate_model(name, Path("unused"), revision, start)
    return load_model(location, device="cpu", dtype=torch.float32)


def dictionary(revision: str | None = None, start: Hub | None = None) -> LoadedSae:
    section = SaeSection(release="x/saes", id=HOOK, revision=revision)
    return load_sae(section, device="cpu", dtype=torch.float32, hub=start)


def line_of(load) -> tuple[int, str]:
    """The exit code that an error leads to, and its line."""
    began = time.monotonic()
    with pytest.raises(LensdError) as error:
        load()
    assert time.monotonic() - began < WITHIN
    message = str(error.value)
    assert "\n" not in message and len(message) < 500, message
    return exit_code(error.value), message


SAID = {
    "gated": (2, "gated on the hub.*accept its licence.*hf auth login.*HF_TOKEN"),
    "licence not accepted": (2, "gated on the hub.*accept its licence.*hf auth login.*HF_TOKEN"),
    "bad token": (2, r"refuses the token \(401\)"),
    "no repository": (2, "no such repository on the hub"),
    "no revision": (2, "no such revision"),
    "no file": (2, "no such file|has no"),
    "no right": (2, "denies access"),
    "busy": (3, "429, too many requests"),
    "broken": (3, "500"),
    "away": (3, "503"),
    "hanging": (3, "can't be reached.*timed out"),
    "no hub": (2, "is no hub: check HF_ENDPOINT"),
}


@pytest.mark.parametrize(
    ("what", "place"), [(model, "everything"), (model, "weights"), (dictionary, "everything")]
)
@pytest.mark.parametrize("trouble", SAID)
def test_a_trouble_of_the_hub_is_one_line_and_whose_it_is(trouble, what, place, hub):
    if (trouble, place) == ("no hub", "weights"):
        pytest.skip("what is no hub has told nothing before")
    only = {"everything": "", "weights": ".safetensors"}[place]
    hub.suffers(dataclasses.replace(TROUBLES[trouble], only=only))
    code, said = SAID[trouble]
    got, line = line_of(what)
    assert re.search(said, line), line
    assert got == code, line


@pytest.mark.parametrize("what", [model, dictionary])
def test_a_hub_that_is_not_there_is_the_machines(what, hub):
    hub.down()
    code, line = line_of(what)
    assert (code, "can't be reached" in line) == (3, True), line


@pytest.mark.parametrize("trouble", ["cut off", "wrong length"])
@pytest.mark.parametrize("what", [model, dictionary])
def test_a_file_that_did_not_come_whole_is_fetched_again(trouble, what, hub):
    hub.suffers(dataclasses.replace(TROUBLES[trouble], only="elsewhere", times=1))
    what()
    assert hub.troubled == 1


def test_a_file_that_never_comes_whole_is_the_hubs(hub):
    hub.suffers(dataclasses.replace(TROUBLES["wrong length"], only="elsewhere"))
    code, line = line_of(model)
    assert (code, "can't be reached (Consistency check failed" in line) == (3, True), line


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_file_that_is_damaged_in_the_cache_is_fetched_again(name, hub, tmp_path):
    whole = model()
    (path,) = (tmp_path / "cache").rglob(name)
    blob = path.resolve()
    raw = blob.read_bytes()
    blob.write_bytes(raw[: len(raw) // 2])
    assert model().settings_sha256 == whole.settings_sha256
    assert path.read_bytes() == raw


def test_a_damaged_file_of_the_hub_is_not_fetched_for_ever(hub, files, tmp_path):
    tiny.save_sae(tmp_path / "broken" / HOOK, HOOK)
    path = tmp_path / "broken" / HOOK / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    hub.add("x/saes", tmp_path / "broken")
    for _ in range(2):
        code, line = line_of(dictionary)
        assert (code, "damaged or cut off" in line) == (2, True), line
    assert sum(asked.startswith("GET /elsewhere") for asked in hub.requests) == 1


WARM = [*(trouble for trouble in SAID if trouble != "no revision"), "down"]


@pytest.mark.parametrize("trouble", WARM)
def test_what_is_cached_starts_without_the_hub_at_the_first_no(trouble, hub):
    kept = model(), dictionary()
    hub.requests.clear()
    hub.down() if trouble == "down" else hub.suffers(TROUBLES[trouble])
    start = Hub()
    again = model(start=start), dictionary(start=start)
    assert again[0].location.commit == kept[0].location.commit
    assert again[0].settings_sha256 == kept[0].settings_sha256
    assert again[1].info == kept[1].info
    away = TROUBLES.get(trouble, Trouble(hangs=True))
    asked_once = away.hangs or away.status >= 429  # others may be of one repository
    assert len(hub.requests) == (0 if trouble == "down" else 1 if asked_once else 2)


def test_what_is_cached_is_not_asked_for_again(hub):
    model(), dictionary()
    hub.requests.clear()
    model(), dictionary()
    assert hub.requests == ["GET /api/models/x/y/revision/main", "GET /api/models/x/saes/revision/main"]


def test_a_branch_a_tag_and_a_commit_are_resolved(hub, tmp_path):
    first = hub.add("x/y", tiny.save_llama(tmp_path / "three", n_layers=3), "main", "v1")
    newest = hub.add("x/y", tiny.save_llama(tmp_path / "five", n_layers=5))
    assert [model(revision=name).n_layers for name in (None, "main", "v1", first, newest)] == [5, 5, 3, 3, 5]
    assert model(revision="v1").location.commit == first
    code, line = line_of(lambda: model(revision="v2"))
    assert (code, "no such revision" in line) == (2, True), line
    hub.down()
    assert model(revision="v1").location.commit == first
    assert model(revision=newest).n_layers == 5


def test_a_change_upstream_is_another_identity(hub, files, tmp_path):
    before = model(), dictionary()
    (tmp_path / "new").mkdir()
    for repo, folder in (("x/y", "model"), ("x/saes", "saes")):
        (files / folder / "README.md").write_text("changed")
        hub.add(repo, files / folder)
        (files / folder / "README.md").unlink()
    start = Hub()
    after = model(start=start), dictionary(start=start)
    assert after[0].settings_sha256 != before[0].settings_sha256
    assert after[1].info != before[1].info
    assert after[1].info.weights_sha256 == before[1].info.weights_sha256
    hub.add("x/y", files / "model")
    assert model(start=start).location.commit == after[0].location.commit  # within one start it stays


def test_a_revision_of_what_lies_here_is_refused(files):
    with pytest.raises(ConfigError, match=r"model\.revision = 'v1' goes with a model of the hub"):
        model(str(files / "model"), "v1")
    with pytest.raises(ValueError, match="revision goes with release and id"):
        SaeSection(path=files, revision="v1")
    for wrong in ("../x", "", "a b", "/x"):
        with pytest.raises(ValueError, match="a branch, a tag or a commit"):
            SaeSection(release="x/y", id="z", revision=wrong)


def test_a_gated_model_is_read_with_the_token_that_may(hub, files, monkeypatch):
    hub.add("x/gated", files / "model", token="right")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert model("x/gated").n_layers == 4


def test_no_bot_is_asked_to_convert_pickled_weights(hub, files, tmp_path):
    folder = tiny.save_llama(tmp_path / "pickled")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add("x/pickled", folder)
    code, line = line_of(lambda: model("x/pickled"))
    assert (code, "loads no pickled weights" in line) == (2, True), line
    asked = {request.split("/resolve/")[0] for request in hub.requests}
    assert asked <= {"GET /api/models/x/pickled/revision/main", "HEAD /x/pickled", "GET /x/pickled"}


def test_an_adapter_is_not_left_out(hub, tmp_path):
    for name, folder in (("x/both", tiny.save_llama(tmp_path / "both")), ("x/alone", tmp_path / "alone")):
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        hub.add(name, folder)
    assert "applies no adapters" in line_of(lambda: model("x/both"))[1]
    assert "adapter without its model" in line_of(lambda: model("x/alone"))[1]


def test_every_dictionary_that_is_cached_starts_without_the_hub(tmp_path):
    with running_hub() as hub, hub_here(hub, tmp_path / "cache"), registered():
        save_dictionaries(hub, tmp_path / "files")
        first = {one.name: loaded(one) for one in DICTIONARIES}
        hub.down()
        for one in DICTIONARIES:
            assert loaded(one) == first[one.name], one.name
        refused = {one.name for one in DICTIONARIES if one.support == "refused"}
        assert {name for name, info in first.items() if info is None} == refused


def loaded(one):
    """None where it is refused."""
    try:
        return load_sae(one.section, device="cpu", dtype=torch.float32).info
    except LensdError:
        return None


@pytest.mark.parametrize("end", [0, 1, 100])
def test_the_end_of_a_file_tells_whether_it_is_whole(end, files, tmp_path):
    raw = (files / "model" / "model.safetensors").read_bytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw[: len(raw) - end])
    assert hubs.ends_well(path) == (end == 0)


def test_offline_is_no_trouble_once_all_is_cached(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, line = line_of(model)
    assert (code, "HF_HUB_OFFLINE" in line) == (2, True), line
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model()
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model().n_layers == 4
    assert hub.requests == []


def test_a_cache_that_can_not_be_written_is_read(hub, tmp_path):
    kept = model()
    (tmp_path / "cache" / "models--x--y" / "refs").rename(tmp_path / "refs")
    (tmp_path / "cache" / "models--x--y" / "refs").write_text("")  # no folder can be made there
    assert model().location.commit == kept.location.commit


def test_shards_are_fetched_by_their_index(hub, tmp_path):
    folder = tiny.save_llama(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "shards")
    hub.add("x/shards", tmp_path / "shards")
    loaded = model("x/shards")
    assert len(list(loaded.location.snapshot.folder.glob("*.safetensors"))) > 3
    torch.testing.assert_close(loaded.model.state_dict(), whole.state_dict(), rtol=0, atol=0)
    hub.down()
    assert model("x/shards").settings_sha256 == loaded.settings_sha256
