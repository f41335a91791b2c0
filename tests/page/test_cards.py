"""The catalogue is read again when something in it has changed, and only then."""

import os

from locally import catalogue
from locally.page import cards
from tests.page.conftest import CARD, GOOD


def slugs() -> set[str]:
    return {p.slug for p in cards.load()}


def test_what_comes_goes_or_changes_is_seen_at_once(add_paper):
    card = add_paper("first", None)
    assert "first" in slugs()
    assert not next(p for p in cards.load() if p.slug == "first").runnable
    card.with_suffix(".py").write_text(GOOD)
    assert next(p for p in cards.load() if p.slug == "first").runnable
    card.write_text(CARD.format(number=901, slug="first", title="Another title"))
    assert next(p for p in cards.load() if p.slug == "first").title == "Another title"
    add_paper("second")
    assert {"first", "second"} <= slugs()
    os.remove(card)
    assert "first" not in slugs()
    assert cards.load() == catalogue.load()


def test_what_has_not_changed_is_not_read_again(add_paper, monkeypatch):
    add_paper("first")
    before = cards.load()
    monkeypatch.setattr(catalogue, "load", lambda: 1 / 0)
    assert cards.load() is before
