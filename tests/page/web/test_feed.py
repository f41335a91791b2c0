"""The feed: what the address asks for is what the page shows, in that order, and what a paper says stays text."""

import re
from dataclasses import replace

import pytest

from locally import catalogue
from locally.page import trending
from locally.page.preprints import Preprints
from locally.page.store import Store
from locally.page.web import feed
from tests.page.web.conftest import LOOM, ORGAN

JSON = {"accept": "application/json"}
CARDS = 32  # those of the catalogue and one of the test's


class TestWhatIsShown:
    def test_fetched_papers_follow_those_that_run(self, browser):
        titles = browser.titles()
        assert len(titles) == CARDS + 2
        assert titles[-2:] == [LOOM.key, ORGAN.key]
        assert browser.titles(verdict="to read") == [LOOM.key, ORGAN.key]
        assert browser.titles(order="newest")[0] == LOOM.key
        assert LOOM.key not in browser.titles(wing="privacy")

    def test_a_line_tells_what_there_is_to_tell_and_nothing_runs(self, browser):
        page = browser.get("/", params={"q": "loom"}).text
        for words in ("Ada Lovelace, Charles Babbage, Mary Somerville and others", "math.OC", "2026-03-03",
                      "42 upvotes elsewhere", "0 comments", "&lt;img src=x", "&lt;script&gt;alert"):  # fmt: skip
            assert words in page
        assert "<img" not in page
        assert "<script>" not in page

    def test_a_fetched_paper_that_is_a_card_too_is_shown_once(self, browser):
        card = next(p for p in catalogue.load() if p.arxiv)
        Preprints(Store()).add([replace(LOOM, key=card.arxiv, title="The card again")])
        assert card.arxiv not in browser.titles(order="newest")
        assert card.arxiv not in browser.titles(q="the card again")
        answer = browser.get(f"/papers/{card.arxiv}", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (307, f"/papers/{card.slug}")

    def test_pages(self, browser, monkeypatch):
        monkeypatch.setattr(feed, "PAGE", 10)
        first, last = browser.titles(order="newest"), browser.titles(order="newest", page=4)
        assert (len(first), len(last)) == (10, CARDS + 2 - 30)
        page = browser.get("/", params={"order": "newest", "page": 2}).text
        assert f"Page 2 of 4, {CARDS + 2} papers" in page
        assert 'href="/?order=newest"' in page
        assert 'href="/?order=newest&amp;page=3"' in page
        assert browser.titles(page=99) == []

    @pytest.mark.parametrize(
        "params",
        [{"order": "best"}, {"period": "year"}, {"day": "2026-02-30"}, {"day": "0001-01-01"}, {"mine": "x"},
         {"page": 0}, {"page": "two"}, {"page": 10**30}, {"tags": "(a"}],
    )  # fmt: skip
    def test_what_cannot_be_asked_is_told(self, browser, params):
        answer = browser.get("/", params=params)
        assert answer.status_code == 422
        assert "That did not work" in answer.text
        assert browser.get("/", params=params, headers=JSON).json()["error"]


class TestDates:
    def test_day_week_and_month(self, browser):
        assert browser.titles(period="day", day="2026-03-03") == [LOOM.key]
        assert browser.titles(period="day", day="2026-03-01") == []  # it was featured on the third
        assert browser.titles(period="week", day="2026-03-08") == [LOOM.key]
        assert browser.titles(period="month", day="2026-02-01") == [ORGAN.key]

    def test_without_a_day_the_newest_is_shown(self, browser):
        assert browser.titles(period="day") == [LOOM.key]

    def test_one_goes_on_to_the_days_beside(self, browser):
        page = browser.get("/", params={"period": "month", "day": "2026-03-03", "order": "newest"}).text
        assert "March 2026" in page
        before, after = re.findall(r'<a href="([^"]+)" rel="(?:prev|next)" aria-label="The month', page)
        assert before == "/?order=newest&amp;period=month&amp;day=2026-02-28"
        assert after == "/?order=newest&amp;period=month&amp;day=2026-04-01"
        assert "Week 10, 2 March to 8 March 2026" in browser.get("/?period=week&day=2026-03-03").text


class TestOrders:
    def test_most_votes_then_upvotes_elsewhere(self, browser):
        browser.fill("/papers/good/marks", mark="vote")
        assert browser.titles(order="top")[:2] == ["good", LOOM.key]

    def test_trending_says_how_it_is_counted(self, browser, monkeypatch):
        monkeypatch.setattr(trending, "FRESH", 0.0)
        browser.get(f"/papers/{ORGAN.key}")
        page = browser.get("/?order=trending").text
        assert "weight × 2^(−age in days / 3)" in page
        assert browser.titles(order="trending")[0] == ORGAN.key
        browser.fill("/papers/loop/marks", mark="save")
        assert browser.titles(order="trending")[:2] == ["loop", ORGAN.key]

    def test_like_what_i_tag(self, browser):
        assert "Tag some papers first" in browser.get("/?order=like").text
        assert browser.titles(order="like") == []
        browser.fill("/papers/auglocal/tags", tags="local")
        titles = browser.titles(order="like")
        assert titles[0] == "momentum-auxiliary-network"
        assert "auglocal" not in titles
        assert len(titles) == CARDS + 1


class TestSearch:
    def test_fetched_papers_are_found_by_word_beginning_and_misspelt(self, browser):
        for q in ("jacquard loom", "jacqu", "jaquard", "galois barrel", "2603.00001"):
            key = ORGAN.key if "galois" in q else LOOM.key
            assert browser.titles(q=q)[0] == key, q
        assert "local-lipschitz" in browser.titles(q="lipschits")

    def test_search_keeps_the_filters(self, browser):
        assert browser.titles(q="barrel", period="month", day="2026-02-01") == [ORGAN.key]
        assert browser.titles(q="barrel", period="month", day="2026-03-01") == []

    def test_asking_too_fast_is_refused_for_a_while(self, browser, monkeypatch):
        answers = [browser.get("/", params={"q": "zzzz"}).status_code for _ in range(3)]
        assert answers == [200] * 3
        monkeypatch.setattr("locally.page.limits.Allowance.take", lambda self, key: 4.2)
        refused = browser.get("/", params={"q": "zzzz"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert browser.get("/").status_code == 200
