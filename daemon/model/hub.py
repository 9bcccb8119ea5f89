"""Resolves revisions of a hub's repositories to commits, and has files of these in the local cache.

A commit costs one request; what is cached of it costs none. A hub that does not answer is asked once in a
start, and what it said last is taken. Knows no model, and of dictionaries where SAELens has them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from daemon.errors import ConfigError, MachineError
from daemon.model.failures import explain, sense
from daemon.model.weightfiles import tensor_headers

MAIN = "main"
COMMIT = re.compile(r"[0-9a-f]{40}")
PIECE = 1 << 20  # bytes hashed at a time

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A commit of a repository, and the part of its files that the cache holds."""

    repo: str
    revision: str  # that was asked for
    commit: str
    files: frozenset[str] | None  # all of the commit's; None where the hub did not tell
    refusal: Exception | None = None  # why the hub can't be asked, and the cache is all there is

    @property
    def folder(self) -> Path:
        return storage_of(self.repo) / "snapshots" / self.commit

    def file(self, name: str) -> Path:
        """Have a file in the cache, fetched again where it is damaged there.

        Raises EntryNotFoundError where the commit has none such, and what stands in the way of it.
        """
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import EntryNotFoundError

        cached = try_to_load_from_cache(self.repo, name, revision=self.commit)
        if isinstance(cached, str):
            if self.refusal is not None or is_whole(Path(cached)):
                return Path(cached)
            log.warning("hub.damaged_file", repo=self.repo, file=name, message="fetched again")
        elif cached is not None:
            raise EntryNotFoundError(f"{self.repo} has no {name}")
        elif self.files is not None and name not in self.files:
            self._note_absent(name)
            raise EntryNotFoundError(f"{self.repo} has no {name}")
        elif self.refusal is not None:
            raise self.refusal
        return download(self.repo, name, self.commit, again=isinstance(cached, str))

    def _note_absent(self, name: str) -> None:
        """Have the cache know that the commit has no such file, as the hub's client does."""
        path = storage_of(self.repo) / ".no_exist" / self.commit / name
        with contextlib.suppress(OSError):  # a cache may be read only
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def remember(self) -> None:
        """Have the cache know which commit the revision was, for a start without the hub."""
        if self.refusal is not None or COMMIT.fullmatch(self.revision):
            return
        path = storage_of(self.repo) / "refs" / self.revision
        with contextlib.suppress(OSError):  # a cache may be read only
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_file() or path.read_text() != self.commit:
                path.with_name(f"{path.name}.{os.getpid()}").write_text(self.commit)
                path.with_name(f"{path.name}.{os.getpid()}").replace(path)


class Hub:
    """The hub as one start sees it: a revision stays the commit that it was at first."""

    def __init__(self) -> None:
        self._snapshots: dict[tuple[str, str], Snapshot] = {}
        self._away: Exception | None = None  # its first trouble

    def snapshot(self, repo: str, revision: str | None = None) -> Snapshot:
        """The commit that a branch, a tag or a commit stands for; of `main` without one.

        Raises what the hub says, or why it says nothing, where the cache does not know either.
        """
        key = repo, revision or MAIN
        if key not in self._snapshots:
            self._snapshots[key] = self._resolve(*key)
        return self._snapshots[key]

    def _resolve(self, repo: str, revision: str) -> Snapshot:
        from huggingface_hub import model_info
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
        from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

        refusal = self._away
        if refusal is None:
            try:
                info = model_info(
                    repo, revision=revision, expand=["sha", "siblings"], timeout=HF_HUB_ETAG_TIMEOUT
                )
                if COMMIT.fullmatch(str(info.sha)):
                    files = frozenset(entry.rfilename for entry in info.siblings or ())
                    return Snapshot(repo, revision, str(info.sha), files or None)
                refusal = no_hub(repo)
            except (RevisionNotFoundError, HFValidationError):
                raise
            except Exception as error:
                refusal = error
                if isinstance(error, ValueError | TypeError | KeyError):  # of another's answer
                    refusal = no_hub(repo)
                    refusal.__cause__ = error
                if isinstance(explain(repo, error), MachineError):
                    self._away = error
        commit = cached_commit(repo, revision)
        if commit is None:
            raise refusal
        if type(refusal).__name__ != "OfflineModeIsEnabled":  # which somebody wants
            log.warning(
                "hub.not_reached",
                repo=repo,
                revision=revision,
                commit=commit,
                reason=sense(refusal),
                message="read from the cache, as it was last",
            )
        return Snapshot(repo, revision, commit, None, refusal)


