"""Tests of models load them as at a first start, unless they are about stamps."""

from __future__ import annotations

import pytest

from daemon.model import stamps


@pytest.fixture(autouse=True)
def no_stamps(request, monkeypatch) -> None:
    if request.module.__name__.rpartition(".")[2] in ("test_stamps", *STAMPED):
        return
    monkeypatch.setattr(stamps.Stamps, "read", lambda self, subject: None)
    monkeypatch.setattr(stamps.Stamps, "write", lambda self, subject, content: None)


STAMPED = ("test_dictionary_stamps", "test_model_stamps")
