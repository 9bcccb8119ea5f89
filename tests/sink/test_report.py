"""The page of findings that a folder gets before it is published; `lensd report` is a stand-in here."""

from __future__ import annotations

import fnmatch
import hashlib
import sys
import threading
import time
from pathlib import Path

import pytest

from daemon.findings import whole_files
from daemon.sink.report import PARTIAL, REPORT, ReportFailed, ReportMaker

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[3]).write_text(sys.argv[1])"
FAILS = (
    "import pathlib, sys; pathlib.Path(sys.argv[3]).write_text('half');"
    " sys.stderr.write('first\\nno row in it\\n'); sys.exit(2)"
)
WAITS = "import time; time.sleep(60)"
SAYS_NOTHING = "import sys; sys.exit(3)"
WRITES_NOTHING = "pass"


def maker(script: str, limit_seconds: float = 60.0) -> ReportMaker:
    return ReportMaker((sys.executable, "-c", script), limit_seconds)


def test_the_page_is_counted_as_it_lies_in_the_folder(tmp_path: Path) -> None:
    totals = maker(WRITES).make(tmp_path)
    content = (tmp_path / REPORT).read_bytes()
    assert content.decode() == str(tmp_path)
    assert (totals.name, totals.rows, totals.bytes) == (REPORT, 0, len(content))
    assert totals.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("script", "message"),
    [(FAILS, "^no row in it$"), (SAYS_NOTHING, "^ended with exit code 3$"), (WRITES_NOTHING, REPORT)],
)
def test_a_page_that_fails_leaves_nothing_and_says_why(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(ReportFailed, match=message):
        maker(script).make(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    with pytest.raises(ReportFailed, match="not done after"):
        maker(WAITS, limit_seconds=0.2).make(tmp_path)


def test_a_report_that_is_killed_leaves_no_part_of_its_page(tmp_path: Path) -> None:
    killed = (
        "import os, pathlib, signal, sys; page = pathlib.Path(sys.argv[3]);"
        " page.with_name(f'.{page.name}.{os.getpid()}.partial').write_text('half');"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    (tmp_path / f".{REPORT}.1.partial").write_text("of before")
    (tmp_path / "metrics.parquet").write_text("PAR1")
    with pytest.raises(ReportFailed, match="exit code -9"):
        maker(killed).make(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.parquet"]


def test_the_name_of_a_part_is_that_of_the_command() -> None:
    assert fnmatch.fnmatch(whole_files.PARTIAL.format(name=REPORT, pid=12), PARTIAL)


def test_closing_ends_what_is_being_made_and_nothing_starts_any_more(tmp_path: Path) -> None:
    reports = maker(WAITS)
    failed: list[str] = []

    def make() -> None:
        with pytest.raises(ReportFailed) as caught:
            reports.make(tmp_path)
        failed.append(str(caught.value))

    thread = threading.Thread(target=make)
    thread.start()
    while not reports._running:
        time.sleep(0.01)
    reports.close()
    thread.join()
    assert failed == ["ended with exit code -9"]
    with pytest.raises(ReportFailed, match="stopping"):
        reports.make(tmp_path)
