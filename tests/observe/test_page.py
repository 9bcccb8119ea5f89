"""The status page as its reader has it: a real daemon, a real Chromium.

With LENSD_SCREENSHOTS=DIR the last test feeds a daemon with the bundled model for a minute and leaves
pictures of the page there.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.observe.browser import CHROMIUM, Page, chromium, tab
from tests.reliability.daemons import Daemons, Job
from tests.reliability.handling import end, events, wait_until
from tests.support import tiny

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]

SCREENSHOTS = os.environ.get("LENSD_SCREENSHOTS")
PICTURE_BYTES = 150_000
BACKLOG = 8  # files dropped and not published, at most
FEEDING_SECONDS = 58.0  # before the pictures are taken, where they are kept

# Every element with text of its own that is less than AA away from what is behind it.
TOO_FAINT = """
(() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const luminance = (color) => {
    const [r, g, b] = color.slice(0, 3).map((part) => part / 255)
      .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const texts = Array.from(document.body.querySelectorAll("*")).filter((node) =>
    Array.from(node.childNodes).some((child) => child.nodeType === 3 && child.data.trim()));
  return texts.flatMap((node) => {
    const [one, other] = [parse(getComputedStyle(node).color), behind(node)].map(luminance);
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    return ratio < 4.5 ? [`${node.innerText}: ${ratio.toFixed(2)}`] : [];
  });
})()
"""


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def page(devtools: str) -> AsyncIterator[Page]:
    async with tab(devtools) as page:
        await page.show()
        yield page


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Place:
    """A daemon at an address that it has again after each start."""

    daemons: Daemons
    folder: Path
    flags: dict[str, object] = field(default_factory=dict)
    pid: int = 0

    def __post_init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        address = self.url.removeprefix("http://")
        self.job = Job(
            self.folder / "inbox",
            self.folder / "outbox",
            self.folder / "log",
            once=False,
            flags={"http.enabled": True, "http.address": address},
        )
        self.job.inbox.mkdir()

    def start(self, hook: str | None = None, hook_args: dict[str, object] | None = None) -> Place:
        served = len(events(self.job.log, "http.listening"))
        flags = {**(self.job.flags or {}), **self.flags}
        self.pid = self.daemons.start(replace(self.job, flags=flags, hook=hook, hook_args=hook_args))
        wait_until(lambda: len(events(self.job.log, "http.listening")) > served, "the address", self.pid)
        return self

    def drop(self, name: str, content: object) -> None:
        """A finished file; what is no text is made JSON."""
        staged = self.folder / "staged"
        staged.write_text(content if isinstance(content, str) else json.dumps(content))
        staged.rename(self.job.inbox / name)

    def manifests(self) -> list[dict[str, object]]:
        return [json.loads(path.read_bytes()) for path in self.job.outbox.glob("*/manifest.json")]

    def close(self) -> None:
        if self.pid:
            self.daemons.kill(self.pid)


class BundledPlace(Place):
    """The command itself, with the bundled model."""

    def start(self, hook: str | None = None, hook_args: dict[str, object] | None = None) -> Place:
        told = {
            "INBOX__PATH": self.job.inbox,
            "OUTBOX__PATH": self.job.outbox,
            "INBOX__SETTLE_SECONDS": 0,
            "HTTP__ADDRESS": self.url.removeprefix("http://"),
            "LOG__FORMAT": "json",
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LENSD_")}
        environment |= {f"LENSD_{key}": str(value) for key, value in told.items()}
        with self.job.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "daemon.cli", "run"], stderr=log, env=environment
            )
        wait_until(lambda: events(self.job.log, "model.loaded"), "the model", self.process.pid)
        return self

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def place(daemons: Daemons, tmp_path: Path) -> Iterator[Place]:
    place = Place(daemons, tmp_path)
    yield place
    place.close()


def shows(text: str) -> str:
    """A condition: the page shows this text."""
    return f"document.body.innerText.includes({json.dumps(text)})"


def figure(name: str) -> str:
    """An expression: the value beside a name."""
    return (
        "Array.from(document.querySelectorAll('#now dt'))"
        f".find((dt) => dt.textContent === {json.dumps(name)}).nextElementSibling.textContent"
    )


async def test_it_shows_what_the_outbox_holds_without_a_reload(place, page):
    place.start()
    await page.goto(place.url)
    await page.until(shows("The inbox is empty."))
    assert await page.value(figure("Published")) == "0 samples"
    await page.value("window.kept = true")
    for number in range(3):
        records = tiny.contrast_records(20 + number)
        place.drop(f"study-{number}.json", [*records, {"id": "no text"}])
    place.drop("broken.json", "[{")
    await page.until("document.querySelectorAll('#files tbody tr').length === 4")
    await page.until(f"{figure('Published')} === '63 samples'")
    manifests = place.manifests()
    assert sum(manifest["rows"] for manifest in manifests) == 63
    assert await page.value(figure("Set aside")) == f"{sum(m['rejects'] for m in manifests)} rejects"
    shown = await page.value(
        "Array.from(document.querySelectorAll('#files tbody tr')).map((row) =>"
        " Array.from(row.cells).slice(0, 4).map((cell) => cell.innerText))"
    )
    expected = {
        (manifest["input"]["name"], "committed", str(manifest["rows"]), str(manifest["rejects"]))
        for manifest in manifests
    }
    assert {tuple(row) for row in shown if row[1] == "committed"} == expected
    (failed,) = (row for row in shown if row[1] == "failed")
    reason = json.loads((place.job.inbox / "failed" / "broken.json.reason.json").read_bytes())
    assert failed[0].split("\n\n") == ["broken.json", reason["message"]]
    assert reason["message"] in await page.text("#alerts .warning")
    assert await page.value("window.kept")
    assert page.complaints == []


async def test_it_links_to_the_findings_of_each_file(place, page):
    place.flags = {"report.each_file": True}
    place.start()
    await page.goto(place.url)
    place.drop("study.json", tiny.contrast_records(20))
    await page.until("document.querySelector('#files a.report') !== null")
    (manifest,) = place.manifests()
    assert {file["name"] for file in manifest["files"]} >= {"metrics.parquet", "report.html"}
    link = await page.value("document.querySelector('#files a.report').href")
    await page.goto(link)
    assert "20 pairs" in await page.text("body")
    assert page.complaints == []
    assert {url for url in page.requests if not url.startswith(f"{place.url}/")} == set()


async def test_only_the_daemon_is_asked_for_anything(place, page):
    place.start()
    await page.goto(place.url)
    asked = len(page.requests)
    while len(page.requests) < asked + 2:
        await asyncio.sleep(0.05)
    assert {url for url in page.requests if not url.startswith(f"{place.url}/")} == set()
    assert page.complaints == []
    with urllib.request.urlopen(place.url, timeout=60) as response:
        policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy


async def test_it_survives_the_daemons_restart(place, page):
    place.start()
    await page.goto(place.url)
    await page.until(shows("The inbox is empty."))
    await page.value("window.kept = true")
    first = await page.value("document.documentElement.dataset.instance")
    assert not await page.value(shows("does not answer"))
    place.daemons.kill(place.pid)
    await page.until(shows("lensd does not answer. What is shown is from "))
    assert await page.value("document.title") == "no answer · lensd"
    place.start()
    place.drop("later.json", tiny.contrast_records(7))
    await page.until(f"document.documentElement.dataset.instance !== {json.dumps(first)}")
    await page.until(f"{figure('Published')} === '7 samples'")
    assert not await page.value(shows("does not answer"))
    assert "lensd" in await page.value("document.title")
    assert await page.value("window.kept")


async def test_a_daemon_that_hangs_is_said_not_to_answer(place, page):
    place.start()
    await page.goto(place.url)
    await page.until(shows("The inbox is empty."))
    os.kill(place.pid, signal.SIGSTOP)
    await page.until(shows("lensd does not answer."))
    os.kill(place.pid, signal.SIGCONT)
    await page.until(f"!{shows('does not answer')}")


async def test_a_stuck_device_is_shown_and_so_is_its_recovery(place, page, tmp_path):
    place.flags["http.stall_seconds"] = 0.5
    args = {"reached": str(tmp_path / "reached"), "go": str(tmp_path / "go")}
    place.start("tests.reliability.hooks:gated", args)
    await page.goto(place.url)
    place.drop("study.json", tiny.contrast_records(5))
    await page.until("document.querySelector('#head.is-stalled')")
    assert "device busy on one call" in await page.text("#alerts .critical")
    assert (await page.value("document.title")).startswith("(1) stalled")
    (tmp_path / "go").touch()
    await page.until("document.querySelector('#head.is-idle')")
    assert "Nothing needs a look." in await page.text("#alerts")


async def test_a_pause_says_why(place, page):
    place.flags["outbox.min_free_bytes"] = 1 << 60
    place.start()
    await page.goto(place.url)
    await page.until("document.querySelector('#head.is-paused')")
    assert "outbox.min_free_bytes" in await page.text("#alerts .critical")
    place.drop("study.json", tiny.contrast_records(5))
    await asyncio.to_thread(end, place.daemons, place.pid)
    place.pid = 0


async def test_a_draining_daemon_says_so(place, page, tmp_path):
    args = {"reached": str(tmp_path / "reached"), "go": str(tmp_path / "go")}
    place.start("tests.reliability.hooks:gated", args)
    place.drop("study.json", tiny.contrast_records(5))
    wait_until((tmp_path / "reached").exists, "the first batch", place.pid)
    await page.goto(place.url)
    await page.until(shows("1 file under way"))
    os.kill(place.pid, signal.SIGTERM)
    await page.until("document.querySelector('#head.is-draining')")
    (tmp_path / "go").touch()
    assert await asyncio.to_thread(place.daemons.wait, place.pid) == 0
    place.pid = 0


HOSTILE = (
    "<script>window.harmed = 1<%2Fscript>.json",
    "<img src=x onerror='window.harmed = 1'>.json",
    '"><svg onload=window.harmed=1>.json',
    "caf\udce9\n\x1b[31m\u202e.json",
)


async def test_hostile_names_do_no_harm(place, page):
    place.start()
    await page.goto(place.url)
    for name in HOSTILE:
        place.drop(name, "[{")
    await page.until(f"document.querySelectorAll('#files tbody tr').length === {len(HOSTILE)}")
    names = await page.value("Array.from(document.querySelectorAll('#files bdi')).map((n) => n.textContent)")
    assert set(names) == {*HOSTILE[:3], "caf\\xe9\\n\\x1b[31m\\u202e.json"}
    assert await page.value("window.harmed === undefined && document.querySelectorAll('img').length === 0")
    assert page.complaints == []
    assert all(url.startswith(f"{place.url}/") for url in page.requests)


async def test_a_phone_shows_all_of_it_by_day_and_by_night(place, page):
    place.start()
    place.drop(
        "study-with-a-name-that-is-longer-than-a-phone-is-wide-0123456789.json", tiny.contrast_records(5)
    )
    place.drop("broken.json", "[{")
    await page.goto(place.url)
    await page.until("document.querySelectorAll('#files tbody tr').length === 2")
    for dark in (False, True):
        await page.show(360, 740, dark=dark)
        assert await page.value("document.documentElement.scrollWidth") == 360
        assert await page.value(TOO_FAINT) == []
    assert await page.value("matchMedia('(prefers-color-scheme: dark)').matches")


async def test_it_has_the_landmarks_and_names_that_assistive_tools_need(place, page):
    place.start()
    place.drop("study.json", tiny.contrast_records(5))
    await page.goto(place.url)
    await page.until("document.querySelectorAll('#files tbody tr').length === 1")
    await page.tell("Accessibility.enable")
    nodes = (await page.tell("Accessibility.getFullAXTree"))["nodes"]
    seen = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and "role" in node
    ]
    roles = [role for role, _ in seen]
    assert [roles.count(role) for role in ("banner", "main", "contentinfo", "navigation")] == [1, 1, 1, 1]
    assert {"Alerts", "Now", "Last files", "What is running"} <= {
        name for role, name in seen if role == "region"
    }
    assert {"File", "Outcome", "Samples"} <= {name for role, name in seen if role == "columnheader"}
    assert ("rowheader", "study.json") in seen
    drawings = sorted(name for role, name in seen if role in ("image", "img"))
    assert len(drawings) == 5
    assert drawings[1].startswith("Samples per second over the last minute: now ")
    assert drawings[2].startswith("Shares of the stages: ")


async def feed(place: Place, page: Page, seconds: float) -> None:
    """A working day in a minute: files of many sizes, a few records that can't be used."""
    loop = asyncio.get_running_loop()
    size = 12 if seconds else 10
    until, number, dropped = loop.time() + seconds, 0, 0
    while number < 12 or loop.time() < until:
        number += 1
        if dropped - len(place.manifests()) < BACKLOG:
            dropped += 1
            records = tiny.contrast_records(size + number * 97 % (2 * size))
            for record in records:
                record["id"], record["prompt"] = f"{number}-{record['id']}", f"{record['prompt']} {number}"
            if number % 5 == 0:
                del records[3]["fact"]
            place.drop(f"truthful-{number:03}.json", records)
        await asyncio.sleep(0.25 if seconds else 0.0)
    await page.until("document.querySelector('#stages .bar')")


