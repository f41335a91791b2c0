"""The feed is valid to an independent reader, whatever papers say of themselves."""

from dataclasses import replace
from xml.etree.ElementTree import fromstring

import feedparser
from hypothesis import given
from hypothesis import strategies as st

from locally import catalogue
from locally.evidence import Scale, Status
from locally.page.feed import ATOM, ENTRIES, UNSPEAKABLE, atom, entity_tag
from locally.page.glance import LastRun
from locally.page.preprints import Preprint

BASE = "https://locally.example/"
PAPER = next(p for p in catalogue.load([catalogue.BUILT_IN]) if p.arxiv)


def ran(slug: str, started: str = "2026-01-02T03:04:05+00:00", reason: str = "so it is") -> LastRun:
    return LastRun(slug, Scale.QUICK, Status.FINISHED, "holds", reason, started)


def test_every_paper_that_ran_newest_first():
    papers = catalogue.load([catalogue.BUILT_IN])
    last = {p.slug: ran(p.slug, f"2026-01-{1 + i:02d}T00:00:00+00:00") for i, p in enumerate(papers[:20])}
    feed = feedparser.parse(atom(papers, last, BASE))
    assert not feed.bozo
    assert feed.version == "atom10"
    assert [e.link for e in feed.entries] == [f"{BASE}papers/{p.slug}" for p in reversed(papers[:20])]
    assert len({e.id for e in feed.entries}) == 20
    first = papers[19]
    entry = feed.entries[0]
    assert entry.title == f"holds: {first.title}"
    assert [a.name for a in entry.authors] == list(first.authors)
    assert {tag.term for tag in entry.tags} == {first.wing, "holds"}
    assert feed.feed.updated == entry.updated == "2026-01-20T00:00:00+00:00"


def test_a_wing_has_a_feed_of_its_own_and_an_empty_one_is_valid():
    feeds = {wing: feedparser.parse(atom([PAPER], {}, BASE, wing)) for wing in ("", "a & b")}
    assert [f.bozo for f in feeds.values()] == [False, False]
    assert [f.entries for f in feeds.values()] == [[], []]
    assert feeds[""].feed.id != feeds["a & b"].feed.id
    links = {link.rel: link.href for link in feeds["a & b"].feed.links}
    assert links == {"self": f"{BASE}feed.atom?wing=a+%26+b", "alternate": f"{BASE}?wing=a+%26+b"}


def test_a_long_history_is_cut():
    papers = [replace(PAPER, slug=f"paper-{i}") for i in range(ENTRIES + 5)]
    feed = feedparser.parse(atom(papers, {p.slug: ran(p.slug) for p in papers}, BASE))
    assert len(feed.entries) == ENTRIES


def test_entries_keep_their_names_and_the_tag_tells_news():
    one, two = (atom([PAPER], {PAPER.slug: ran(PAPER.slug)}, base) for base in (BASE, "http://127.0.0.1:8031/"))
    names = [feedparser.parse(body).entries[0].id for body in (one, two)]
    assert names[0] == names[1]
    assert names[0].startswith("urn:uuid:")
    again = atom([PAPER], {PAPER.slug: ran(PAPER.slug)}, BASE)
    assert entity_tag(again) == entity_tag(one) != entity_tag(two)


@given(st.text(st.characters(), max_size=60), st.text(max_size=30))
def test_hostile_words_come_through_as_words(title, reason):
    paper = replace(PAPER, title=f"x{title}x", authors=(f"a{reason}",))
    body = atom([paper], {paper.slug: ran(paper.slug, reason=reason)}, BASE)
    read = feedparser.parse(body)
    assert not read.bozo
    assert len(read.entries) == 1
    assert fromstring(body).findtext(f"{{{ATOM}}}entry/{{{ATOM}}}title") == UNSPEAKABLE.sub("", f"holds: x{title}x")


class TestFetched:
    def preprint(self, number: int, updated: str, **other) -> Preprint:
        title = f"Paper {number}"
        return Preprint(f"2601.{number:05d}", title, ("Ada",), "Words.", updated, updated, updated[:10], **other)

    def test_they_stand_among_the_verdicts_newest_first(self):
        old, new = "2026-01-01T00:00:00+00:00", "2026-01-03T00:00:00+00:00"
        fetched = [self.preprint(1, old, categories=("cs.LG", "math.OC")), self.preprint(2, new)]
        feed = feedparser.parse(atom([PAPER], {PAPER.slug: ran(PAPER.slug)}, BASE, fetched=fetched))
        assert not feed.bozo
        assert [e.title for e in feed.entries] == ["Paper 2", f"holds: {PAPER.title}", "Paper 1"]
        assert feed.entries[0].link == f"{BASE}papers/2601.00002"
        assert {tag.term for tag in feed.entries[2].tags} == {"cs.LG", "math.OC"}
        assert feed.feed.updated == new

    def test_many_do_not_push_verdicts_out(self):
        fetched = [self.preprint(i, "2026-06-01T00:00:00+00:00") for i in range(ENTRIES + 9)]
        feed = feedparser.parse(atom([PAPER], {PAPER.slug: ran(PAPER.slug)}, BASE, fetched=fetched))
        assert len(feed.entries) == ENTRIES + 1
        assert feed.entries[-1].title == f"holds: {PAPER.title}"

    def test_another_version_is_news_of_the_same_entry(self):
        one, two = (self.preprint(1, f"2026-01-0{day}T00:00:00+00:00", version=day) for day in (1, 2))
        entries = [feedparser.parse(atom([], {}, BASE, fetched=[p])).entries[0] for p in (one, two)]
        assert entries[0].id == entries[1].id
        assert entries[0].updated < entries[1].updated
