"""lensd keeps the promises of deploy/SECURITY.md that no other test shows."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from daemon.config import SaeSection, load_config, preset_names
from daemon.errors import ConfigError, MachineError
from daemon.model.loading import load_model
from daemon.model.location import locate_model
from daemon.model.sae import load_sae
from daemon.model.smollm2 import WEIGHTS_SHA256, smollm2_folder
from deploy import licences
from tests.reliability.daemons import Job
from tests.reliability.handling import events, running, wait_until
from tests.support import tiny
from tests.support.hub import hub_here, running_hub
from tests.support.hub_dictionaries import Dictionary
from tests.support.hub_formats import dictionary_learning

ROOT = Path(__file__).parents[2]
LISTENING = "0A"  # in /proc/net/tcp
PICKLED_RELEASE = ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.12.hook_resid_post__trainer_0")


def listening(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """Where a process listens by TCP."""
    links = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
    inodes = {link.removeprefix("socket:[").rstrip("]") for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTENING and fields[9] in inodes:
                words = bytes.fromhex(fields[1].partition(":")[0])
                octets = b"".join(
                    words[i : i + 4][::-1] for i in range(0, len(words), 4)
                )  # little-endian words
                found.append(ipaddress.ip_address(octets))
    return found


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT | os.O_WRONLY)


@pytest.fixture
def ran(tmp_path) -> Path:
    return tmp_path / "code-in-a-pickle-ran"


@pytest.fixture
def trusting(monkeypatch) -> None:
    """torch.load as it was before weights_only, which an environment variable still brings back."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def one_line(error: pytest.ExceptionInfo[ConfigError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("preset", preset_names())
def test_no_preset_listens_beyond_this_machine(preset):
    address = load_config(None, {}, {"model.name": preset}).http.address
    assert ipaddress.ip_address(address.rpartition(":")[0]).is_loopback


@pytest.mark.slow
def test_a_daemon_listens_on_loopback_alone(daemons, tmp_path):
    host = load_config(None, {}).http.address.rpartition(":")[0]
    flags = {"http.enabled": True, "http.address": f"{host}:0"}
    job = Job(tmp_path / "inbox", tmp_path / "outbox", tmp_path / "log", once=False, flags=flags)
    with running(daemons, job) as pid:
        wait_until(lambda: events(job.log, "http.listening"), "the address", pid)
        addresses = listening(pid)
    assert [address.is_loopback for address in addresses] == [True]


def test_a_model_with_pickled_weights_alone_is_refused(tmp_path):
    folder = tiny.save_llama(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"no \.safetensors there, and lensd loads no pickled weights"
    ) as error:
        locate_model(str(folder), tmp_path)
    one_line(error)


def test_pickled_weights_beside_other_safetensors_are_not_read(tmp_path, ran, trusting):
    folder = tiny.save_llama(tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "adapter.safetensors")
    torch.save({"lm_head.weight": Payload(ran)}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"^model .*pickled: .*model\.safetensors") as error:
        load_model(locate_model(str(folder), tmp_path), device="cpu", dtype=torch.float32)
    one_line(error)
    assert not ran.exists()


def test_safetensors_are_taken_where_pickled_weights_lie_beside_them(tmp_path, ran, trusting):
    folder = tiny.save_llama(tmp_path / "both")
    torch.save({"lm_head.weight": Payload(ran)}, folder / "pytorch_model.bin")
    loaded = load_model(locate_model(str(folder), tmp_path), device="cpu", dtype=torch.float32)
    assert loaded.d_model == tiny.D_MODEL
    assert not ran.exists()


def test_a_models_own_code_is_not_run(tmp_path, ran):
    folder = tiny.save_llama(tmp_path / "with-code")
    config = json.loads((folder / "config.json").read_text())
    config["model_type"] = "homemade"
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    with pytest.raises(ConfigError, match="model with-code: can't be loaded") as error:
        load_model(locate_model(str(folder), tmp_path), device="cpu", dtype=torch.float32)
    one_line(error)
    assert not ran.exists()


