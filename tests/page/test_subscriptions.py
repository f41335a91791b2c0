"""Nobody gets a digest who did not confirm it, and nobody learns who gets one."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from locally.errors import UsageError
from locally.page.links import BadLink
from locally.page.mail import masked
from locally.page.outbox import Outbox, State
from locally.page.schema import messages, subscriptions
from locally.page.store import Store
from locally.page.subscriptions import ASK_AGAIN, CONFIRM_FOR, END_FOR, Period, Subscriptions
from tests.page.mailing import MailServer
from tests.page.test_outbox import Clock

ADA = "ada@example.org"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MailServer]:
    with MailServer(tmp_path / "mail") as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def desk(server, clock) -> Subscriptions:
    return Subscriptions(Store(), server.settings(), clock=clock)


def link_of(server: MailServer, desk: Subscriptions, nth: int = -1) -> tuple[Period, str]:
    """What the last mail to confirm says."""
    Outbox(desk.store, server.settings(), clock=desk._clock).deliver()
    period, link = server.letters()[nth].link("confirm").split("/")[-2:]
    return Period(period), link


def test_only_a_link_from_the_mailbox_confirms(desk, server):
    desk.ask(f" {ADA.upper().replace('EXAMPLE', 'Example')} ", Period.WEEKLY, "solvers")
    assert desk.active() == []
    link = link_of(server, desk)
    assert desk.asked(*link).state is State.PENDING
    assert desk.active() == []  # looking confirms nothing
    found = desk.confirm(*link)
    assert (found.state, found.period, found.wing) == (State.ACTIVE, Period.WEEKLY, "solvers")
    assert desk.confirm(*link) == found
    (letter,) = server.letters()
    assert letter.message["To"] == letter.recipient == "ADA@example.org"
    assert letter.message.get_content_type() == "multipart/alternative"
    assert "https://locally.example/subscriptions/confirm/weekly/" in letter.html
    assert "solvers" in letter.text


def test_a_link_is_good_for_one_purpose_one_address_and_some_days(desk, server, clock):
    desk.ask(ADA, Period.DAILY)
    period, link = link_of(server, desk)
    number, until, nonce, mac = link.split(".")
    forged = [
        f"{int(number) + 1}.{until}.{nonce}.{mac}",
        f"{number}.{int(until) + 9}.{nonce}.{mac}",
        link[:-1],
        "",
        "...",
    ]
    for wrong in [*forged, link + "x", "ä.1.2.3", f"{number}.{until}.{nonce}."]:
        with pytest.raises(BadLink):
            desk.asked(period, wrong)
    for ask in (lambda: desk.asked(Period.WEEKLY, link), lambda: desk.ending(link)):
        with pytest.raises(BadLink, match="not one of ours"):
            ask()
    clock.now += CONFIRM_FOR + timedelta(seconds=2)
    with pytest.raises(BadLink, match="too old"):
        desk.confirm(period, link)
    desk.ask("bob@example.org", Period.DAILY)
    assert desk.store.query(sa.select(subscriptions.c.address)) == [
        ("bob@example.org",)
    ]  # who never answered is forgotten


def test_ending_forgets_the_address_and_what_is_on_its_way(desk, server, clock):
    desk.ask(ADA, Period.DAILY)
    subscription = desk.confirm(*link_of(server, desk))
    desk.ask(ADA, Period.WEEKLY, "solvers")
    link = desk.end_link(subscription, clock.now).rpartition("/")[2]
    desk.end(link)
    desk.end(link)
    assert desk.ending(link) is None
    assert desk.active() == []
    assert desk.store.query(sa.select(subscriptions.c.wing)) == [("solvers",)]
    clock.now += END_FOR + timedelta(seconds=2)
    with pytest.raises(BadLink, match="too old"):
        desk.end(link)


def test_an_old_link_does_not_end_somebody_elses_subscription(desk, server, clock):
    """Databases give a number again."""
    desk.ask(ADA, Period.DAILY)
    first = desk.confirm(*link_of(server, desk))
    link = desk.end_link(first, clock.now).rpartition("/")[2]
    desk.end(link)
    desk.ask("bob@example.org", Period.DAILY)
    second = desk.confirm(*link_of(server, desk))
    assert second.id == first.id
    desk.end(link)
    assert desk.active() == [second]


def test_a_stranger_who_asks_again_changes_nothing(desk, server, clock):
    desk.ask(ADA, Period.DAILY)
    subscription = desk.confirm(*link_of(server, desk))
    clock.now += ASK_AGAIN
    desk.ask(ADA, Period.DAILY)
    desk.ask(ADA, Period.WEEKLY)
    desk.ask(ADA, Period.WEEKLY)
    assert desk.active() == [subscription]
    link = link_of(server, desk)
    assert len(server.letters()) == 2
    assert desk.confirm(*link).period is Period.WEEKLY


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ada",
        "ada@localhost",
        "@example.org",
        "ada@example..org",
        "ada@-example.org",
        "ada@example.org\nBcc: bob@example.org",
        "ada@example.org\r\nRCPT TO:<bob@example.org>",
        "ada@exa\nmple.org",
        "ada@example.org, bob@example.org",
        "Ada <ada@example.org>",
        '"ada lovelace"@example.org',
        "ada@example.org\x00",
        "ädå@example.org",
        "a" * 65 + "@example.org",
        "ada@" + ".".join(["a" * 60] * 5),
        "ada@[127.0.0.1]",
        ".ada@example.org",
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(desk, text):
    with pytest.raises(UsageError) as caught:
        desk.ask(text, Period.DAILY)
    assert not text or text not in str(caught.value)
    assert desk.store.query(sa.select(messages.c.id)) == []


def test_a_domain_may_have_accents_and_a_mask_hides_the_name(desk, server):
    desk.ask("ada@müsli.example", Period.DAILY)
    link_of(server, desk)
    assert server.letters()[0].recipient == "ada@xn--msli-0ra.example"
    assert masked(ADA) == "a…@example.org"


def test_weeks_begin_on_monday():
    days = [Period.WEEKLY.key(Clock().now + timedelta(days=d)) for d in range(-1, 8)]
    assert re.fullmatch(r"2026-W01 (2026-W02 ){7}2026-W03", " ".join(days))
