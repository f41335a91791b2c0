"""What the digest tells: verdicts that changed since the last one, and the papers that are trending."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from locally.evidence import Paper, Status
from locally.page import mail
from locally.page.mail import Settings
from locally.page.outbox import State, new_message_id, put
from locally.page.people import Kind
from locally.page.preprints import Preprints
from locally.page.report import templates
from locally.page.schema import marks, runs, subscriptions, views
from locally.page.store import Store
from locally.page.subscriptions import Subscription, Subscriptions
from locally.page.trending import scores

TRENDING = 5  # papers that a digest names


@dataclass(frozen=True)
class Change:
    """A paper whose verdict is another than before, or the first."""

    paper: Paper
    before: str  # "" for the first
    after: str
    reason: str
    scale: str


@dataclass(frozen=True)
class Trend:
    """A paper that people turn to."""

    title: str
    path: str  # of its page, below the page's address
    authors: str


@dataclass(frozen=True)
class Digest:
    subject: str
    text: str
    html: str
    unsubscribe: str
    seen_run: int


class Digests:
    """Writes digests for those whose day or week has not had one, and leaves them in the outbox.

    Args:
        store: with the runs and the subscriptions.
        settings: whom mail comes from, and where its links lead.
        papers: the catalogue.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        papers: Sequence[Paper],
        *,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.store, self.settings, self.papers = store, settings, papers
        self.subscriptions = Subscriptions(store, settings, clock=clock)
        self._clock = clock or (lambda: datetime.now(UTC))
        self._templates = templates()

    def due(self) -> list[Subscription]:
        now = self._clock()
        return [s for s in self.subscriptions.active() if s.seen_period != s.period.key(now)]

    def write(self, subscription: Subscription) -> Digest | None:
        """The digest for one subscription; None if there is nothing to tell."""
        papers = [p for p in self.papers if not subscription.wing or p.wing == subscription.wing]
        seen = self.store.query(sa.select(sa.func.max(runs.c.id)))[0][0] or 0
        changed = changes(self.store, papers, subscription.seen_run, seen)
        now = self._clock()
        since = (now - subscription.period.length).date()
        trends = trending(self.store, papers, since, now.date(), fetched=not subscription.wing)
        if not changed and not trends:
            return None
        unsubscribe = self.subscriptions.end_link(subscription, now)
        values: dict[str, Any] = {
            "changed": changed,
            "trends": trends,
            "period": subscription.period,
            "wing": subscription.wing,
            "page": self.settings.base,
            "unsubscribe": unsubscribe,
        }
        text, html = (self._templates.get_template(f"mail/digest.{kind}").render(values) for kind in ("txt", "html"))
        return Digest(_subject(subscription, changed, trends), text, html, unsubscribe, seen)

    def queue(self) -> int:
        """Leave a digest in the outbox for everybody who is due one; how many.

        The digest and the news that this period has had it are written in one transaction: another process, or this
        one after a crash, does not write it again.
        """
        return sum(self._queue(subscription) for subscription in self.due())

    def _queue(self, subscription: Subscription) -> bool:
        now, digest = self._clock(), self.write(subscription)
        period = subscription.period.key(now)
        s = subscriptions.c
        as_before = (s.id == subscription.id) & (s.state == str(State.ACTIVE))
        as_before &= s.seen_period == subscription.seen_period
        values: dict[str, str | int] = {"seen_period": period}
        if digest is not None:
            values["seen_run"] = digest.seen_run
        try:
            with self.store.writing() as connection:
                if connection.execute(subscriptions.update().where(as_before).values(values)).rowcount == 0:
                    return False  # another was faster, or it has just ended
                if digest is None:
                    return False
                message_id = new_message_id(self.settings.sender)
                content = mail.compose(
                    self.settings.sender,
                    subscription.address,
                    digest.subject,
                    digest.text,
                    digest.html,
                    message_id=message_id,
                    when=now,
                    unsubscribe=digest.unsubscribe,
                )
                put(connection, subscription.id, "digest", period, message_id, content, now)
        except IntegrityError:
            return False  # this period had one, of another rhythm before it was changed
        return True


def changes(store: Store, papers: Sequence[Paper], since: int, until: int) -> list[Change]:
    """Papers whose last finished run up to `until` ended otherwise than the last one up to `since` (run ids)."""
    finished = runs.c.status == str(Status.FINISHED)
    newest = sa.select(sa.func.max(runs.c.id)).where(finished).group_by(runs.c.slug)
    columns = (runs.c.slug, runs.c.outcome, runs.c.reason, runs.c.scale)
    last = lambda where: {row[0]: row for row in store.query(sa.select(*columns).where(runs.c.id.in_(where)))}
    now = last(newest.where(runs.c.id > since, runs.c.id <= until))
    before = last(newest.where(runs.c.id <= since, runs.c.slug.in_(list(now))))
    return [
        Change(p, before[p.slug][1] if p.slug in before else "", *now[p.slug][1:])
        for p in papers
        if p.slug in now and (p.slug not in before or before[p.slug][1] != now[p.slug][1])
    ]


def trending(store: Store, papers: Sequence[Paper], since: date, on: date, *, fetched: bool) -> list[Trend]:
    """The first by trending score of those that somebody turned to on or after a day; with fetched papers if asked."""
    scored, lately = scores(store, on), _turned_to(store, since)
    keys = [key for key in sorted(scored, key=lambda key: (-scored[key], key)) if key in lately]
    cards = {p.slug: p for p in papers}
    preprints = Preprints(store).many([key for key in keys if key not in cards][: 10 * TRENDING]) if fetched else {}
    found = []
    for key in keys:
        paper = cards.get(key) or preprints.get(key)
        if paper is not None:
            names = ", ".join(paper.authors[:3]) + (" and others" if len(paper.authors) > 3 else "")
            found.append(Trend(paper.title, f"papers/{key}", names))
    return found[:TRENDING]


def _turned_to(store: Store, since: date) -> set[str]:
    """Papers that were viewed, saved or run on or after a day."""
    day = since.isoformat()
    viewed = sa.select(views.c.paper).where(views.c.day >= day)
    saved = sa.select(marks.c.paper).where(marks.c.kind == str(Kind.SAVE), marks.c.made >= day)
    ran = sa.select(runs.c.slug).where(runs.c.started >= day)
    return {row[0] for wanted in (viewed, saved, ran) for row in store.query(wanted.distinct())}


def _subject(subscription: Subscription, changed: Sequence[Change], trends: Sequence[Trend]) -> str:
    """No words of a paper: what it says of itself does not belong into a header."""
    parts = []
    if changed:
        parts.append(f"{len(changed)} verdict{'s' * (len(changed) > 1)} changed")
    if trends:
        parts.append(f"{len(trends)} paper{'s' * (len(trends) > 1)} trending")
    about = f" ({subscription.wing})" if subscription.wing else ""
    return f"Locally{about}: {', '.join(parts)}"
