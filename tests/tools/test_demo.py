from __future__ import annotations

import pytest

from daemon.config import load_config
from daemon.errors import MachineError
from daemon.tools import demo


def test_a_demo_that_is_stopped_before_it_began_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "serve", lambda config, **options: None)
    config = load_config(env={}, flags={"inbox.path": tmp_path / "inbox", "outbox.path": tmp_path / "outbox"})
    with pytest.raises(MachineError, match="told to stop before the samples were read"):
        demo.demo(config)
