"""The served page in a real browser: search, run, watch, cancel, and a restart of the server in the middle."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import expect, sync_playwright

from locally.page.preprints import Preprint, Preprints
from locally.page.store import Store

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SLOW = "import time\ndef experiment(run):\n    for _ in run.track(range(600), 'turning'): time.sleep(0.1)\n"

PATIENCE = 60_000  # milliseconds


class Server:
    """`locally serve` as a process of its own, on a port that it keeps over a restart."""

    def __init__(self) -> None:
        self.address, self.port = "", "0"

    def start(self) -> None:
        command = [sys.executable, "-m", "locally.cli", "serve", "--port", self.port]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        line = self.process.stderr.readline()
        self.address = re.search(r"http://\S+/", line)[0]
        self.port = self.address.rstrip("/").rpartition(":")[2]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=30)


@pytest.fixture
def server(add_paper) -> Iterator[Server]:
    add_paper("good")
    add_paper("slow", SLOW)
    server = Server()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def page(server):
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("Chromium is missing: `make test` installs it")
        pytest.skip("Chromium is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
        page.set_default_timeout(PATIENCE)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
        yield page
        assert problems == []
        browser.close()


@pytest.mark.browser
def test_search_run_and_read_without_reloading(server, page):
    page.goto(server.address)
    page.fill("#q", "sketch of goo")
    expect(page.locator("ol.papers a").first).to_have_text("Sketch of good", timeout=PATIENCE)
    assert "q=sketch" in page.url
    page.locator("ol.papers a").first.click()
    page.evaluate("window.witness = 1")
    page.click("section.run button")
    page.wait_for_selector("article [data-verdict='holds']")
    assert page.evaluate("window.witness") == 1
    assert page.locator("article figure svg").count() == 1
    assert page.locator("#run form[action$='/runs']").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
def test_two_browsers_watch_one_run_and_one_cancels_it(server, page):
    other = page.context.new_page()
    for one in (page, other):
        one.goto(f"{server.address}papers/slow")
    page.click("section.run button")
    expect(page.locator("#run .state")).to_contain_text("turning", timeout=PATIENCE)
    other.reload()
    expect(other.locator("#run .state")).to_contain_text("turning", timeout=PATIENCE)
    other.click("section.run button")
    for one in (page, other):
        one.wait_for_selector("#run form[action$='/runs']")


@pytest.mark.browser
def test_a_run_survives_a_restart_of_the_server(server, page):
    page.goto(f"{server.address}papers/slow")
    page.click("section.run button")
    expect(page.locator("#run .state")).to_contain_text("turning", timeout=PATIENCE)
    page.goto("about:blank")
    assert server.stop() in (0, 130, -signal.SIGINT)
    server.start()
    page.goto(f"{server.address}papers/slow")
    expect(page.locator("#run .state")).to_contain_text("turning", timeout=PATIENCE)
    page.click("section.run button")
    page.wait_for_selector("#run form[action$='/runs']")


LOOM = Preprint(
    key="2603.00001",
    title="Weaving <b>Looms</b>",
    authors=("Ada Lovelace",),
    summary="A jacquard loom.",
    published="2026-03-01T00:00:00+00:00",
    updated="2026-03-01T00:00:00+00:00",
    day="2026-03-01",
    sources=("arxiv",),
)


@pytest.mark.browser
def test_find_a_fetched_paper_vote_tag_and_talk(server, page):
    Preprints(Store()).add([LOOM])
    page.goto(server.address)
    page.fill("#q", "jaquard")
    first = page.locator("ol.papers li").first
    expect(first.locator("a.title")).to_have_text(LOOM.title, timeout=PATIENCE)
    page.evaluate("window.witness = 1")
    first.locator("button[value=vote]").click()
    expect(first.locator("button[value='-vote'][aria-pressed=true] .count")).to_have_text("1", timeout=PATIENCE)
    assert page.evaluate("window.witness") == 1  # without loading the page again
    first.locator("a.title").click()
    page.fill("#tag", "looms, to cite")
    page.keyboard.press("Enter")
    expect(page.locator(".tagging .tag")).to_have_text(["looms", "to-cite"], timeout=PATIENCE)
    page.fill("#comment", "It **weaves**.")
    page.click("button:text-is('Comment')")
    expect(page.locator(".comment .words strong")).to_have_text("weaves", timeout=PATIENCE)
    page.goto(f"{server.address}?tags=looms")
    expect(page.locator("ol.papers a.title")).to_have_text([LOOM.title], timeout=PATIENCE)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.browser
def test_everything_works_without_javascript(server, page):
    Preprints(Store()).add([LOOM])
    plain = page.context.browser.new_context(java_script_enabled=False).new_page()
    plain.goto(server.address)
    plain.fill("#q", "jacquard")
    plain.keyboard.press("Enter")
    plain.locator("ol.papers button[value=save]").first.click()
    expect(plain.locator("ol.papers button[value='-save']").first).to_be_visible(timeout=PATIENCE)
    assert "q=jacquard" in plain.url
    plain.locator("ol.papers a.title").first.click()
    plain.click("text=Private note")
    plain.fill("#note-text", "see section 2")
    plain.click("button:text-is('Keep')")
    expect(plain.locator("#note-text")).to_have_value("see section 2", timeout=PATIENCE)
    plain.context.close()


def test_wrong_arguments_are_one_line(home):
    for arguments, words in (
        (["--host", "0.0.0.0"], "--token"),
        (["--token", "short"], "16 characters"),
        (["--port", "99999"], "65535"),
        (["--jobs", "0"], "--jobs"),
        (["--user-header", "X User"], "--user-header must be the name of a header"),
    ):
        command = [sys.executable, "-m", "locally.cli", "serve", *arguments]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60)
        assert ended.returncode == 2
        assert words in ended.stderr
        assert ended.stderr.count("\n") == 1