def test_a_pickled_dictionary_in_a_folder_is_refused(tmp_path):
    folder = tiny.save_sae(tmp_path / "sae", "blocks.0.hook_resid_post")
    (folder / "sae_weights.safetensors").rename(folder / "sae_weights.pt")
    with pytest.raises(ConfigError, match=r"pickled weights, sae_weights\.pt, are not loaded") as error:
        load_sae(SaeSection(path=folder), device="cpu", dtype=torch.float32)
    one_line(error)


@contextlib.contextmanager
def pickled_on_a_hub(folder: Path, save: Callable[[Path], object]) -> Iterator[SaeSection]:
    """A release of dictionary_learning's whose ae.pt is what `save` writes."""
    release, sae_id = PICKLED_RELEASE
    one = Dictionary(
        release, sae_id, "tiny/gemma-2", dictionary_learning("AutoEncoder"), "blocks.1.hook_resid_post"
    )
    one.save(folder / "files")
    save(folder / "files" / one.path / "ae.pt")
    with running_hub() as hub, hub_here(hub, folder / "cache"):
        hub.add(one.repo, folder / "files")
        yield one.section


def pickled_weights() -> dict[str, torch.Tensor]:
    d_in, d_sae = tiny.D_MODEL, tiny.D_SAE
    sizes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae)}
    return {name: torch.randn(size) for name, size in (sizes | {"bias": (d_in,)}).items()}


HOSTILE = {
    "code beside weights": lambda path, ran: torch.save({**pickled_weights(), "x": Payload(ran)}, path),
    "code beside weights, as torch saved before zip files": lambda path, ran: torch.save(
        {**pickled_weights(), "x": Payload(ran)}, path, _use_new_zipfile_serialization=False
    ),
    "a module": lambda path, ran: torch.save(torch.nn.Linear(8, 16), path),
    "a plain pickle of Python's": lambda path, ran: path.write_bytes(pickle.dumps(Payload(ran))),
    "a program of TorchScript": lambda path, ran: torch.jit.save(
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), str(path)
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of TorchScript
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_in_a_pickled_dictionary_is_refused_and_not_run(kind, tmp_path, ran, trusting):
    load = torch.load
    refused = pytest.raises(ConfigError, match=r"^SAE sae_bench.*\(ae\.pt\).*safetensors")
    with pickled_on_a_hub(tmp_path, lambda path: HOSTILE[kind](path, ran)) as section, refused as error:
        load_sae(section, device="cpu", dtype=torch.float32)
    one_line(error)
    assert not ran.exists()
    assert torch.load is load


def test_a_pickled_dictionary_of_tensors_alone_is_taken(tmp_path, trusting):
    weights = pickled_weights()
    with pickled_on_a_hub(tmp_path, lambda path: torch.save(weights, path)) as section:
        entry = load_sae(section, device="cpu", dtype=torch.float32)
    assert torch.equal(entry.sae.W_enc, weights["encoder.weight"].T)
    assert torch.equal(entry.sae.b_dec, weights["bias"])


def test_weights_of_the_bundled_model_that_were_changed_are_refused(tmp_path):
    folder = tmp_path / "models" / f"smollm2-135m-{WEIGHTS_SHA256[:12]}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"changed")
    with pytest.raises(MachineError, match=rf"model\.safetensors: SHA-256 is .*, expected {WEIGHTS_SHA256}"):
        smollm2_folder(tmp_path)


def test_the_table_of_licences_is_that_of_the_dependencies():
    page = licences.PAGE.read_text(encoding="utf-8")
    assert licences.with_table(page) == page, "run deploy/licences.py"


def test_every_file_that_the_page_names_is_there():
    page = (ROOT / "deploy" / "SECURITY.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:tests|deploy)/[\w./-]+)`", page)
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []
