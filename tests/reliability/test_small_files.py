"""Every way in which `make small-files` measures comes to its end, with each record once."""

from __future__ import annotations

import json

import pytest

from tests.reliability.daemons import Daemons
from tests.reliability.small_files import VARIANTS, Variant, drain
from tests.support import tiny


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_each_record_comes_out_once(daemons: Daemons, tmp_path, variant: Variant):
    lines = [json.dumps(record) for record in tiny.contrast_records(9)]
    assert drain(daemons, tmp_path, lines, variant).violations == []
