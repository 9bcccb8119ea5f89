"""The memory that a dictionary of many features takes beside its weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from daemon.model import encoding
from daemon.model.encoding import encoder_of
from daemon.model.extraction import ReadPositions
from daemon.model.positions import Given, encode_readings
from daemon.model.sae import LoadedSae
from daemon.model_info import SaeInfo

D_IN, D_SAE, ROWS = 128, 1 << 16, 4096
PIECE = 1 << 26  # bytes of dense activations at a time
STATUS = Path("/proc/self/status")

pytestmark = pytest.mark.skipif(not STATUS.exists(), reason="reads the peak of memory as Linux tells it")


def status(name: str) -> int:
    match = re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())
    assert match is not None
    return int(match[1]) << 10


@contextmanager
def peak() -> Iterator[list[int]]:
    """Holds, at its end, by how many bytes this process grew at most within."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins at what there is now
    before, found = status("VmRSS"), []
    yield found
    found.append(status("VmHWM") - before)


@pytest.fixture
def entry() -> LoadedSae:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=True))
    generator = torch.Generator().manual_seed(0)
    sae.W_enc.data = torch.randn(D_IN, D_SAE, generator=generator) / D_IN**0.5
    sae.W_dec.data = sae.W_enc.data.T.clone()
    sae.b_dec.data = torch.randn(D_IN, generator=generator) / 100
    sae.threshold.data.fill_(3.5)
    hook = "blocks.0.hook_resid_post"
    info = SaeInfo(hook, hook, 0, D_IN, D_SAE, D_IN, "jumprelu", "wide", "0")
    return LoadedSae(info, sae.requires_grad_(False), center_residual=False)


def test_a_wide_dictionary_takes_little_beside_its_weights(entry, monkeypatch):
    """All rows at once would take `at_once`. What the heap keeps of a piece before is in the bounds too."""
    monkeypatch.setitem(encoding.PIECE_NUMBERS, "cpu", PIECE // 4)
    weights, at_once = entry.sae.W_enc.nbytes, 1.7 * ROWS * D_SAE * 4
    with torch.inference_mode():
        with peak() as building:
            encoder = encoder_of(entry)
        assert building[0] < 1.2 * weights + 2 * PIECE
        x = torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(1))
        with peak() as encoded:
            acts = encoder.encode(x)
        assert 0 < float(acts.counts.float().mean()) < 500
        assert encoded[0] < 8 * PIECE < 0.3 * at_once
        rows = np.arange(ROWS)
        readings = ReadPositions(rows, rows, np.arange(0, ROWS + 1, 4), rows % 4, rows)
        with peak() as pooled:
            (layer,), _ = encode_readings([Given.of(entry, encoder, x, x)], readings, "mean")
        assert len(layer.acts.counts) == ROWS // 4
        assert pooled[0] < 8 * PIECE
