"""The pages of single papers: fetched ones, and two runs of one that runs."""

import re
from dataclasses import replace

import feedparser

from locally import catalogue
from locally.evidence import Scale, judge
from locally.page.preprints import Preprints
from locally.page.store import Store
from tests.page.test_store import evidence
from tests.page.web.conftest import LOOM, ORGAN


def test_a_fetched_paper_is_read_but_not_run(browser):
    page = browser.get(f"/papers/{LOOM.key}").text
    for words in ("&lt;script&gt;alert", "Augustus De Morgan", "version 2 of 2026-03-02", "math.OC",
                  "https://arxiv.org/abs/2603.00001", "Papers like this one"):  # fmt: skip
        assert words in page
    assert "<script>" not in page
    assert 'id="run"' not in page
    assert "https://arxiv.org/abs/math/0309136" in browser.get(f"/papers/{ORGAN.key}").text
    for address in ("runs", "requests"):
        answer = browser.post(f"/papers/{LOOM.key}/{address}", json={"scale": "quick"})
        assert answer.status_code in (404, 405)
    for address in ("records.csv", "figures/1.png", "compare?a=1&b=2"):
        assert browser.get(f"/papers/{LOOM.key}/{address}").status_code == 404


def test_what_is_not_there_is_told(browser):
    assert browser.get("/papers/2603.99999").status_code == 404
    assert "there is no paper" in browser.get("/papers/2603.99999").text


def test_two_runs_side_by_side(browser):
    store = Store()
    first = store.add(evidence("good", machine={}, value=0.5))
    second = store.add(evidence("good", machine={}, value=2.0, versions={"numpy": "9.9"}))
    page = browser.get("/papers/good").text
    chosen = re.findall(r'<option value="(\d+)" selected>', page)
    assert chosen == [str(first), str(second)]
    page = browser.get("/papers/good/compare", params={"a": first, "b": second}).text
    assert '<tr class="differs"><th scope="row">numpy</th><td>2.0</td><td>9.9</td>' in page
    assert "+300.0%" in page
    assert browser.get("/papers/good/compare", params={"a": first, "b": 99}).status_code == 404
    assert browser.get("/papers/halpern/compare", params={"a": first, "b": second}).status_code == 404
    assert browser.get("/papers/good/compare", params={"a": first}).status_code == 422
    assert browser.get("/papers/good/compare", params={"a": first, "b": 10**30}).status_code in (404, 422)


def test_the_sparkline_is_drawn_from_the_second_run_on(browser):
    claim = next(p for p in catalogue.load() if p.slug == "good").claims[0]
    store = Store()
    for value, lines in ((0.5, 0), (0.7, 1), (0.6, 1)):
        one = evidence("good", machine={}, value=value)
        store.add(evidence("good", machine={}, value=value, verdict=judge([claim], one.measures, Scale.QUICK)))
        assert browser.get("/?q=sketch").text.count('<svg class="spark"') == lines
    assert "over the last 3 runs" in browser.get("/papers/good").text


def test_the_feed_of_everything_has_fetched_papers_and_that_of_a_wing_those_it_has_a_card_of(browser):
    twin = next(p for p in catalogue.load() if p.arxiv)
    other = next(p for p in catalogue.load() if p.wing != twin.wing)
    when = "2026-03-01T00:00:00+00:00"
    Preprints(Store()).add([replace(LOOM, key=twin.arxiv.replace("/", "_"), title="A twin", updated=when)])
    titles = {
        wing: {e.title for e in feedparser.parse(browser.get("/feed.atom", params={"wing": wing}).content).entries}
        for wing in ("", twin.wing, other.wing)
    }
    assert titles[""] == {"A twin", LOOM.title, ORGAN.title}
    assert titles[twin.wing] == {"A twin"}
    assert titles[other.wing] == set()
