from __future__ import annotations

import io

import pytest
from rich.console import Console

from daemon.config import load_config
from daemon.errors import MachineError
from daemon.tools import demo
from tests.support.outboxes import make


def test_a_demo_that_is_stopped_before_it_began_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "serve", lambda config, **options: None)
    config = load_config(env={}, flags={"inbox.path": tmp_path / "inbox", "outbox.path": tmp_path / "outbox"})
    with pytest.raises(MachineError, match="told to stop before the samples were read"):
        demo.demo(config)


def test_the_demo_ends_with_the_page_of_its_findings(tmp_path):
    folder = make(tmp_path / f"demo-{'1' * 12}", 12).write()
    said = []
    for _ in range(2):
        out = io.StringIO()
        demo.show_report(Console(file=out, width=200), folder)
        said.append(out.getvalue().splitlines())
        assert said[-1][-1] == str(folder / "report.html")
        written = (folder / "report.html").stat().st_mtime_ns
    assert len(said[0]) == 2
    assert len(said[1]) == 1  # it is there already
    assert (folder / "report.html").stat().st_mtime_ns == written
