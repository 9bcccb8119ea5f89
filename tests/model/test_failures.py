"""An error of a library becomes one line with the cause, the remedy and whose it is."""

from __future__ import annotations

import errno
import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open

from daemon.errors import ConfigError, MachineError
from daemon.model.failures import explain, explained, sense

ALLOCATION = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
)


def of_the_hub(kind: type[Exception], status: int, text: str = "x") -> Exception:
    """An exception of huggingface_hub with the answer that it tells of, whatever HTTP library is below."""
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    error.response = SimpleNamespace(status_code=status, headers={})  # type: ignore[attr-defined]
    return error


def raised_from(outer: Exception, cause: Exception) -> Exception:
    outer.__cause__ = cause
    return outer


def by_requests(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} error", response=response)


def broken_file(tmp_path: Path) -> Exception:
    (tmp_path / "x").write_bytes(b"123456789")
    with pytest.raises(SafetensorError) as error:
        safe_open(tmp_path / "x", framework="pt")
    return error.value


OF_THE_USER = {
    "gated": (
        of_the_hub(hub_errors.GatedRepoError, 403, "403 at https://hf.co/x/y/resolve/main/config.json."),
        "gated.*https://hf.co/x/y.*licence.*HF_TOKEN",
    ),
    "gated, as Transformers says it": (
        raised_from(
            OSError("You are trying to access a gated repo.\nMake sure"),
            of_the_hub(hub_errors.GatedRepoError, 401),
        ),
        "gated.*licence",
    ),
    "no such repository": (
        raised_from(
            OSError("x/y is not a local folder"), of_the_hub(hub_errors.RepositoryNotFoundError, 401)
        ),
        "no such repository.*private.*HF_TOKEN",
    ),
    "no such file": (of_the_hub(hub_errors.RemoteEntryNotFoundError, 404), r"no such file \(404\)"),
    "no such revision": (of_the_hub(hub_errors.RevisionNotFoundError, 404), "revision"),
    "a wrong token": (of_the_hub(hub_errors.HfHubHTTPError, 401), r"refuses the token \(401\)"),
    "a wrong token for a repository": (
        of_the_hub(hub_errors.RepositoryNotFoundError, 401, "Invalid credentials in Authorization header"),
        "refuses the token",
    ),
    "no right": (of_the_hub(hub_errors.HfHubHTTPError, 403), r"denies access \(403\)"),
    "404 by requests": (by_requests(404), r"no such file \(404\)"),
    "a name that is none": (hub_errors.HFValidationError("Repo id must be in the form"), "OWNER/NAME"),
    "offline": (
        raised_from(OSError("We couldn't connect"), hub_errors.OfflineModeIsEnabled("x")),
        "HF_HUB_OFFLINE",
    ),
    "a missing package": (
        ImportError("requires the protobuf library\n\nbut it was not found\n" * 30),
        "package that is not installed.*protobuf",
    ),
    "remote code": (
        ValueError("The repository x contains custom code which must be executed ... trust_remote_code=True"),
        "needs code out of its repository",
    ),
    "unknown": (
        ValueError(
            "The checkpoint you are trying to load has model type `zz` but Transformers does not recognize"
            " this architecture."
        ),
        "no model_type zz: upgrade",
    ),
    "no causal model": (
        ValueError(
            "Unrecognized configuration class <class 'transformers.models.t5.configuration_t5.T5Config'>"
            " for this kind of AutoModel: " + "x" * 5000
        ),
        "T5 is no causal language model",
    ),
    "a state dict": (
        RuntimeError("Error(s) in loading state_dict for StandardSAE:\n\tsize mismatch for W_enc: copying"),
        "Error.*: size mismatch for W_enc",
    ),
    "a bare key": (KeyError("batchtopk"), "KeyError: 'batchtopk'"),
    "no words": (AssertionError(), "AssertionError"),
    "a damaged file of JSON": (json.JSONDecodeError("Expecting value", "x", 0), "JSON file of it is damaged"),
    "not to be read": (
        PermissionError(errno.EACCES, "Permission denied", "/m/config.json"),
        "/m/config.json can't be read by this user",
    ),
    "not there": (FileNotFoundError(errno.ENOENT, "No such file", "/m/x"), "'/m/x'.*complete the folder"),
    "colours and lines": (RuntimeError("\x1b[31mbad\x1b[0m\n" + "word " * 3000), "bad"),
}
OF_THE_MACHINE = {
    "429": (of_the_hub(hub_errors.HfHubHTTPError, 429), "429, too many requests: try again later"),
    **{
        str(status): (of_the_hub(hub_errors.HfHubHTTPError, status), f"answers {status}")
        for status in (408, 500, 502, 503, 504)
    },
    "503 behind Transformers": (
        raised_from(
            OSError("There was a specific connection error"), of_the_hub(hub_errors.HfHubHTTPError, 503)
        ),
        "503",
    ),
    "500 behind a missing file": (
        raised_from(
            hub_errors.LocalEntryNotFoundError("can't find"), of_the_hub(hub_errors.HfHubHTTPError, 500)
        ),
        "500",
    ),
    "500 by requests": (by_requests(500), "500"),
    "no way": (
        raised_from(OSError("We couldn't connect"), ConnectionRefusedError(111, "refused")),
        "can't be reached.*network",
    ),
    "no name": (socket.gaierror(-2, "Name or service not known"), "can't be reached"),
    "too slow": (requests.exceptions.ReadTimeout("read timed out"), "can't be reached"),
    "broken off": (
        requests.exceptions.ChunkedEncodingError("Connection broken: IncompleteRead"),
        "can't be reached",
    ),
    "not in the cache": (
        hub_errors.LocalEntryNotFoundError("An error happened while trying to locate the file"),
        "can't be reached",
    ),
    "xet": (RuntimeError("Data processing error: CAS service error : Reqwest Error"), "can't be reached"),
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), "no room on the disk.*HF_HOME"),
    "a quota": (
        raised_from(ValueError("x"), OSError(errno.EDQUOT, "Disk quota exceeded")),
        "no room on the disk",
    ),
    "a full disk in words": (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        "no room on the disk",
    ),
    "no memory": (RuntimeError(ALLOCATION), "not enough memory"),
    "no memory of the device": (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        "not enough memory",
    ),
    "no memory at all": (MemoryError(), "not enough memory"),
    "no descriptors": (OSError(errno.EMFILE, "Too many open files"), "can't read or store"),
}


