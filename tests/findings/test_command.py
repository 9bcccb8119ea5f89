"""Where `lensd report` writes its page and table, what it leaves alone, and what a signal leaves."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from daemon.cli import main
from daemon.findings import command
from daemon.findings.study import open_study
from tests.support.outboxes import make

PAIRS = 60


@pytest.fixture
def made(tmp_path):
    made = make(tmp_path / "outbox" / f"a-{'1' * 12}", PAIRS, seed=4)
    made.write()
    return made


@pytest.fixture
def plain_page(monkeypatch):
    """Pages without figures, which take the most time."""
    monkeypatch.setattr(command, "page", lambda report: f"<title>{command.MARK.decode()}")


def lensd(*args):
    return main(["report", *map(str, args)])


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("page.txt", "the page is HTML"),
        ("metrics.parquet", "the page is HTML"),
        ("none/page.html", "no such folder"),
        ("folder.html", "is a folder"),
        ("mine.html", "no report of lensd's"),
        ("linked.html", "no report of lensd's"),
        ("pipe.html", "is a pipe or a device"),
        ("/proc/page.html", "can't write into /proc (No such file or directory): name a file in a folder"),
    ],
)
def test_a_page_takes_no_other_file_s_place(made, tmp_path, capsys, output, said):
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "mine.html").write_text("<title>mine</title>")
    (tmp_path / "linked.html").symlink_to(tmp_path / "mine.html")
    os.mkfifo(tmp_path / "pipe.html")
    shutil.rmtree(made.path)  # the place is looked at first
    assert lensd(made.path, "-o", tmp_path / output) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert (tmp_path / "mine.html").read_text() == "<title>mine</title>"


def test_an_earlier_page_and_table_are_replaced(made, plain_page, tmp_path):
    page, data = tmp_path / "page.html", tmp_path / "features.parquet"
    assert lensd(made.path, "-o", page, "--data", data, "--features", 1) == 0
    page.write_text(page.read_text() + "<!-- of before -->")
    assert lensd(made.path, "-o", page, "--data", data, "--features", 1) == 0
    assert "of before" not in page.read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.parquet", "outbox", "page.html"]


def test_a_table_takes_no_other_file_s_place(made, tmp_path, capsys):
    assert lensd(made.path, "-o", tmp_path / "p.html", "--data", made.path / "metrics.parquet") == 2
    assert lensd(made.path, "-o", tmp_path / "p.html", "--data", tmp_path / "x.csv") == 2
    assert "no table of lensd report's" in capsys.readouterr().err
    assert pq.read_table(made.path / "metrics.parquet").num_rows == PAIRS


def test_a_page_is_written_where_a_link_leads(made, plain_page, tmp_path):
    link, target = tmp_path / "page.html", tmp_path / "target.html"
    link.symlink_to(target)
    for _ in range(2):
        assert lensd(made.path, "-o", link, "--features", 1) == 0
        assert link.is_symlink()
        assert command.MARK in target.read_bytes()


def test_a_table_that_fails_leaves_no_page(made, plain_page, monkeypatch, tmp_path, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full)
    page, data = tmp_path / "page.html", tmp_path / "f.parquet"
    assert lensd(made.path, "-o", page, "--data", data, "--features", 1) == 3
    assert "No space left on device: nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["outbox"]


@pytest.mark.parametrize("name", ["metrics.parquet", "features.parquet"])
def test_a_pipe_in_a_folder_is_told(made, tmp_path, capsys, name):
    (made.path / name).unlink()
    os.mkfifo(made.path / name)
    assert lensd(made.path, "-o", tmp_path / "page.html") == 2
    assert f"{name}: a folder, a pipe or a device: restore the file" in capsys.readouterr().err


WAITS_IN_THE_WRITING = """
import sys, time
from daemon import cli
from daemon.findings import command

def page(report):
    print("writing", flush=True)
    time.sleep(60)

command.page = page
sys.exit(cli.main(["report", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_nothing(made, tmp_path, number):
    place = tmp_path / "place"
    place.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", WAITS_IN_THE_WRITING, made.path, "-o", place / "p.html", "--features", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout.readline() == "writing\n"
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert not list(place.iterdir())
    if number == signal.SIGKILL:
        assert child.returncode == -number
    else:
        assert child.returncode == 128 + number
        assert said == "lensd: interrupted: nothing was written\n"


def test_a_page_may_lie_in_the_folder_itself(made, plain_page):
    assert lensd(made.path, "-o", made.path / "report.html", "--features", 1) == 0
    assert open_study([made.path.parent]).n_samples == PAIRS
