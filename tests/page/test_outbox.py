"""Mail through a real server in a process of its own: handed over, put off, bounced, and never sent twice."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from locally.page import outbox as outbox_module
from locally.page.mail import MailError
from locally.page.outbox import PAUSES, SUPPRESSED_AFTER, Letter, Outbox, State
from locally.page.schema import messages, subscriptions
from locally.page.store import Store
from locally.page.subscriptions import Period, Subscriptions
from tests.page.mailing import ROOT, MailServer, certificate, wait_for

START = datetime(2026, 1, 5, 8, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MailServer]:
    with MailServer(tmp_path / "mail") as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


def ask(store: Store, server: MailServer, *names: str, clock: Clock | None = None) -> None:
    for name in names:
        Subscriptions(store, server.settings(), clock=clock).ask(f"{name}@example.org", Period.DAILY, anew=True)


def states(store: Store) -> dict[str, str]:
    joined = messages.join(subscriptions, subscriptions.c.id == messages.c.subscription)
    return dict(store.query(sa.select(subscriptions.c.address, messages.c.state).select_from(joined)))


def test_a_message_is_handed_over_once_and_its_content_forgotten(server):
    store = Store()
    ask(store, server, "ada", "bob")
    outbox = Outbox(store, server.settings())
    assert outbox.deliver() == {Letter.SENT: 2}
    assert outbox.deliver() == {}
    assert [letter.recipient for letter in server.letters()] == ["ada@example.org", "bob@example.org"]
    rows = store.query(sa.select(messages.c.message_id, messages.c.content, messages.c.reason))
    assert [row[0] for row in rows] == [letter.message["Message-ID"] for letter in server.letters()]
    assert {row[1:] for row in rows} == {("", "250 OK")}


def test_starttls_with_a_login(tmp_path):
    own, ca = certificate(tmp_path, "localhost")
    options = ("--certificate", own, "--user", "page", "--password", "sesame")
    with MailServer(tmp_path / "mail", *options) as server:
        store = Store()
        ask(store, server, "ada")
        secured = {"host": "localhost", "security": "starttls", "user": "page", "ca": ca}
        for wrong, says in (
            ({"password": "guess"}, "refuses us, or the login"),
            ({"ca": ""}, "does not prove who it is"),
            ({"user": ""}, "refuses"),
        ):
            with pytest.raises(MailError, match=says) as caught:
                Outbox(store, server.settings(**(secured | {"password": "sesame"} | wrong))).deliver()
            assert "guess" not in str(caught.value)
        secret = tmp_path / "secret"
        secret.write_text("sesame\n")
        assert Outbox(store, server.settings(**secured, password_file=str(secret))).deliver() == {Letter.SENT: 1}
        (letter,) = server.letters()
        assert (letter.secure, letter.login) == ("TLS", "page")


def test_tls_from_the_first_byte_and_a_server_without_starttls(tmp_path):
    own, ca = certificate(tmp_path, "localhost")
    store = Store()
    with MailServer(tmp_path / "mail", "--certificate", own, "--tls") as server:
        ask(store, server, "ada")
        assert Outbox(store, server.settings(host="localhost", security="tls", ca=ca)).deliver() == {Letter.SENT: 1}
        assert server.letters()[0].secure == "TLS"
    with MailServer(tmp_path / "mail") as server:
        ask(store, server, "bob")
        with pytest.raises(MailError, match="STARTTLS"):
            Outbox(store, server.settings(security="starttls")).deliver()


def test_a_rejected_recipient_bounces_and_is_left_alone_after_some_more(server, clock):
    store = Store()
    outbox = Outbox(store, server.settings(), clock=clock)
    for _ in range(SUPPRESSED_AFTER):
        ask(store, server, "unknown", "ada", clock=clock)
        assert outbox.deliver() == {Letter.BOUNCED: 1, Letter.SENT: 1}
        clock.now += timedelta(hours=1)
    found = dict(store.query(sa.select(subscriptions.c.address, subscriptions.c.state)))
    assert found == {"unknown@example.org": State.SUPPRESSED, "ada@example.org": State.PENDING}
    asking = Subscriptions(store, server.settings(), clock=clock)
    asking.ask("unknown@example.org", Period.DAILY)
    asking.ask("unknown@example.org", Period.DAILY, "solvers")
    assert outbox.deliver() == {}
    reasons = store.query(sa.select(messages.c.reason).where(messages.c.state == str(Letter.BOUNCED)))
    assert reasons == [("550 5.1.1 no such user",)] * SUPPRESSED_AFTER


def test_a_message_that_is_refused_says_nothing_against_the_address(server):
    store = Store()
    ask(store, server, "spam")
    assert Outbox(store, server.settings()).deliver() == {Letter.REFUSED: 1}
    assert store.query(sa.select(subscriptions.c.bounces)) == [(0,)]


def test_who_asks_to_come_back_is_come_back_to(server, clock):
    store = Store()
    ask(store, server, "greylisted", "ada", clock=clock)
    outbox = Outbox(store, server.settings(), clock=clock)
    assert outbox.deliver() == {Letter.WAITING: 1, Letter.SENT: 1}
    assert outbox.deliver() == {}
    clock.now += PAUSES[0]
    assert outbox.deliver() == {Letter.SENT: 1}
    assert [letter.recipient[:4] for letter in server.letters()] == ["ada@", "grey"]


def test_a_server_that_is_away_is_tried_with_growing_pauses_and_then_no_more(server, clock):
    store = Store()
    ask(store, server, "ada", "bob", clock=clock)
    server.stop()
    outbox = Outbox(store, server.settings(timeout=2.0), clock=clock)
    for pause in PAUSES:
        assert outbox.deliver() == {Letter.WAITING: 1}  # the other one is not even tried
        assert outbox.deliver() == {Letter.WAITING: 1}
        assert outbox.deliver() == {}
        clock.now += pause
    assert outbox.deliver() == {Letter.GIVEN_UP: 1}
    server.start()
    assert outbox.deliver() == {Letter.SENT: 1}
    assert sorted(states(store).values()) == [Letter.GIVEN_UP, Letter.SENT]


def test_a_server_that_dies_in_the_middle_gets_the_message_again(server, clock):
    store = Store()
    ask(store, server, "dying", clock=clock)
    outbox = Outbox(store, server.settings(), clock=clock)
    assert outbox.deliver() == {Letter.WAITING: 1}
    server.process.wait(timeout=10)
    server.start()
    clock.now += PAUSES[0]
    assert outbox.deliver() == {Letter.SENT: 1}
    assert len(server.letters()) == 1


SENDER = """
import sys
from datetime import timedelta
from locally.page.mail import settings
from locally.page.outbox import Outbox
from locally.page.store import Store
Outbox(Store(), settings(), lease=timedelta(0)).deliver()
"""


@pytest.mark.parametrize(("name", "after"), [("stuck-early", Letter.CLAIMED), ("stuck-late", Letter.SENDING)])
def test_no_message_twice_when_the_sender_is_killed(server, name, after):
    """Before it is handed over it is sent again; once the server may have it, never."""
    store = Store()
    ask(store, server, name)
    sender = subprocess.Popen([sys.executable, "-c", SENDER], cwd=ROOT, env=server.environment())
    if after is Letter.CLAIMED:
        wait_for(lambda: (server.folder / "asked-stuck-early").exists())
    else:
        wait_for(lambda: server.letters())
    assert list(states(store).values()) == [after]
    sender.send_signal(signal.SIGKILL)
    sender.wait()
    assert Outbox(store, server.settings()).deliver() == {}  # the claim is not over yet
    ended = Outbox(store, server.settings(), lease=timedelta(0)).deliver()
    assert ended == {Letter.SENT if after is Letter.CLAIMED else Letter.UNCERTAIN: 1}
    assert len(server.letters()) == 1


def test_a_slow_sender_whose_claim_is_over_does_not_send(server, clock, monkeypatch):
    store = Store()
    ask(store, server, "ada", clock=clock)
    slow, fast = (Outbox(store, server.settings(), clock=clock) for _ in range(2))
    offer = outbox_module.Session.offer

    def late(session, recipient):
        offer(session, recipient)
        monkeypatch.setattr(outbox_module.Session, "offer", offer)
        clock.now += slow.lease
        assert fast.deliver() == {Letter.SENT: 1}

    monkeypatch.setattr(outbox_module.Session, "offer", late)
    assert slow.deliver() == {Letter.CLAIMED: 1}
    assert len(server.letters()) == 1


def test_many_senders_share_the_work(server):
    store = Store()
    names = [f"reader{i}" for i in range(30)]
    ask(store, server, *names)
    senders = [threading.Thread(target=lambda: Outbox(Store(), server.settings()).deliver()) for _ in range(4)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    assert sorted(letter.recipient for letter in server.letters()) == sorted(f"{n}@example.org" for n in names)
