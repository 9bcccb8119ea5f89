"""`/metrics` beside prometheus_client's own server, asked in every way that clients ask."""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Iterator

import aiohttp
import pytest
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as prometheus_text

from daemon.observe.health import Health
from daemon.observe.http import serve_http
from daemon.observe.metrics import Metrics
from tests.observe.test_http import FakeDevice

OF_PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,"
    "text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
ACCEPTED = [
    None,
    "*/*",
    "text/html",
    "text/plain",
    "text/plain;version=0.0.4",
    "text/plain; version=1.0.0; escaping=underscores",
    "application/openmetrics-text",
    "application/openmetrics-text; version=1.0.0",
    "application/openmetrics-text; version=0.0.1",
    OF_PROMETHEUS,
]
ENCODINGS = [None, "gzip", "deflate, gzip;q=0.5", "identity", "br"]


@pytest.fixture
def registry() -> CollectorRegistry:
    """Every kind of metric, with some value."""
    metrics = Metrics(CollectorRegistry())
    metrics.files_total.labels("committed").inc(3)
    metrics.feature_l0.labels("7", "l7").observe([3, 70.5, 2000])
    metrics.file_latency_seconds.observe([0.5])
    return metrics.registry


@pytest.fixture
def theirs(registry) -> Iterator[str]:
    server, thread = start_http_server(0, "127.0.0.1", registry)
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


async def ask(url: str, accept: str | None, encoding: str | None) -> tuple[str, str | None, bytes]:
    """The content type, the encoding, and the content without it and without what moves by itself."""
    headers = {"Accept": accept, "Accept-Encoding": encoding}
    given = {name: value for name, value in headers.items() if value is not None}
    missing = [name for name in headers if name not in given]
    async with (
        aiohttp.ClientSession(auto_decompress=False, skip_auto_headers=missing) as session,
        session.get(url, headers=given) as response,
    ):
        assert response.status == 200
        said = response.headers.get("Content-Encoding")
        body = await response.read()
        lines = (gzip.decompress(body) if said == "gzip" else body).splitlines(keepends=True)
        still = b"".join(line for line in lines if not line.startswith(b"process_"))
        return response.headers["Content-Type"], said, still


@pytest.fixture
def health() -> Health:
    return Health(FakeDevice(), stall_seconds=60.0)


@pytest.mark.parametrize(
    "query",
    [
        "",
        "?name[]=lensd_files_total",
        "?name[]=lensd_batch_tokens_sum&name[]=lensd_feature_l0_created&name[]=x",
    ],
)
async def test_it_negotiates_as_prometheus_client_does(registry, theirs, health, query):
    async with serve_http("127.0.0.1:0", registry, health) as ours:
        for accept in ACCEPTED:
            for encoding in ENCODINGS:
                answer = await ask(f"{ours}/metrics{query}", accept, encoding)
                assert answer == await ask(f"{theirs}/metrics{query}", accept, encoding), (accept, encoding)


async def test_a_request_without_sense_gets_plain_text(registry, health):
    async with serve_http("127.0.0.1:0", registry, health) as ours:
        for accept in ("text/plain;version=x", "application/openmetrics-text;version=one", ";;,,="):
            content_type, _, body = await ask(f"{ours}/metrics", accept, None)
            assert content_type == "text/plain; version=0.0.4; charset=utf-8"
            assert b"lensd_files_total" in body


async def test_plain_text_says_when_a_histogram_with_a_label_began(registry, health):
    async with serve_http("127.0.0.1:0", registry, health) as ours:
        _, _, text = await ask(f"{ours}/metrics", "text/plain;version=0.0.4", None)
    families = {family.name: family for family in prometheus_text(text.decode())}
    (began,) = families["lensd_feature_l0_created"].samples
    assert began.labels == {"layer": "7", "sae": "l7"}


async def test_every_counter_and_histogram_says_when_it_began(registry, health):
    """As deploy/README.md has it; by both formats' own parsers."""
    async with serve_http("127.0.0.1:0", registry, health) as ours:
        _, _, text = await ask(f"{ours}/metrics", "text/plain;version=0.0.4", None)
        _, _, opened = await ask(f"{ours}/metrics", "application/openmetrics-text;version=1.0.0", None)
    names = {sample.name for family in prometheus_text(text.decode()) for sample in family.samples}
    assert opened.endswith(b"# EOF\n")
    families = [family for family in open_metrics(opened.decode()) if family.type in ("counter", "histogram")]
    assert {family.name for family in families if family.type == "histogram" and family.samples} >= {
        "lensd_stage_duration_seconds",
        "lensd_feature_l0",
        "lensd_batch_tokens",
    }
    for family in families:
        created = [sample for sample in family.samples if sample.name == f"{family.name}_created"]
        ends = "_count" if family.type == "histogram" else "_total"
        series = [sample.labels for sample in family.samples if sample.name == family.name + ends]
        assert [sample.labels for sample in created] == series, family.name
        assert not series or f"{family.name}_created" in names


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool (Debian: apt install prometheus)")
async def test_promtool_finds_nothing_to_complain_of(registry, health):
    async with serve_http("127.0.0.1:0", registry, health) as ours:
        _, _, text = await ask(f"{ours}/metrics", OF_PROMETHEUS.rpartition("text/plain")[2], None)
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
