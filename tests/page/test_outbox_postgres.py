"""Subscriptions, digests and the outbox on a real PostgreSQL server."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import sqlalchemy as sa

from locally import catalogue
from locally.page.digest import Digests
from locally.page.outbox import SUPPRESSED_AFTER, Letter, Outbox, State
from locally.page.schema import messages, subscriptions
from locally.page.store import Store
from locally.page.subscriptions import Period
from tests.page.mailing import MailServer
from tests.page.test_outbox import Clock, ask, states
from tests.page.test_postgres import pytestmark, server, url  # noqa: F401
from tests.page.test_store import evidence


def test_from_asking_to_one_digest_and_no_more(url, add_paper, tmp_path):  # noqa: F811
    add_paper("first")
    clock, store = Clock(), Store(url)
    with MailServer(tmp_path / "mail") as mail:
        settings = mail.settings()
        digests, outbox = Digests(store, settings, catalogue.load(), clock=clock), Outbox(store, settings, clock=clock)
        digests.subscriptions.ask("ada@example.org", Period.DAILY)
        outbox.deliver()
        period, link = mail.letters()[0].link("confirm").split("/")[-2:]
        digests.subscriptions.confirm(Period(period), link)
        store.add(evidence("first", started=clock.now.isoformat(timespec="seconds")))
        with ThreadPoolExecutor(4) as pool:
            queued = list(pool.map(lambda _: digests.queue(), range(4)))
            list(pool.map(lambda _: outbox.deliver(), range(4)))
        assert sum(queued) == 1
        _, digest = mail.letters()
        assert "first verdict: holds" in digest.text
        digests.subscriptions.end(digest.link("end").rpartition("/")[2])
        assert store.query(sa.select(subscriptions.c.id)) == store.query(sa.select(messages.c.id)) == []


def test_many_senders_bounces_and_claims_of_the_dead(url, tmp_path):  # noqa: F811
    clock, store = Clock(), Store(url)
    with MailServer(tmp_path / "mail") as mail:
        ask(store, mail, *(f"reader{i}" for i in range(20)), clock=clock)
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: Outbox(store, mail.settings(), clock=clock).deliver(), range(4)))
        assert len({letter.recipient for letter in mail.letters()}) == len(mail.letters()) == 20
        outbox = Outbox(store, mail.settings(), clock=clock)
        for _ in range(SUPPRESSED_AFTER):
            ask(store, mail, "unknown", clock=clock)
            assert outbox.deliver() == {Letter.BOUNCED: 1}
            clock.now += timedelta(hours=1)
        suppressed = sa.select(subscriptions.c.address).where(subscriptions.c.state == str(State.SUPPRESSED))
        assert store.query(suppressed) == [("unknown@example.org",)]
        ask(store, mail, "claimed", "sending", clock=clock)
        for name in ("claimed", "sending"):
            message = outbox._claim()
            if name == "sending":
                outbox._move(message, Letter.SENDING)
        clock.now += outbox.lease
        assert outbox.deliver() == {Letter.SENT: 1, Letter.UNCERTAIN: 1}
        assert states(store)["sending@example.org"] == Letter.UNCERTAIN