def no_hub(repo: str) -> ConfigError:
    from huggingface_hub import constants

    return ConfigError(
        f"repository {repo}: what answers at {constants.ENDPOINT} is no hub: check HF_ENDPOINT, or what"
        " stands between (a proxy, a page to log in)"
    )


def storage_of(repo: str) -> Path:
    """The folder of a repository in the cache."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name: str = repo_folder_name(repo_id=repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / name


def cached_commit(repo: str, revision: str) -> str | None:
    """The commit that a revision was when it was fetched last."""
    storage = storage_of(repo)
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (storage / "refs" / revision).read_text().strip()
        except OSError:
            return None
    return commit if (storage / "snapshots" / commit).is_dir() else None


def download(repo: str, name: str, commit: str, *, again: bool) -> Path:
    """Fetch a file into the cache. Raises what the hub's client raises."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):  # which the download notes in the cache
        # Where the hub is in trouble the download tries for a minute before it says so.
        get_hf_file_metadata(hf_hub_url(repo, name, revision=commit), timeout=HF_HUB_ETAG_TIMEOUT)
    try:
        return Path(hf_hub_download(repo, name, revision=commit, force_download=again))
    except OSError as error:
        if "Consistency check failed" not in str(error):
            raise
        log.warning("hub.incomplete_file", repo=repo, file=name, message="fetched again")
        return Path(hf_hub_download(repo, name, revision=commit, force_download=True))


def is_whole(path: Path) -> bool:
    """Whether a file of the cache is as it was fetched, as far as can be told in no time.

    One whose end is missing is hashed: the cache names files by their hash.
    """
    if ends_well(path):
        return True
    blob = path.resolve()
    as_git = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    digest = hashlib.sha256() if len(blob.name) == 64 else as_git
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest() == blob.name


def ends_well(path: Path) -> bool:
    """Whether a file has the end that its format promises."""
    suffix = path.suffix
    try:
        if suffix == ".safetensors":
            with path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(min(header, path.stat().st_size)))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            return path.stat().st_size == 8 + header + max(ends, default=0)
        if suffix in (".npz", ".pt", ".pth"):
            return zipfile.is_zipfile(path)
        if suffix == ".json":
            json.loads(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError):
        return False
    return True


def repository_of(release: str) -> str:
    """The repository of a release of SAELens's registry; others go by their own name."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    known = get_pretrained_saes_directory().get(release)
    return str(known.repo_id) if known is not None else release


@contextlib.contextmanager
def serving(snapshot: Snapshot) -> Iterator[list[str]]:
    """Within it SAELens reads a dictionary's files from one commit, by way of the cache; yields their names.

    It asks for the newest commit by itself, and for the shapes of tensors past the cache.
    """
    from sae_lens.loading import pretrained_sae_loaders as loaders

    def fetch(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        assert repo_id == snapshot.repo, (repo_id, snapshot.repo)
        name = f"{subfolder}/{filename}" if subfolder else filename
        path = snapshot.file(name)
        served.append(name)
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        headers = tensor_headers(Path(fetch(repo_id, filename)), f"{repo_id}/{filename}")
        return {name: list(header.shape) for name, header in headers.items()}

    served: list[str] = []
    theirs = loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes
    loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = fetch, shapes
    try:
        yield served
    finally:
        loaders.hf_hub_download, loaders.get_safetensors_tensor_shapes = theirs
