"""The page of a report as its reader has it: a file, a real Chromium, no server.

With LENSD_SCREENSHOTS=DIR pictures of the page are left there.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.findings import tables
from daemon.findings.page import page
from daemon.findings.results import Report
from tests.observe.browser import CHROMIUM, Page, chromium, tab
from tests.support import reports

pytestmark = [
    pytest.mark.slow,  # starts processes
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium"),
]

AXE = "axe-core@4.14.1"
SCREENSHOTS = os.environ.get("LENSD_SCREENSHOTS")
SIZES = [(width, dark) for width in (1400, 390) for dark in (False, True)]


@pytest.fixture(scope="module")
def devtools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture
async def tab_(devtools: str) -> AsyncIterator[Page]:
    async with tab(devtools) as page:
        await page.show(1400)
        yield page


@pytest.fixture(scope="module")
def report() -> Report:
    return reports.contrast(width=150, details=4, examples=2)


@pytest.fixture(scope="module")
def small() -> Report:
    return reports.contrast(width=12, details=4, examples=1, metrics=1)


@pytest.fixture(scope="module")
def files(report: Report, small: Report, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each kind of report."""
    folder = tmp_path_factory.mktemp("pages")
    kinds = {
        "small": small,
        "contrast": report,
        "groups": reports.groups(width=16),
        "prevalence": reports.prevalences(width=16),
    }
    for name, one in kinds.items():
        (folder / f"{name}.html").write_text(page(one), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in kinds}