async def keep(page: Page, path: Path) -> None:
    """A picture of the page as it is, in few colours."""
    picture = await page.screenshot(path)
    image = pytest.importorskip("PIL.Image")
    with image.open(picture) as shot:
        assert len(shot.convert("RGB").resize((64, 64)).getcolors(4096)) > 8, "nothing is to be seen"
        small = shot.convert("RGB").quantize(128, image.Quantize.FASTOCTREE, dither=image.Dither.NONE)
    small.save(picture, optimize=True)
    assert picture.stat().st_size < PICTURE_BYTES


@pytest.mark.timeout(300)
async def test_its_pictures(daemons, page, tmp_path):
    folder = Path(SCREENSHOTS).absolute() if SCREENSHOTS else tmp_path / "pictures"
    with tempfile.TemporaryDirectory(prefix="lensd-") as place_folder:  # a short path, which the page shows
        place = (BundledPlace if SCREENSHOTS else Place)(daemons, Path(place_folder))
        try:
            await take_pictures(place.start(), page, folder)
        finally:
            place.close()
    assert len(list(folder.glob("*.png"))) >= 5
    assert page.complaints == []


async def take_pictures(place: Place, page: Page, folder: Path) -> None:
    await page.show(1100, 900)
    await page.goto(place.url)
    await page.until(shows("The inbox is empty."))
    await feed(place, page, FEEDING_SECONDS if SCREENSHOTS else 0.0)
    await keep(page, folder / "busy.png")
    await page.show(1100, 900, dark=True)
    await keep(page, folder / "dark.png")
    await page.show(360, 740)
    await keep(page, folder / "phone.png")
    await page.show(1100, 900)
    await page.until("document.querySelector('#head.is-idle')")
    await page.until("document.querySelector('#chart-samples-per-second b').textContent === '0'")
    await keep(page, folder / "idle.png")
    place.drop("export-0412.json", '[{"prompt": "cut o')
    place.drop("notes.json", [{"title": "no such field"}])
    place.drop("empty.json", "")
    await page.until(shows("3 files failed"))
    await keep(page, folder / "failures.png")
