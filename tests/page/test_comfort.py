"""In a real browser: subscribing with the mail that comes of it, and nothing serious that axe-core could find."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from locally.page.preprints import Preprint, Preprints
from locally.page.store import Store
from locally.page.subscriptions import Subscriptions
from tests.page.mailing import MailServer, wait_for
from tests.page.test_browser import PATIENCE, Server, page  # noqa: F401
from tests.page.test_store import evidence

SERIOUS = ("serious", "critical")
KEY = "2601.00001"


@pytest.fixture
def mail(tmp_path: Path) -> Iterator[MailServer]:
    with MailServer(tmp_path / "mail") as running:
        yield running


@pytest.fixture
def server(add_paper, mail, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    add_paper("good")
    add_paper("unwritten", None)
    store = Store()
    for value in (0.5, 5.0):
        store.add(evidence("good", value=value, machine={}))
    when = "2026-01-02T00:00:00+00:00"
    Preprints(store).add([Preprint(KEY, "A title", ("Ada",), "Words.", when, when, when[:10], categories=("cs.LG",))])
    server = Server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server.port = str(free.getsockname()[1])
    for name, value in mail.environment(url=f"http://127.0.0.1:{server.port}/").items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.stop()


@pytest.mark.browser
def test_subscribe_and_confirm_by_the_link_in_the_mail(server, page, mail):  # noqa: F811
    page.goto(server.address)
    page.click("text=Keep up")
    page.fill("#address", "ada@example.org")
    page.select_option("#about", "solvers")
    page.select_option("#period", "weekly")
    page.click("text=Subscribe")
    expect(page.locator("h1")).to_have_text("Look into your mailbox", timeout=PATIENCE)
    wait_for(lambda: mail.letters())
    page.goto(server.address.rstrip("/") + mail.letters()[0].link("confirm"))
    expect(page.locator("#content")).to_contain_text("weekly digest of papers on solvers")
    page.click("button")
    expect(page.locator("h1")).to_have_text("Subscribed", timeout=PATIENCE)
    desk = Subscriptions(Store(), mail.settings(url=server.address))
    (subscription,) = desk.active()
    page.goto(desk.end_link(subscription, desk._clock()))
    page.click("button")
    expect(page.locator("h1")).to_have_text("Unsubscribed", timeout=PATIENCE)
    assert desk.active() == []


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(server, page, scheme):  # noqa: F811
    page.emulate_media(color_scheme=scheme)
    found = {}
    for path in ("", "?q=zzyzx", "?period=day&order=trending", "papers/good", "papers/unwritten", f"papers/{KEY}",
                 "papers/good/compare?a=1&b=2", "subscribe", "me"):  # fmt: skip
        page.goto(server.address + path)
        violations = Axe().run(page).response["violations"]
        bad = [(v["id"], v["nodes"][0]["html"][:200]) for v in violations if v["impact"] in SERIOUS]
        if bad:
            found[path] = bad
    assert found == {}