def one_line(error: Exception) -> str:
    message = str(error)
    assert message.startswith("model m: ") and "\n" not in message and "\x1b" not in message
    assert len(message) < 450
    return message


@pytest.mark.parametrize("case", OF_THE_USER)
def test_what_the_user_can_mend_is_a_configuration_error(case):
    error, said = OF_THE_USER[case]
    found = explain("model m", error)
    assert isinstance(found, ConfigError)
    message = one_line(found)
    assert re.search(said, message), message
    assert "check the network" not in message


@pytest.mark.parametrize("case", OF_THE_MACHINE)
def test_what_passes_by_itself_is_the_machines(case):
    error, said = OF_THE_MACHINE[case]
    found = explain("model m", error)
    assert isinstance(found, MachineError)
    message = one_line(found)
    assert re.search(said, message), message


def test_damaged_weights_say_so(tmp_path):
    found = explain("model m", broken_file(tmp_path))
    assert isinstance(found, ConfigError)
    assert "its weights are damaged or cut off" in one_line(found)


def test_what_is_written_for_the_user_passes_as_it_is():
    with pytest.raises(ConfigError, match=r"^as it is$"), explained("model m"):
        raise ConfigError("as it is")
    with pytest.raises(MachineError, match=r"^inside$"), explained("model m"):
        try:
            raise MachineError("inside")
        except MachineError as error:
            raise RuntimeError("outside") from error
    with pytest.raises(KeyboardInterrupt), explained("model m"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Error(s) in loading:\n\tsize mismatch", "Error(s) in loading: size mismatch"),
        ("\n\n  first \n second", "first"),
        ("a:\nb:\nc\nd", "a: b: c"),
        ("", "ValueError"),
        ("only a heading:", "only a heading"),
    ],
)
def test_the_sense_of_a_message_is_its_first_line_that_is_no_heading(text, found):
    assert sense(ValueError(text)) == found
