"""The report as a reader meets it: one file, no network, in a real browser at phone and desktop width."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from locally import catalogue
from locally.errors import UsageError
from locally.evidence import Measure, Scale
from locally.page.report import method_table, records_csv, write
from locally.page.runner import run_jobs
from locally.page.store import Store
from locally.page.worker import Job

FAILING = "def experiment(run):\n    for s in run.seeds: run.record('ours', 'error', 5.0, seed=s)\n"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture
def page(add_paper, tmp_path) -> Path:
    """A report with one paper that holds, one that fails, one that crashed and the 31 that come with the package."""
    add_paper("good", title="Sketch & <script>alert('title')</script> notes")
    add_paper("failing", FAILING)
    add_paper(
        "crashing", "def experiment(run):\n    print('</pre><b>log</b>')\n    raise RuntimeError('<i>broke</i>')\n"
    )
    papers = catalogue.load()
    store = Store()
    for evidence in run_jobs([(Job(p.slug, Scale.QUICK, (0, 1)), p.claims) for p in papers if p.number > 900]):
        store.add(evidence)
    return write(tmp_path / "report", papers, store)


def test_the_page_is_self_contained_and_escapes_what_papers_say(page: Path):
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<i>broke</i>" not in text
    assert "</pre><b>log" not in text
    assert not re.search(r"(src|href)=\"(?!#|figures/|data/|https://arxiv\.org/abs/)", text.replace("xlink:href", ""))
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"', text):
        assert target in ids


def test_figures_and_records_lie_beside_the_page(page: Path):
    assert (page.parent / "figures" / "good-1.pdf").read_bytes().startswith(b"%PDF")
    assert (page.parent / "figures" / "good-1.png").read_bytes().startswith(b"\x89PNG")
    lines = (page.parent / "data" / "good.csv").read_text().splitlines()
    assert lines[0] == "method,metric,value,seed,n"
    assert lines[1] == "ours,error,0.5,0,1"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the report"):
        write(tmp_path / "file" / "report", catalogue.load(), Store())


def test_the_table_gives_means_with_intervals_and_puts_claimed_metrics_first():
    measures = [Measure("ours", "time", 1.0), Measure("ours", "error", 1.0, 0), Measure("ours", "error", 3.0, 1)]
    measures += [Measure("theirs", "error", 2.0, 0), Measure("theirs", "error", 2.0, 1)]
    table = method_table(measures, ["time"])
    assert table.metrics == ["time", "error"]
    (ours, cells), (theirs, others) = table.rows
    assert (ours, theirs) == ("ours", "theirs")
    assert cells[1].mean == "2"
    assert cells[1].spread.startswith("[-10.7")
    assert (others[0].mean, others[1].mean, others[1].spread) == ("", "2", "")


def test_records_survive_as_csv():
    text = records_csv([Measure("a, b", "error", float("nan"), None, {"n": 1}), Measure("c", "error", 0.1, 2)])
    assert text == 'method,metric,value,seed,n\n"a, b",error,nan,,1\nc,error,0.1,2,\n'


@pytest.fixture
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing: `make test` installs it")
        pytest.skip("Chromium is not installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_a_reader_opens_it_follows_a_link_and_finds_figure_and_verdict(page: Path, browser, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_offline(True)
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    tab.goto(page.as_uri())
    assert tab.locator("h1").inner_text() == "Locally"
    tab.get_by_role("link", name="Sketch & <script>alert('title')</script> notes").click()
    article = tab.locator("article#good")
    assert article.is_visible()
    assert article.locator("[data-verdict]").get_attribute("data-verdict") == "holds"
    assert tab.locator("article#failing [data-verdict]").inner_text() == "fails"
    assert tab.locator("article#crashing [data-verdict]").inner_text() == "crashed"
    drawing = article.locator("figure svg").bounding_box()
    assert 200 < drawing["width"] <= width
    assert drawing["height"] > 100
    assert "error" in article.locator("figure svg").text_content()
    overflow = tab.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow <= 0, "the page scrolls sideways"
    assert problems == []


@pytest.mark.browser
def test_the_keyboard_reaches_a_paper(page: Path, browser):
    tab = browser.new_page()
    tab.goto(page.as_uri())
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the papers"
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')").startswith("#")
    tab.keyboard.press("Enter")
    assert "#" in tab.url


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Path, browser, scheme):
    """WCAG AA: at least 4.5 to 1 for every piece of text against what lies behind it."""
    tab = browser.new_page(color_scheme=scheme)
    tab.goto(page.as_uri())
    worst = tab.evaluate(
        """() => {
        const channel = c => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
        const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
        const rgb = s => s.match(/[\\d.]+/g).map(Number);
        const behind = e => { for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; }
            return [255, 255, 255]; };
        let worst = [99, ''];
        for (const e of document.querySelectorAll('body *:not(svg *):not(svg)')) {
            if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
            const pair = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((a, b) => b - a);
            const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
            if (ratio < worst[0]) worst = [ratio, e.className + ': ' + e.textContent.slice(0, 40)];
        }
        return worst; }"""
    )
    assert worst[0] >= 4.5, worst
