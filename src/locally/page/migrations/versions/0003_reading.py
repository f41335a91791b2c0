"""Papers fetched from elsewhere, and what people do with papers: marks, tags, notes, comments, views."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "preprints",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(40), nullable=False, unique=True),
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
        sa.Column("day", sa.String(10), nullable=False),
        sa.Column("upvotes", sa.Integer, nullable=False),
        sa.Column("sources", sa.JSON, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
    )
    op.create_index("preprints_by_revision", "preprints", ["revision"])
    op.create_table(
        "remembered",
        sa.Column("address", sa.String(700), primary_key=True),
        sa.Column("etag", sa.String(300), nullable=False),
        sa.Column("modified", sa.String(100), nullable=False),
        sa.Column("entries", sa.Integer, nullable=False),
        sa.Column("checked", sa.String(40), nullable=False),
    )
    op.create_table(
        "secrets",
        sa.Column("name", sa.String(40), primary_key=True),
        sa.Column("value", sa.String(100), nullable=False),
    )
    op.create_table(
        "people",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("key", sa.String(200), nullable=False, unique=True),
        sa.Column("name", sa.String(60), nullable=False),
        sa.Column("since", sa.String(40), nullable=False),
    )
    person = lambda: sa.Column("person", sa.Integer, sa.ForeignKey("people.id", ondelete="CASCADE"), primary_key=True)
    op.create_table(
        "marks",
        person(),
        sa.Column("paper", sa.String(120), primary_key=True),
        sa.Column("kind", sa.String(10), primary_key=True),
        sa.Column("made", sa.String(40), nullable=False),
    )
    op.create_index("marks_by_kind", "marks", ["kind", "paper"])
    op.create_table(
        "tags",
        person(),
        sa.Column("paper", sa.String(120), primary_key=True),
        sa.Column("tag", sa.String(40), primary_key=True),
    )
    op.create_table(
        "notes",
        person(),
        sa.Column("paper", sa.String(120), primary_key=True),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("changed", sa.String(40), nullable=False),
    )
    op.create_table(
        "comments",
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("paper", sa.String(120), nullable=False),
        sa.Column("person", sa.Integer, sa.ForeignKey("people.id", ondelete="SET NULL")),
        sa.Column("parent", sa.Integer, sa.ForeignKey("comments.id", ondelete="CASCADE")),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("made", sa.String(40), nullable=False),
        sa.Column("withdrawn", sa.Boolean, nullable=False),
    )
    op.create_index("comments_by_paper", "comments", ["paper", "id"])
    op.create_table(
        "views",
        sa.Column("paper", sa.String(120), primary_key=True),
        sa.Column("day", sa.String(10), primary_key=True),
        sa.Column("count", sa.Integer, nullable=False),
    )
    op.create_index("views_by_day", "views", ["day"])
    op.create_index("runs_by_start", "runs", ["started", "slug"])


def downgrade() -> None:
    op.drop_index("runs_by_start", "runs")
    for table in ("views", "comments", "notes", "tags", "marks", "people", "secrets", "remembered", "preprints"):
        op.drop_table(table)
