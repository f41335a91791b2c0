"""Mail on its way, kept in the store: each message goes out once, whatever dies in between.

    waiting -> claimed -> sending -> sent
                  |          |-----> refused          the server will never take it
                  |          |-----> uncertain        we died between handing it over and hearing the answer
                  |----------------> bounced          the server knows no such address
                  '----------------> waiting          later, with growing pauses; after the last one: given up

A message is *claimed* by one sender for a while. If that sender dies, the message waits again, since nothing was handed
over. Once it is *sending* the server may have it, and no one can find out: it is not sent again.
"""

import secrets
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from locally.page.mail import Later, MailError, Refused, Session, Settings
from locally.page.schema import messages, subscriptions
from locally.page.store import Store

PAUSES = [timedelta(minutes=m) for m in (1, 5, 15, 60, 240, 720)]  # between attempts
LEASE = timedelta(minutes=15)  # a claim that is older belongs to a sender that died
SUPPRESSED_AFTER = 3  # bounces in a row
LOOK = 60.0  # seconds between looks at the outbox


class Letter(StrEnum):
    """State of a message."""

    WAITING = "waiting"
    CLAIMED = "claimed"
    SENDING = "sending"
    SENT = "sent"
    BOUNCED = "bounced"
    REFUSED = "refused"
    GIVEN_UP = "given up"
    UNCERTAIN = "uncertain"


class State(StrEnum):
    """State of a subscription."""

    PENDING = "pending"
    ACTIVE = "active"
    SUPPRESSED = "suppressed"


@dataclass(frozen=True)
class Claimed:
    """A message that is ours to send."""

    id: int
    claim: str
    subscription: int
    address: str
    content: str
    attempts: int


def new_message_id(sender: str) -> str:
    return f"<{secrets.token_hex(16)}@{sender.partition('@')[2]}>"


def put(
    connection: Connection, subscription: int, kind: str, period: str, message_id: str, content: str, now: datetime
) -> None:
    """Put a message into the outbox, within the transaction of what it tells.

    Raises:
        sqlalchemy.exc.IntegrityError: there is one of this kind for this subscription and period already.
    """
    connection.execute(
        messages.insert().values(
            subscription=subscription,
            kind=kind,
            period=period,
            message_id=message_id,
            content=content,
            state=str(Letter.WAITING),
            claim="",
            attempts=0,
            due=stamp(now),
            changed=stamp(now),
            reason="",
        )
    )


