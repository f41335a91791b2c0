"""The tables of the store. Each change here goes with a migration, which a test compares with this."""

import sqlalchemy as sa

metadata = sa.MetaData()

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("slug", sa.String(120), nullable=False),
    sa.Column("scale", sa.String(20), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("outcome", sa.String(20), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("findings", sa.JSON, nullable=False),
    sa.Column("seeds", sa.JSON, nullable=False),
    sa.Column("device", sa.String(40), nullable=False),
    sa.Column("started", sa.String(40), nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("peak_memory_mib", sa.Float, nullable=False),
    sa.Column("versions", sa.JSON, nullable=False),
    sa.Column("code_version", sa.String(80), nullable=False),
    sa.Column("git_revision", sa.String(80), nullable=False),
    sa.Column("machine", sa.JSON, nullable=False),
    sa.Column("log", sa.Text, nullable=False),
    sa.Index("runs_by_paper", "slug", "id"),
    sa.Index("runs_by_start", "started", "slug"),  # covers what trending counts
)
measures = sa.Table(
    "measures",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("method", sa.String(200), nullable=False),
    sa.Column("metric", sa.String(200), nullable=False),
    sa.Column("value", sa.Float),  # NULL is not-a-number: SQLite has no other way to keep one
    sa.Column("seed", sa.BigInteger),
    sa.Column("setting", sa.JSON, nullable=False),
)
figures = sa.Table(
    "figures",
    metadata,
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("caption", sa.Text, nullable=False),
    sa.Column("svg", sa.Text, nullable=False),
    sa.Column("pdf", sa.LargeBinary, nullable=False),
    sa.Column("png", sa.LargeBinary, nullable=False),
)
requests = sa.Table(
    "requests",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("slug", sa.String(120), nullable=False),
    sa.Column("scale", sa.String(20), nullable=False),
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("asked", sa.String(40), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("run_id", sa.Integer, sa.ForeignKey("runs.id", ondelete="SET NULL")),
    sa.Index(  # a paper is asked for once at a time
        "requests_open",
        "slug",
        unique=True,
        sqlite_where=sa.text("state in ('waiting', 'running')"),
        postgresql_where=sa.text("state in ('waiting', 'running')"),
    ),
)

preprints = sa.Table(  # papers fetched from elsewhere
    "preprints",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(40), nullable=False, unique=True),  # arXiv id without version, as it stands in addresses
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("title", sa.Text, nullable=False),
    sa.Column("authors", sa.JSON, nullable=False),
    sa.Column("summary", sa.Text, nullable=False),
    sa.Column("categories", sa.JSON, nullable=False),
    sa.Column("keywords", sa.JSON, nullable=False),
    sa.Column("organisation", sa.String(200), nullable=False),
    sa.Column("remark", sa.Text, nullable=False),
    sa.Column("published", sa.String(40), nullable=False),
    sa.Column("updated", sa.String(40), nullable=False),
    sa.Column("day", sa.String(10), nullable=False),  # under which the feed shows it
    sa.Column("upvotes", sa.Integer, nullable=False),  # at the source
    sa.Column("sources", sa.JSON, nullable=False),
    sa.Column("revision", sa.Integer, nullable=False),  # of the collection, when this row last changed
    sa.Index("preprints_by_revision", "revision"),
)
remembered = sa.Table(  # what a server said of a page that was fetched, to ask only for news the next time
    "remembered",
    metadata,
    sa.Column("address", sa.String(700), primary_key=True),
    sa.Column("etag", sa.String(300), nullable=False),
    sa.Column("modified", sa.String(100), nullable=False),
    sa.Column("entries", sa.Integer, nullable=False),
    sa.Column("checked", sa.String(40), nullable=False),
)
secrets = sa.Table(
    "secrets",
    metadata,
    sa.Column("name", sa.String(40), primary_key=True),
    sa.Column("value", sa.String(100), nullable=False),
)
people = sa.Table(
    "people",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("key", sa.String(200), nullable=False, unique=True),  # how the page knows this person again
    sa.Column("name", sa.String(60), nullable=False),
    sa.Column("since", sa.String(40), nullable=False),
)


def _person() -> sa.Column:
    return sa.Column("person", sa.Integer, sa.ForeignKey("people.id", ondelete="CASCADE"), primary_key=True)


# `paper` in the tables below is a card's slug or a preprint's key

marks = sa.Table(
    "marks",
    metadata,
    _person(),
    sa.Column("paper", sa.String(120), primary_key=True),
    sa.Column("kind", sa.String(10), primary_key=True),  # vote, save, later, read
    sa.Column("made", sa.String(40), nullable=False),
    sa.Index("marks_by_kind", "kind", "paper"),
)
tags = sa.Table(
    "tags",
    metadata,
    _person(),
    sa.Column("paper", sa.String(120), primary_key=True),
    sa.Column("tag", sa.String(40), primary_key=True),
)
notes = sa.Table(
    "notes",
    metadata,
    _person(),
    sa.Column("paper", sa.String(120), primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("changed", sa.String(40), nullable=False),
)
comments = sa.Table(
    "comments",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("paper", sa.String(120), nullable=False),
    sa.Column("person", sa.Integer, sa.ForeignKey("people.id", ondelete="SET NULL")),
    sa.Column("parent", sa.Integer, sa.ForeignKey("comments.id", ondelete="CASCADE")),
    sa.Column("text", sa.Text, nullable=False),
    sa.Column("made", sa.String(40), nullable=False),
    sa.Column("withdrawn", sa.Boolean, nullable=False),
    sa.Index("comments_by_paper", "paper", "id"),
)
views = sa.Table(
    "views",
    metadata,
    sa.Column("paper", sa.String(120), primary_key=True),
    sa.Column("day", sa.String(10), primary_key=True),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Index("views_by_day", "day"),
)

subscriptions = sa.Table(
    "subscriptions",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("address", sa.String(254), nullable=False),
    sa.Column("wing", sa.String(60), nullable=False),  # "" for everything
    sa.Column("period", sa.String(10), nullable=False),  # daily, weekly
    sa.Column("state", sa.String(20), nullable=False),  # pending, active, suppressed
    sa.Column("nonce", sa.String(40), nullable=False),  # links that were signed for another row with this id are void
    sa.Column("asked", sa.String(40), nullable=False),
    sa.Column("confirmed", sa.String(40), nullable=False),
    sa.Column("bounces", sa.Integer, nullable=False),  # in a row
    sa.Column("seen_run", sa.Integer, nullable=False),  # the newest run that a digest has told of
    sa.Column("seen_period", sa.String(20), nullable=False),  # the day or week of the last digest
    sa.UniqueConstraint("address", "wing"),
)
messages = sa.Table(  # mail on its way
    "messages",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("subscription", sa.Integer, sa.ForeignKey("subscriptions.id", ondelete="CASCADE"), nullable=False),
    sa.Column("kind", sa.String(20), nullable=False),  # confirmation, digest
    sa.Column("period", sa.String(40), nullable=False),
    sa.Column("message_id", sa.String(200), nullable=False, unique=True),
    sa.Column("content", sa.Text, nullable=False),  # as it goes over the wire, "" once it went
    sa.Column("state", sa.String(20), nullable=False),
    sa.Column("claim", sa.String(40), nullable=False),  # who is sending it
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("due", sa.String(40), nullable=False),
    sa.Column("changed", sa.String(40), nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.UniqueConstraint("subscription", "kind", "period"),  # no digest twice
    sa.Index("messages_by_state", "state", "due"),
)
