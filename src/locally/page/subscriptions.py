"""Who wants the digest: asked for, confirmed from the mailbox itself, ended with one click.

Whether an address is known is nobody's business but its owner's: asking looks the same for a new address, a confirmed
one and one that mail does not reach.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from locally.page import mail
from locally.page.links import BadLink, signer
from locally.page.mail import Settings
from locally.page.outbox import State, new_message_id, put, stamp
from locally.page.report import templates
from locally.page.schema import runs, subscriptions
from locally.page.store import Store

CONFIRM, END = "confirm", "end"  # purposes of links
CONFIRM_FOR = timedelta(days=2)
END_FOR = timedelta(days=120)
ASK_AGAIN = timedelta(minutes=5)  # before an address is written to again


class Period(StrEnum):
    DAILY = "daily"
    WEEKLY = "weekly"

    @property
    def length(self) -> timedelta:
        return timedelta(days=1 if self is Period.DAILY else 7)

    def key(self, when: datetime) -> str:
        """The day or week in UTC, of which each has one digest.

        >>> Period.DAILY.key(datetime(2026, 1, 2, tzinfo=UTC)), Period.WEEKLY.key(datetime(2026, 1, 2, tzinfo=UTC))
        ('2026-01-02', '2026-W01')
        """
        day = when.astimezone(UTC)
        return day.strftime("%Y-%m-%d") if self is Period.DAILY else day.strftime("%G-W%V")


@dataclass(frozen=True)
class Subscription:
    id: int
    address: str
    wing: str  # "" for everything
    period: Period
    state: State
    nonce: str
    seen_run: int
    seen_period: str


class Subscriptions:
    """Subscriptions kept in the store; what they cause to be written goes into the outbox."""

    def __init__(self, store: Store, settings: Settings, *, clock: Callable[[], datetime] | None = None) -> None:
        self.store, self.settings = store, settings
        self.signer = signer(store)
        self._clock = clock or (lambda: datetime.now(UTC))
        self._templates = templates()

    def ask(self, address: str, period: Period, wing: str = "", *, anew: bool = False) -> None:
        """Write to this address to ask whether it wants the digest. A subscription that it has stays until it says yes.

        Args:
            address: as somebody typed it.
            wing: which papers, "" for all.
            anew: also to an address that mail did not reach lately or that was just written to; for those who know.

        Raises:
            UsageError: it is not an address.
        """
        address, now = mail.address(address), self._clock()
        s = subscriptions.c
        with self.store.writing() as connection:
            unanswered = (s.state == str(State.PENDING)) & (s.asked < stamp(now - CONFIRM_FOR))
            connection.execute(subscriptions.delete().where(unanswered))  # we keep no address that did not say yes
            theirs = connection.execute(sa.select(subscriptions).where(s.address == address)).mappings().all()
            row = next((r for r in theirs if r["wing"] == wing), None)
            if not anew:
                unreachable = any(r["state"] == State.SUPPRESSED for r in theirs)
                if unreachable or (row is not None and row["asked"] > stamp(now - ASK_AGAIN)):
                    return
            if row is not None and row["state"] == State.ACTIVE and row["period"] == period:
                return
            if row is None:
                nonce = secrets.token_urlsafe(9)
                values: dict[str, str | int] = {"address": address, "wing": wing, "period": str(period)}
                values |= {"state": str(State.PENDING), "nonce": nonce, "asked": stamp(now), "confirmed": ""}
                values |= {"bounces": 0, "seen_run": 0, "seen_period": ""}
                made = connection.execute(subscriptions.insert().values(values))
                assert made.inserted_primary_key is not None
                number = int(made.inserted_primary_key[0])
            else:
                number, nonce = row["id"], row["nonce"]
                state = State.ACTIVE if row["state"] == State.ACTIVE else State.PENDING
                asked = {"asked": stamp(now), "state": str(state)}
                connection.execute(subscriptions.update().where(s.id == number).values(asked))
            self._write(connection, number, nonce, address, period, wing, now)

    def asked(self, period: Period, link: str) -> Subscription:
        """Whom a link to confirm was sent to.

        Raises:
            BadLink: nobody, or it is too old.
        """
        found = self._read(f"{CONFIRM} {period}", link)
        if found is None or found.state is State.SUPPRESSED:
            raise BadLink("this link is no longer good")
        return found

    def confirm(self, period: Period, link: str) -> Subscription:
        """The owner of the mailbox says yes; saying it twice does no harm.

        Raises:
            BadLink: the link is too old, or nothing is to be confirmed any more.
        """
        found, now = self.asked(period, link), self._clock()
        values: dict[str, Any] = {"state": str(State.ACTIVE), "period": str(period)}
        with self.store.writing() as connection:
            if found.state is State.PENDING:
                before = sa.select(sa.func.max(runs.c.id)).where(runs.c.started < stamp(now - period.length))
                values |= {"confirmed": stamp(now), "bounces": 0, "seen_run": connection.scalar(before) or 0}
            connection.execute(subscriptions.update().where(subscriptions.c.id == found.id).values(values))
        return self.asked(period, link)

    def ending(self, link: str) -> Subscription | None:
        """Whom a link to unsubscribe was sent to; None if that has ended.

        Raises:
            BadLink: the link is not ours, or too old.
        """
        return self._read(END, link)

    def end(self, link: str) -> None:
        """No more mail, nor what is on its way, and the address is forgotten. Saying it twice does no harm.

        Raises:
            BadLink: the link is not ours, or too old.
        """
        found = self.ending(link)
        if found is not None and found.state is not State.SUPPRESSED:
            with self.store.writing() as connection:
                connection.execute(subscriptions.delete().where(subscriptions.c.id == found.id))

    def _read(self, purpose: str, link: str) -> Subscription | None:
        number, nonce = self.signer.read(purpose, link, now=self._clock().timestamp())
        return next(iter(self._select((subscriptions.c.id == number) & (subscriptions.c.nonce == nonce))), None)

    def active(self) -> list[Subscription]:
        return self._select(subscriptions.c.state == str(State.ACTIVE))

    def end_link(self, subscription: Subscription, now: datetime) -> str:
        """The address that ends a subscription with one click."""
        link = self.signer.sign(END, subscription.id, subscription.nonce, until=(now + END_FOR).timestamp())
        return f"{self.settings.base}subscriptions/{END}/{link}"

    def _select(self, where: Any) -> list[Subscription]:
        s = subscriptions.c
        columns = (s.id, s.address, s.wing, s.period, s.state, s.nonce, s.seen_run, s.seen_period)
        return [
            Subscription(i, address, wing, Period(period), State(state), *rest)
            for i, address, wing, period, state, *rest in self.store.query(
                sa.select(*columns).where(where).order_by("id")
            )
        ]

    def _write(
        self, connection: Connection, number: int, nonce: str, address: str, period: Period, wing: str, now: datetime
    ) -> None:
        link = self.signer.sign(f"{CONFIRM} {period}", number, nonce, until=(now + CONFIRM_FOR).timestamp())
        values = {
            "link": f"{self.settings.base}subscriptions/{CONFIRM}/{period}/{link}",
            "period": period,
            "wing": wing,
            "page": self.settings.base,
            "hours": int(CONFIRM_FOR.total_seconds()) // 3600,
        }
        message_id = new_message_id(self.settings.sender)
        content = mail.compose(
            self.settings.sender,
            address,
            "Confirm your subscription to Locally",
            self._templates.get_template("mail/confirm.txt").render(values),
            self._templates.get_template("mail/confirm.html").render(values),
            message_id=message_id,
            when=now,
        )
        put(connection, number, "confirmation", secrets.token_urlsafe(9), message_id, content, now)
