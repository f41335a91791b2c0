"""Subscribing over HTTP: from our own form, at a measured pace, and away again with one click."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from starlette.testclient import TestClient

from locally.page.outbox import Outbox, State
from locally.page.schema import subscriptions
from locally.page.store import Store
from locally.page.subscriptions import Period, Subscriptions
from locally.page.web import create_app
from locally.page.web.subscribing import FOR_ONE, FROM_ONE, ON_ITS_WAY
from tests.page.mailing import MailServer, wait_for
from tests.page.test_browser import Server

JSON = {"accept": "application/json"}
ADA = "ada@example.org"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MailServer]:
    with MailServer(tmp_path / "mail") as running:
        for name, value in running.environment(url="http://127.0.0.1/").items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def client(server) -> Iterator[TestClient]:
    with TestClient(create_app(Store()), base_url="http://127.0.0.1") as client:
        yield client


def ask(client: TestClient, address: str = ADA, **other: str):
    key = re.search(r'name="form_key" value="([^"]+)"', client.get("/subscribe").text)
    form = {"address": address, "period": "daily", "wing": "", "form_key": key[1]} | other
    return client.post("/subscriptions", data=form)


def letters(server: MailServer, count: int = 1):
    wait_for(lambda: len(server.letters()) >= count)
    return server.letters()


def states() -> list[tuple[str, str]]:
    return Store().query(sa.select(subscriptions.c.address, subscriptions.c.state))


def test_asked_confirmed_and_ended(client, server):
    answer = ask(client, wing="privacy", period="weekly")
    assert answer.status_code == 202
    assert ON_ITS_WAY in answer.text
    (letter,) = letters(server)
    link = letter.link("confirm")
    shown = client.get(link)
    assert "weekly digest of papers on privacy" in shown.text
    assert states() == [(ADA, State.PENDING)]  # a mail scanner that opens links confirms nothing
    assert "Subscribed" in client.post(link).text
    assert states() == [(ADA, State.ACTIVE)]
    desk = Subscriptions(Store(), server.settings(url="http://127.0.0.1/"))
    end = desk.end_link(desk.active()[0], desk._clock()).removeprefix("http://127.0.0.1")
    assert "Unsubscribe" in client.get(end).text
    assert states() == [(ADA, State.ACTIVE)]
    client.cookies.clear()
    for _ in range(2):  # as a mail provider does it
        one_click = client.post(end, data={"List-Unsubscribe": "One-Click"})
        assert one_click.status_code == 200
        assert "has ended" in one_click.text
    assert states() == []
    assert "has ended" in client.get(end).text


def test_no_page_shows_the_address_or_says_whether_it_is_known(client, server):
    first = ask(client)
    link = letters(server)[0].link("confirm")
    shown = [first.text, client.get(link).text, client.post(link).text, ask(client).text]
    assert not any("ada" in page for page in shown)
    key = re.compile(r'value="[^"]{20,}"')
    assert key.sub("", shown[0]) == key.sub("", shown[3])


def test_a_form_from_elsewhere_and_bad_words_are_refused(client, server):
    assert client.post("/subscriptions", data={"address": ADA}).status_code == 403
    for wrong, says in (
        ({"address": "ada"}, "not an e-mail address"),
        ({"address": ""}, "not an e-mail address"),
        ({"address": "<script>alert(1)</script>@example.org"}, "not an e-mail address"),
        ({"period": "hourly"}, "daily, weekly"),
        ({"wing": "kitchen"}, "no such wing"),
    ):
        answer = client.post("/subscriptions", json={"address": ADA} | wrong, headers=JSON)
        assert answer.status_code == 422
        assert says in answer.json()["error"]
    for link in ("confirm/daily/1.2.3.4", "confirm/hourly/1.2.3.4", "end/1.2.3.4", "end/%00", "confirm/daily/ä"):
        assert client.get(f"/subscriptions/{link}").status_code == 404
        assert client.post(f"/subscriptions/{link}").status_code == 404
    assert states() == []


def test_one_address_is_written_to_a_few_times_and_one_place_may_ask_a_few_times(client, server):
    statuses = [client.post("/subscriptions", json={"address": ADA}).status_code for _ in range(FOR_ONE[0] + 1)]
    assert statuses == [202] * FOR_ONE[0] + [429]
    while (answer := client.post("/subscriptions", json={"address": f"{len(statuses)}@example.org"})).is_success:
        statuses.append(answer.status_code)
    assert answer.status_code == 429
    assert int(answer.headers["retry-after"]) > 0
    assert len(statuses) == FROM_ONE[0]
    assert len(letters(server, 7)) == 1 + FROM_ONE[0] - FOR_ONE[0] - 1


def test_links_work_without_the_token_and_nothing_else_does(server):
    token = "a-secret-of-some-length"
    with TestClient(create_app(Store(), token=token), base_url="http://127.0.0.1") as client:
        assert client.post("/subscriptions", json={"address": ADA}).status_code == 401
        assert client.get("/subscribe").status_code == 401
        bearer = {"authorization": f"Bearer {token}"}
        assert client.post("/subscriptions", json={"address": ADA}, headers=bearer).status_code == 202
        link = letters(server)[0].link("confirm")
        assert client.get(link).status_code == 200
        assert client.post(link).status_code == 200
        assert client.get("/subscriptions/confirm/../../subscribe").status_code == 401
        assert token not in client.get(link).text


def test_without_a_mail_server_feeds_are_offered(tmp_path):
    with TestClient(create_app(Store()), base_url="http://127.0.0.1") as client:
        page = client.get("/subscribe")
        assert page.status_code == 200
        assert "LOCALLY_MAIL_HOST" in page.text
        assert 'action="/subscriptions"' not in page.text
        assert "/feed.atom?wing=privacy" in page.text
        assert client.post("/subscriptions", json={"address": ADA}, headers=JSON).status_code == 404
        assert client.get("/subscriptions/end/1.2.3.4").status_code == 404


def test_what_could_not_be_sent_goes_out_when_the_page_is_served_again(server):
    server.stop()
    with TestClient(create_app(Store()), base_url="http://127.0.0.1") as client:
        assert client.post("/subscriptions", json={"address": ADA}).status_code == 202
        wait_for(lambda: Store().query(sa.text("select attempts from messages")) == [(1,)])
    server.start()
    with Store().writing() as connection:
        connection.execute(sa.text("update messages set due = ''"))
    with TestClient(create_app(Store()), base_url="http://127.0.0.1"):
        assert letters(server)[0].recipient == ADA
    assert Outbox(Store(), server.settings()).deliver() == {}
    assert Period.DAILY in letters(server)[0].text


def test_a_feed_reader_asks_whether_there_is_news():
    with TestClient(create_app(Store()), base_url="http://127.0.0.1") as client:
        first = client.get("/feed.atom?wing=privacy")
        again = client.get("/feed.atom?wing=privacy", headers={"if-none-match": first.headers["etag"]})
        assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
        other = client.get("/feed.atom", headers={"if-none-match": first.headers["etag"]})
        assert other.status_code == 200


def test_neither_addresses_nor_links_nor_the_password_stand_in_the_log(server, monkeypatch):
    """A process of its own, through a mail that goes out, one that bounces and a server that goes away."""
    for name, value in {"USER": "page", "PASSWORD": "sesame", "HOST": "127.0.0.1"}.items():
        monkeypatch.setenv(f"LOCALLY_MAIL_{name}", value)
    page = Server()
    page.start()
    ask = lambda name: httpx2.post(f"{page.address}subscriptions", json={"address": f"{name}@example.org"})
    assert ask("lovelace").status_code == 202  # the server knows no logins, which stops the mail
    line = page.process.stderr.readline()
    assert "AUTH" in line
    page.stop()
    for name in ("USER", "PASSWORD"):
        monkeypatch.delenv(f"LOCALLY_MAIL_{name}")
    page.start()
    assert ask("unknown").status_code == 202
    link = letters(server)[0].link("confirm")
    assert httpx2.post(page.address.rstrip("/") + link).status_code == 200
    assert httpx2.get(page.address.rstrip("/") + link + "x").status_code == 404
    server.stop()
    assert ask("babbage").status_code == 202
    page.stop()
    log = line + page.process.stderr.read()
    assert not [word for word in ("lovelace", "unknown@", "babbage", "sesame", link) if word in log]
