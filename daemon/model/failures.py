"""Turns an exception of a loader, a hub or a library into one line: the cause and the remedy.

`ConfigError` is the user's to mend, `MachineError` the machine's or the hub's for now, so that a supervisor
tries again. Exceptions are told apart by class name and status: the HTTP library below the hub's client is
not always the same.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import structlog

from daemon.errors import ConfigError, LensdError, MachineError

SENSE_CHARACTERS = 240  # of a library's own words, at most
PASSING_STATUS = {408, 409, 423, 425, 429}  # and all from 500 on: the hub may answer later
PASSING_NAMES = {  # of classes of httpx, requests, urllib3, aiohttp, huggingface_hub and Python
    "TimeoutException",
    "NetworkError",
    "ProxyError",
    "RemoteProtocolError",
    "Timeout",
    "ConnectionError",
    "ChunkedEncodingError",
    "ContentDecodingError",
    "TimeoutError",
    "SSLError",
    "gaierror",
    "herror",
    "MaxRetryError",
    "IncompleteRead",
    "ProtocolError",
    "XetDownloadError",
    "RevisionResolutionError",
    "LocalEntryNotFoundError",
}
BAD_ADDRESS_NAMES = {"UnsupportedProtocol", "InvalidURL", "InvalidSchema", "MissingSchema"}
MACHINE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.EIO,
    errno.EROFS,
    errno.ESTALE,
    errno.ENODEV,
}
DISK_FULL = re.compile(r"no space left|disk quota exceeded|not enough (?:free )?disk space", re.IGNORECASE)
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|std::bad_alloc",
    re.IGNORECASE,
)
TRANSIENT_WORDS = re.compile(
    r"cas service error|data processing error|consistency check failed|connection reset|timed out",
    re.IGNORECASE,
)
PANIC = "PanicException"  # of the Rust below tokenizers and safetensors: no Exception of Python's
DAMAGED = re.compile(r"HeaderTooLarge|PytorchStreamReader failed|failed finding central directory")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")
LOCATION = re.compile(r"(?:https?://\S+)")

log = structlog.get_logger()


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Within it every exception of a library becomes one line about `what`, a ConfigError or MachineError.

    Those written for the user already pass as they are.
    """
    try:
        yield
    except LensdError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        log.debug("load.failed", what=what, exc_info=error)
        raise explain(what, error) from error


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """`explained`, without the warnings of libraries, which are advice on how to load."""
    with explained(what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def explained_names(config: Any, what: str) -> Iterator[None]:
    """Within it a name that a table of Transformers lacks becomes a ConfigError with its field."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        yield
    except KeyError as error:
        name = error.args[0] if error.args else None
        field = field_of(config.to_dict(), name) if isinstance(name, str) else None
        if field is None:
            raise
        close = difflib.get_close_matches(str(name), ROPE_INIT_FUNCTIONS if "rope" in field else ACT2FN, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"{what}: {field} = {shortened(repr(name), 60)} in its config.json is not known: {hint}correct"
            " it, or use a version of transformers that knows it"
        ) from error


def field_of(settings: Mapping[str, Any], value: str) -> str | None:
    """The first setting, at any depth, that is `value`."""
    for name, has in settings.items():
        if isinstance(has, str) and has == value:
            return str(name)
        if isinstance(has, Mapping) and (inner := field_of(has, value)):
            return f"{name}.{inner}"
    return None


def explain(what: str, error: BaseException) -> ConfigError | MachineError:
    """The cause of `error` and its remedy, about `what`, such as "model gpt2".

    The whole chain of causes is looked through, for libraries hide a refused token behind a missing file.
    """
    chain = causes(error)
    for link in chain:
        if isinstance(link, ConfigError | MachineError):
            return link
    for rule in RULES:
        for link in chain:
            if (found := rule(what, link)) is not None:
                return found
    return ConfigError(
        f"{what}: can't be loaded: {sense(error)}: see to its configuration and weights, or use another"
        " (LENSD_LOG__LEVEL=debug shows where it was)"
    )


def causes(error: BaseException) -> list[BaseException]:
    """The exception and those it comes from, the outermost first."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain and len(chain) < 16:
        chain.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return chain


def of_the_machine(what: str, error: BaseException) -> MachineError | None:
    """Memory, disk and descriptors."""
    text = str(error)
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names(error) or OUT_OF_MEMORY.search(text):
        return MachineError(
            f"{what}: not enough memory to load it: free some, or use a smaller one ({sense(error)})"
        )
    if DISK_FULL.search(text) or number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return MachineError(
            f"{what}: no room on the disk for its files ({sense(error)}): free some,"
            " or set HF_HOME to another disk"
        )
    if number(error) in MACHINE_ERRNOS:
        return MachineError(f"{what}: the machine can't read or store its files: {sense(error)}")
    return None


def of_the_repository(what: str, error: BaseException) -> ConfigError | None:
    """The hub's answer about a repository, by the class of its error."""
    known = names(error)
    if "GatedRepoError" in known:
        return ConfigError(
            f"{what}: gated on the hub{repository(error)}: accept its licence there with your account, then"
            " log in (hf auth login) or set HF_TOKEN to a token of that account"
        )
    if "OfflineModeIsEnabled" in known or "outgoing traffic has been disabled" in str(error):
        return ConfigError(
            f"{what}: not in the local cache, and HF_HUB_OFFLINE forbids to fetch it: unset it,"
            " or give a local folder"
        )
    if "DisabledRepoError" in known:
        return ConfigError(f"{what}: disabled on the hub: use another")
    if "RevisionNotFoundError" in known:
        return ConfigError(f"{what}: the hub has no such revision: check it")
    if "RepositoryNotFoundError" in known:
        if re.search(r"invalid (?:user ?name|credential|user token|token)", str(error), re.IGNORECASE):
            return refused_token(what)
        return ConfigError(
            f"{what}: no such repository on the hub, or a private one: check the name; for a private one set"
            " HF_TOKEN (or hf auth login); or give a local folder"
        )
    if "EntryNotFoundError" in known and "LocalEntryNotFoundError" not in known and status_of(error) is None:
        return ConfigError(f"{what}: the hub has no such file ({sense(error)}): check the name")
    if "HFValidationError" in known:
        return ConfigError(
            f"{what}: no such folder, and no name that a hub has: write OWNER/NAME, or give a local folder"
        )
    return None


def of_the_status(what: str, error: BaseException) -> ConfigError | MachineError | None:
    """The meaning of an answer's status."""
    status = status_of(error)
    if status is None or status < 400:
        return None
    if status in PASSING_STATUS or status >= 500:
        meaning = "too many requests" if status == 429 else "trouble of its own"
        return MachineError(f"{what}: the hub answers {status}, {meaning}: try again later")
    if status == 401:
        return refused_token(what)
    if status == 403:
        return ConfigError(
            f"{what}: the hub denies access (403):"
            " give the token in HF_TOKEN the right to read this repository"
        )
    if status == 404:
        return ConfigError(f"{what}: the hub has no such file (404){repository(error)}: check the name")
    return ConfigError(f"{what}: the hub refuses the request ({status}): check the name and HF_ENDPOINT")


def of_the_way(what: str, error: BaseException) -> ConfigError | MachineError | None:
    """No answer, or one that broke off."""
    known = names(error)
    if known & BAD_ADDRESS_NAMES:
        return ConfigError(f"{what}: the hub's address is no URL ({sense(error)}): check HF_ENDPOINT")
    if known & PASSING_NAMES or TRANSIENT_WORDS.search(str(error)):
        return MachineError(
            f"{what}: the hub can't be reached ({sense(error)}): check the network, or give a local folder"
        )
    return None


def refused_token(what: str) -> ConfigError:
    return ConfigError(
        f"{what}: the hub refuses the token (401): renew the one in HF_TOKEN (or hf auth login), or unset it"
    )


def of_the_files(what: str, error: BaseException) -> ConfigError | None:
    """Files that lie here and can't be used."""
    if names(error) & {"SafetensorError", "BadZipFile"} or DAMAGED.search(str(error)):
        return ConfigError(
            f"{what}: its weights are damaged or cut off ({sense(error)}): fetch them again,"
            " or save them again"
        )
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
        return ConfigError(
            f"{what}: a JSON file of it is damaged ({sense(error)}): fetch it again, or correct it"
        )
    if isinstance(error, PermissionError):
        return ConfigError(
            f"{what}: {error.filename or 'a file of it'} can't be read by this user: see to its mode"
        )
    if (
        isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
        and error.filename is not None
    ):
        return ConfigError(f"{what}: {os.fspath(error.filename)!r}: {error.strerror}: complete the folder")
    return None


def of_the_kind(what: str, error: BaseException) -> ConfigError | None:
    """Models of a kind that can't be built here, and packages that are not installed."""
    text = str(error)
    if isinstance(error, ImportError):
        return ConfigError(f"{what}: needs a package that is not installed: {sense(error)}")
    if "does not recognize this architecture" in text:
        kind = re.search(r"model type `([^`]{1,60})`", text)
        return ConfigError(
            f"{what}: can't be loaded: Transformers knows no model_type {kind[1] if kind else 'of its kind'}:"
            " upgrade transformers, or use another model (lensd runs no code out of a repository)"
        )
    if "trust_remote_code" in text or "custom code" in text:
        return ConfigError(
            f"{what}: can't be loaded: it needs code out of its repository, which lensd does not run: use a"
            " version whose model_type Transformers knows"
        )
    if "instantiate the backend tokenizer" in text:
        return ConfigError(
            f"{what}: the folder holds no tokenizer (tokenizer.json): add the one that belongs to the model"
            " (save_pretrained of the tokenizer writes it)"
        )
    if "Unrecognized configuration class" in text:
        kind = re.search(r"configuration_\w+\.(\w+)Config'", text)
        return ConfigError(
            f"{what}: can't be loaded: {kind[1] if kind else 'its kind'} is no causal language model: use one"
            " that Transformers loads by AutoModelForCausalLM"
        )
    return None


RULES = (of_the_machine, of_the_repository, of_the_status, of_the_way, of_the_files, of_the_kind)


def repository(error: BaseException) -> str:
    """The address in an error of the hub, without a file's path; the hub's own words are paragraphs."""
    found = LOCATION.search(str(error))
    if found is None:
        return ""
    page = found[0].rstrip(".,;:)").replace("/api/models/", "/")
    page = re.sub(r"/(?:resolve|revision|tree|raw|blob)/.*", "", page)
    return f" ({page if len(page) < 200 else 'see its page'})"


def names(error: BaseException) -> set[str]:
    """The class names of an exception, its bases' included."""
    return {kind.__name__ for kind in type(error).__mro__}


def number(error: BaseException) -> int | None:
    return error.errno if isinstance(error, OSError) else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an exception tells of."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def sense(error: BaseException) -> str:
    """The sense of a library's message on one short line: its first line that is not a heading."""
    text = COLOUR.sub("", str(error))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    said = ""
    for line in lines:
        said = f"{said} {line}".strip()
        if not said.endswith(":"):
            break
    said = said.rstrip(":")
    kind = type(error).__name__
    if not said:
        return kind
    if isinstance(error, LookupError | TypeError | AttributeError | ArithmeticError | AssertionError):
        said = f"{kind}: {said}"  # a bare name, or words about the library's own code
    return shortened(said)


def shortened(text: str, most: int = SENSE_CHARACTERS) -> str:
    """Not longer than `most` characters, cut between words."""
    if len(text) <= most:
        return text
    cut = text[: most - 4]
    return f"{cut.rpartition(' ')[0].rstrip(',;:') if ' ' in cut else cut} ..."


def quiet_libraries() -> None:
    """Keep to errors: what a user needs to know of a failed download is said in one line at its end."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    for name in ("transformer_lens", "sae_lens", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
