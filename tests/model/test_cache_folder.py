"""Where what is converted and measured is kept, for users of every kind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from daemon.errors import ConfigError
from daemon.model.smollm2 import default_cache_dir, make_cache_folder

NOBODY = 48_213  # a user id without an entry
HINT = "set LENSD_CACHE_DIR to a folder that this user may write"
PROGRAM = """
import os, sys
user = int(sys.argv[1])
sys.path.insert(0, sys.argv[2])
from daemon.model.smollm2 import default_cache_dir, smollm2_folder
from daemon.errors import ConfigError
os.setgroups([]), os.setgid(user), os.setuid(user)
try:
    print(smollm2_folder(default_cache_dir()))
except ConfigError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    ("env", "folder"),
    [
        ({"LENSD_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/lensd"),
        ({"HOME": "/c"}, "/c/.cache/lensd"),
        ({"XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/lensd"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/c"}, "/c/.cache/lensd"),  # to be ignored, says its standard
    ],
)
def test_the_cache_is_where_the_environment_says(monkeypatch, env, folder):
    for name in ("LENSD_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert default_cache_dir() == Path(folder)


@pytest.mark.parametrize(
    "env",
    [
        *({"LENSD_CACHE_DIR": "", "HOME": "/c"}, {"LENSD_CACHE_DIR": " ", "XDG_CACHE_HOME": "/b"}),
        *({"HOME": "/"}, {"HOME": ""}, {"HOME": "relative"}),
    ],
)
def test_what_is_no_place_for_a_cache_is_refused(monkeypatch, env):
    for name in ("LENSD_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=HINT):
        default_cache_dir()


def test_a_file_in_the_place_of_the_cache_is_refused(tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match=HINT):
        make_cache_folder(tmp_path / "cache" / "models")
    with pytest.raises(ConfigError, match=HINT):
        make_cache_folder(tmp_path / "cache")


def as_user(user: int, **env: str) -> str:
    """A process of that user prints the folder that it finds, or its error."""
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(user), root],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], **env},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def closed_home():
    folder = Path(tempfile.mkdtemp(prefix="lensd-"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_a_user_without_an_entry_or_with_a_home_of_others_is_told_what_to_set(closed_home):
    assert as_user(NOBODY) == f"refused: user {NOBODY} has no home for the cache of models: {HINT}"
    told = as_user(NOBODY, HOME=str(closed_home))  # a folder of root's, for root alone
    assert told.startswith("refused: ")
    assert told.endswith(HINT)
    closed_home.chmod(0o755)  # to be seen and not to be written
    told = as_user(NOBODY, HOME=str(closed_home))
    assert told.endswith(HINT)
