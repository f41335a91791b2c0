"""What people say about papers: comments and answers to them, written in Markdown and shown without its dangers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

from locally.errors import UsageError
from locally.page.people import Person, now
from locally.page.schema import comments, people
from locally.page.store import KEYS, Store

_SAID = (
    sa.select(*comments.c[("id", "person", "parent", "text", "made", "withdrawn")], people.c.name)
    .select_from(comments.outerjoin(people, people.c.id == comments.c.person))
    .where(comments.c.paper.in_(KEYS))
    .order_by(comments.c.id)
)
_COUNTED = (
    sa.select(comments.c.paper, sa.func.count())
    .where(comments.c.withdrawn.is_(False), comments.c.paper.in_(KEYS))
    .group_by(comments.c.paper)
)
LENGTH = 10_000  # characters of a comment
DEPTH = 4  # answers stand no deeper; what answers them stands beside them


@dataclass(frozen=True)
class Comment:
    """One comment in its thread, `depth` answers below the first; `text` is empty where it was withdrawn."""

    id: int
    person: int | None
    name: str
    text: str
    made: str
    withdrawn: bool
    depth: int

    @property
    def html(self) -> Markup:
        return markdown(self.text)


class Discussion:
    def __init__(self, store: Store) -> None:
        self.store = store

    def say(self, person: Person, paper: str, text: str, parent: int | None = None) -> int:
        """Add a comment, or an answer to one of the same paper; its id.

        Raises:
            UsageError: it is empty or too long, or what it answers is not there.
        """
        text = text.replace("\x00", "").replace("\r\n", "\n").strip()
        if not text:
            raise UsageError("a comment needs words")
        if len(text) > LENGTH:
            raise UsageError(f"a comment has {LENGTH} characters at most, this one {len(text)}")
        with self.store.writing() as connection:
            if parent is not None:
                about = connection.scalar(sa.select(comments.c.paper).where(comments.c.id == parent))
                if about != paper:
                    raise UsageError(f"there is no comment {parent} to answer")
            values = {"paper": paper, "person": person.id, "parent": parent, "text": text, "made": now()}
            inserted = connection.execute(comments.insert().values(values | {"withdrawn": False})).inserted_primary_key
            assert inserted is not None
            return int(inserted[0])

    def withdraw(self, person: Person, number: int) -> str | None:
        """Take back one's own comment, which leaves its place to the answers; the paper it was about, or None."""
        own = (comments.c.id == number) & (comments.c.person == person.id)
        with self.store.writing() as connection:
            paper = connection.scalar(sa.select(comments.c.paper).where(own))
            if paper is not None:
                connection.execute(comments.update().where(own).values(text="", withdrawn=True))
            return paper

    def about(self, paper: str) -> list[Comment]:
        """All threads in the order in which they are read: each comment, then its answers, oldest first."""
        below: dict[int | None, list[Any]] = defaultdict(list)
        for row in self.store.query_in(_SAID, [paper]):
            below[row.parent].append(row)
        threads: list[Comment] = []
        waiting = [(row, 0) for row in reversed(below[None])]
        while waiting:
            (number, person, _, text, made, withdrawn, name), depth = waiting.pop()
            shown = name or (f"reader {person}" if person else "somebody")
            threads.append(Comment(number, person, shown, text, made, bool(withdrawn), min(depth, DEPTH)))
            waiting += [(row, depth + 1) for row in reversed(below[number])]
        return threads

    def counts(self, papers: Sequence[str]) -> dict[str, int]:
        return dict(map(tuple, self.store.query_in(_COUNTED, papers)))


def _link_opened(self: Any, tokens: Sequence[Token], at: int, options: Any, env: Any) -> str:
    tokens[at].attrSet("rel", "nofollow noopener noreferrer ugc")
    return self.renderToken(tokens, at, options, env)


# HTML is shown as text; pictures would fetch from elsewhere and headings would break the page's outline
_MARKDOWN = MarkdownIt("commonmark", {"html": False}).disable(["image", "heading", "lheading"])
_MARKDOWN.add_render_rule("link_open", _link_opened)


def markdown(text: str) -> Markup:
    """Markdown as HTML that is safe to show, whoever wrote it.

    >>> markdown("*yes* <b>no</b> [go](javascript:alert(1))")
    Markup('<p><em>yes</em> &lt;b&gt;no&lt;/b&gt; [go](javascript:alert(1))</p>\\n')
    """
    return Markup(_MARKDOWN.render(text))