class Outbox:
    """Sends what waits in the store."""

    def __init__(
        self, store: Store, settings: Settings, *, lease: timedelta = LEASE, clock: Callable[[], datetime] | None = None
    ) -> None:
        self.store, self.settings, self.lease = store, settings, lease
        self._clock = clock or (lambda: datetime.now(UTC))

    def deliver(self) -> Counter[str]:
        """Send all that is due, or as far as the server goes with it; how many ended in which state.

        Raises:
            MailError: the server cannot be used as configured. What was not sent waits.
        """
        done: Counter[str] = Counter()
        if lost := self._take_back():
            done[Letter.UNCERTAIN] = lost
        with Session(self.settings) as session:
            while (message := self._claim()) is not None:
                try:
                    done[self._send(session, message)] += 1
                except MailError as error:
                    self._move(message, Letter.WAITING, str(error))
                    raise
                except Later as error:
                    done[self._put_off(message, str(error))] += 1
                    if error.away:
                        break
        return done

    def _send(self, session: Session, message: Claimed) -> Letter:
        try:
            session.offer(message.address)
            if not self._move(message, Letter.SENDING):  # our claim is over, another has it
                session.forget()
                return Letter.CLAIMED
            reply = session.hand_over(message.content)
        except Refused as error:
            end = Letter.BOUNCED if error.bounce else Letter.REFUSED
            self._move(message, end, str(error))
            return end
        self._move(message, Letter.SENT, reply)
        return Letter.SENT

    def _claim(self) -> Claimed | None:
        """The oldest message that is due, marked as ours."""
        claim, now = secrets.token_hex(8), self._clock()
        due = (messages.c.state == str(Letter.WAITING)) & (messages.c.due <= stamp(now))
        oldest = sa.select(sa.func.min(messages.c.id)).where(due).scalar_subquery()
        with self.store.writing() as connection:
            marked = {"state": str(Letter.CLAIMED), "claim": claim, "changed": stamp(now)}
            connection.execute(messages.update().where(messages.c.id == oldest, due).values(marked))
            m, whose = messages.c, subscriptions.c.id == messages.c.subscription
            wanted = sa.select(m.id, m.subscription, subscriptions.c.address, m.content, m.attempts)
            wanted = wanted.select_from(messages.join(subscriptions, whose)).where(m.claim == claim)
            row = connection.execute(wanted).first()
        return None if row is None else Claimed(row[0], claim, row[1], row[2], row[3], row[4])

    def _move(self, message: Claimed, state: Letter, reason: str = "", pause: timedelta | None = None) -> bool:
        """Record what became of a message of ours; False if it is ours no more."""
        now = self._clock()
        values: dict[str, str | int] = {"state": str(state), "reason": reason, "changed": stamp(now)}
        if pause is not None:
            values |= {"due": stamp(now + pause), "attempts": message.attempts + 1}
        if state not in (Letter.WAITING, Letter.SENDING):
            values["content"] = ""  # with the links in it
        with self.store.writing() as connection:
            ours = (messages.c.id == message.id) & (messages.c.claim == message.claim)
            if connection.execute(messages.update().where(ours).values(values)).rowcount == 0:
                return False
            theirs = subscriptions.c.id == message.subscription
            if state is Letter.SENT:
                connection.execute(subscriptions.update().where(theirs).values(bounces=0))
            if state is Letter.BOUNCED:
                connection.execute(subscriptions.update().where(theirs).values(bounces=subscriptions.c.bounces + 1))
                tired = (subscriptions.c.address == message.address) & (subscriptions.c.bounces >= SUPPRESSED_AFTER)
                if connection.execute(sa.select(subscriptions.c.id).where(tired)).first():
                    everywhere = subscriptions.c.address == message.address
                    suppressed = {"state": str(State.SUPPRESSED)}
                    connection.execute(subscriptions.update().where(everywhere).values(suppressed))
        return True

    def _put_off(self, message: Claimed, reason: str) -> Letter:
        if message.attempts >= len(PAUSES):
            self._move(message, Letter.GIVEN_UP, reason)
            return Letter.GIVEN_UP
        self._move(message, Letter.WAITING, reason, PAUSES[message.attempts])
        return Letter.WAITING

    def _take_back(self) -> int:
        """Let messages wait again that a dead sender had claimed; how many it may or may not have sent."""
        now = self._clock()
        old = messages.c.changed <= stamp(now - self.lease)
        claimed, sending = (messages.c.state == str(s) for s in (Letter.CLAIMED, Letter.SENDING))
        with self.store.writing() as connection:
            again = {"state": str(Letter.WAITING), "claim": "", "changed": stamp(now)}
            connection.execute(messages.update().where(claimed & old).values(again))
            lost = {"state": str(Letter.UNCERTAIN), "claim": "", "content": "", "changed": stamp(now)}
            return connection.execute(messages.update().where(sending & old).values(lost)).rowcount


class Postman(threading.Thread):
    """Delivers while the page is served: at once when there is news, and what had to wait when its time has come."""

    def __init__(self, store: Store, settings: Settings) -> None:
        super().__init__(daemon=True, name="postman")
        self.outbox = Outbox(store, settings)
        self._news, self._closing = threading.Event(), False

    def ring(self) -> None:
        self._news.set()

    def close(self) -> None:
        self._closing = True
        self._news.set()
        self.join(timeout=self.outbox.settings.timeout)

    def run(self) -> None:
        said = ""
        while not self._closing:
            try:
                self.outbox.deliver()
            except MailError as error:
                if str(error) != said:
                    said = str(error)
                    print(f"locally: {said}", file=sys.stderr, flush=True)
            except Exception:
                traceback.print_exc()
            self._news.wait(timeout=LOOK)
            self._news.clear()


def stamp(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="milliseconds")
