from __future__ import annotations

import io
import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from daemon.native.rmsnorm_rope_attention import routines
from daemon.tools import start
from daemon.tools.start import Measured, line, wait_for

RUN = """
import sys
from daemon.cli import main
code = main(sys.argv[1:])
loaders = ("sae_lens", "transformer_lens", "transformers", "scipy", "aiohttp")
print([name for name in loaders if name in sys.modules])
sys.exit(code)
"""


def test_a_line_has_the_median_and_the_range():
    measured = [Measured(seconds, cpu) for seconds, cpu in ((3.0, 4.0), (2.5, 5.0), (9.0, 6.0))]
    assert line("to ready", measured) == "to ready: 3.0 s (2.5 to 9.0), 5.0 s of CPU: median of 3"


def test_an_event_is_waited_for_and_what_ends_before_is_told():
    log = io.StringIO(
        "warning\n" + json.dumps({"event": "model.loading"}) + '\n{"event": "model.loaded"}\nrest\n'
    )
    wait_for(start.READY, log)
    assert log.read() == "rest\n"
    with pytest.raises(SystemExit, match="no such folder"):
        wait_for(start.READY, io.StringIO("lensd: no such folder\n"))


@pytest.mark.slow
@pytest.mark.skipif(routines() is None, reason="installed without a C compiler")
def test_a_second_start_imports_no_loader_and_gives_the_same_cells(tmp_path):
    from tests.support import tiny
    from tests.support.families import save_family

    model = save_family(tmp_path / "model", "llama")
    saes = tuple(
        tiny.save_sae(tmp_path / f"sae{layer}", f"blocks.{layer}.hook_resid_post", seed=layer)
        for layer in (0, 2)
    )
    toml = tmp_path / "lensd.toml"
    toml.write_text(tiny.Tiny(model, saes).toml() + "[batching]\nmax_batch_tokens = 512\n")
    found = []
    for number in range(2):
        inbox, outbox = tmp_path / f"in{number}", tmp_path / f"out{number}"
        inbox.mkdir()
        tiny.write_json(inbox / "a.json", tiny.contrast_records(40))
        options = ["--once", "--config", str(toml), "--inbox", str(inbox), "--outbox", str(outbox)]
        ran = subprocess.run(
            [sys.executable, "-c", RUN, "run", *options],
            env={**start.os.environ, "LENSD_CACHE_DIR": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert ran.returncode == 0, ran.stderr
        (unit,) = [path for path in outbox.iterdir() if path.is_dir() and not path.name.startswith(".")]
        found.append((ran.stdout.splitlines()[-1], unit))
    (imported, first), (lean, second) = found
    assert "sae_lens" in imported
    assert lean == "[]"
    assert first.name == second.name
    for name in ("metrics", "features", "texts"):
        assert pq.read_table(first / f"{name}.parquet").equals(pq.read_table(second / f"{name}.parquet"))