@pytest.fixture(scope="module")
def axe(pytestconfig: pytest.Config) -> str:
    """The script of axe-core, from npm; kept in pytest's cache."""
    if (npm := shutil.which("npm")) is None:
        pytest.skip("needs npm, for axe-core")
    folder = pytestconfig.cache.mkdir("axe") if pytestconfig.cache else pytest.skip("needs pytest's cache")
    archive = folder / f"{AXE.replace('@', '-')}.tgz"
    if not archive.exists():
        done = subprocess.run(
            [npm, "pack", AXE, "--silent", "--pack-destination", str(folder)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode:
            pytest.skip(f"npm has no {AXE}: {done.stderr.strip()[-200:]}")
    with tarfile.open(fileobj=io.BytesIO(archive.read_bytes())) as files:
        script = files.extractfile("package/axe.min.js")
        assert script is not None
        return script.read().decode()


@pytest.mark.parametrize("kind", ["contrast", "groups", "prevalence"])
async def test_file_opens_by_itself(tab_: Page, files: dict[str, Path], kind: str) -> None:
    await tab_.goto(files[kind].as_uri())
    fetched = [one for one in tab_.requests if not one.startswith("data:")]
    assert fetched == [files[kind].as_uri()]
    assert tab_.complaints == []


@pytest.mark.parametrize("kind", ["contrast", "groups", "prevalence"])
@pytest.mark.parametrize("width", [1400, 390])
async def test_page_itself_does_not_scroll_sideways(
    tab_: Page, files: dict[str, Path], kind: str, width: int
) -> None:
    await tab_.show(width)
    await tab_.goto(files[kind].as_uri())
    await tab_.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert await tab_.value("document.documentElement.scrollWidth <= document.documentElement.clientWidth")


COLUMN = """Array.from(document.querySelectorAll("#ranked tbody tr:not([hidden])"), (row) => {
  const cell = row.cells[%d];
  return cell.dataset.v === undefined ? null : Number(cell.dataset.v);
})"""


async def test_columns_sort_both_ways_and_dashes_stay_at_the_end(tab_: Page, files: dict[str, Path]) -> None:
    await tab_.goto(files["contrast"].as_uri())
    headers: list[str] = await tab_.value(
        "Array.from(document.querySelectorAll('#ranked thead th'), (one) => one.innerText)"
    )
    for name in ("q", "Activation, raw", "Rank"):
        place = next(n for n, header in enumerate(headers) if header.split("\n")[0] == name)
        before: list[float | None] = await tab_.value(COLUMN % place)
        known = sorted(one for one in before if one is not None)
        button = f"document.querySelector('#ranked thead tr').cells[{place}].querySelector('button')"
        for order, expected in (("descending", known[::-1]), ("ascending", known)):
            await tab_.value(f"{button}.click()")
            after: list[float | None] = await tab_.value(COLUMN % place)
            assert after == expected + [None] * before.count(None)
            sorted_by = (
                "Array.from(document.querySelectorAll('#ranked th[aria-sort]'), (one) => one.ariaSort)"
            )
            assert await tab_.value(sorted_by) == [order]


async def test_search_leaves_rows_with_every_word(tab_: Page, files: dict[str, Path], report: Report) -> None:
    features = report.features
    assert features is not None
    holding = [
        (("l7", "l15", "l22")[features.sae[i]], int(features.feature[i]))
        for i in range(len(features.sae))
        if features.verdict[i] == "holds"
    ]
    expected = {f"{sae}\xa0·\xa0{feature}" for sae, feature in holding if sae == "l15"}
    await tab_.goto(files["contrast"].as_uri())
    await tab_.value("document.getElementById('search').focus()")
    await tab_.tell("Input.insertText", text="HOLDS l15")
    rows = (
        "Array.from(document.querySelectorAll('#ranked tbody tr:not([hidden]) th'), (one) => one.textContent)"
    )
    assert expected and set(await tab_.value(rows)) == expected
    assert (await tab_.text("#matches")).startswith(f"{len(expected)} of ")


async def test_tokens_are_coloured_as_the_report_says(
    tab_: Page, files: dict[str, Path], report: Report
) -> None:
    """Stronger tokens of a feature are never lighter, and silent ones have no colour."""
    await tab_.goto(files["contrast"].as_uri())
    for detail in report.details:
        expected = [
            [(token.text, token.activation) for token in text.tokens if token.activation]
            for example in detail.examples
            for text in example.texts
        ]
        card = f"f-{detail.sae}-{detail.feature}"
        shown: list[list[list[Any]]] = await tab_.value(
            f"""(() => {{
              const card = document.getElementById("{card}");
              card.open = true;
              return Array.from(card.querySelectorAll(".tokens"), (text) =>
                Array.from(text.querySelectorAll("mark"), (one) =>
                  [one.textContent, one.title, getComputedStyle(one).backgroundColor]));
            }})()"""
        )
        assert [[one[0] for one in text] for text in shown] == [[one[0] for one in text] for text in expected]
        coloured = [
            (activation, sum(map(int, color.removeprefix("rgb(").removesuffix(")").split(", "))))
            for of, text in zip(expected, shown, strict=True)
            for (_, activation), (_, _, color) in zip(of, text, strict=True)
        ]
        coloured.sort()
        light = [brightness for _, brightness in coloured]
        assert light == sorted(light, reverse=True) and len(set(light)) > 2


async def test_theme_button_turns_light_and_dark(tab_: Page, files: dict[str, Path]) -> None:
    await tab_.show(dark=True)
    await tab_.goto(files["contrast"].as_uri())
    paper = "getComputedStyle(document.body).backgroundColor"
    dark = await tab_.value(paper)
    assert await tab_.text("#theme") == "Light"
    await tab_.value("document.getElementById('theme').click()")
    assert await tab_.value(paper) != dark
    await tab_.show(dark=False)
    await tab_.value("document.getElementById('theme').click()")
    assert await tab_.value(paper) == dark


async def test_link_to_a_closed_feature_opens_it(tab_: Page, files: dict[str, Path], report: Report) -> None:
    last = report.details[-1]
    card = f"f-{last.sae}-{last.feature}"
    await tab_.goto(files["contrast"].as_uri())
    assert not await tab_.value(f"document.getElementById('{card}').open")
    await tab_.value(f"document.querySelector('#ranked a[href=\"#{card}\"]').click()")
    await tab_.until(f"document.getElementById('{card}').open")


async def test_page_is_complete_without_a_script(tab_: Page, files: dict[str, Path], report: Report) -> None:
    await tab_.show(script=False)
    await tab_.goto(files["contrast"].as_uri())
    text = await tab_.text("main")
    for words in ("What holds, and what does not", "Ghost features", "Held-out pairs", "Not controlled"):
        assert words in text
    assert not await tab_.value("!!document.querySelector('thead button, #theme:not([hidden])')")
    assert report.features is not None
    rows = await tab_.value("document.querySelectorAll('#ranked tbody tr').length")
    assert rows == min(int(report.features.tested.sum()), 500)


@pytest.mark.parametrize(
    ("kind", "width", "dark"),
    [*(("small", *size) for size in SIZES), ("groups", 1400, False), ("prevalence", 390, True)],
)
async def test_axe_finds_no_serious_fault(
    tab_: Page, files: dict[str, Path], axe: str, kind: str, width: int, dark: bool
) -> None:
    await tab_.show(width, dark=dark)
    await tab_.goto(files[kind].as_uri())
    await tab_.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    await tab_.value(f"(() => {{ {axe}; return true; }})()")
    found: list[dict[str, Any]] = json.loads(
        await tab_.value(
            "axe.run({resultTypes: ['violations']}).then((found) => JSON.stringify(found.violations))"
        )
    )
    serious = [
        (one["id"], one["help"], [node["html"][:200] for node in one["nodes"][:3]])
        for one in found
        if one["impact"] in ("serious", "critical")
    ]
    assert serious == []


async def test_paper_has_every_section(tab_: Page, files: dict[str, Path], small: Report) -> None:
    pypdf = pytest.importorskip("pypdf")
    await tab_.goto(files["small"].as_uri())
    printed = await tab_.tell("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
    pages = pypdf.PdfReader(io.BytesIO(base64.b64decode(printed["data"]))).pages
    text = " ".join(" ".join(page.extract_text() for page in pages).split())
    headings = await tab_.value("Array.from(document.querySelectorAll('h2'), (one) => one.textContent)")
    for heading in headings:
        assert heading in text
    for detail in small.details[: tables.PRINTED_DETAILS]:  # some closed on a screen, open on paper
        for example in detail.examples:
            assert example.sample_id in text
    assert "Search" not in text


@pytest.mark.skipif(SCREENSHOTS is None, reason="LENSD_SCREENSHOTS is not set")
@pytest.mark.parametrize(("width", "dark"), SIZES)
async def test_pictures(tab_: Page, files: dict[str, Path], width: int, dark: bool) -> None:
    await tab_.show(width, dark=dark)
    await tab_.goto(files["contrast"].as_uri())
    name = f"report-{width}-{'dark' if dark else 'light'}.png"
    assert (await tab_.screenshot(Path(str(SCREENSHOTS)) / name)).stat().st_size
