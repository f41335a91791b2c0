"""What is remembered of a line changes with the paper, its runs, and with what people and this reader say of it."""

import re
from dataclasses import replace

from locally.page.discussion import Discussion
from locally.page.people import People
from locally.page.preprints import Preprints
from locally.page.store import Store
from tests.page.test_store import evidence
from tests.page.web.conftest import LOOM


def line(browser, key: str) -> str:
    """The markup of one paper in the list."""
    (found,) = (li for li in re.findall(r"<li>.*?</li>", browser.get("/").text, re.S) if f'href="/papers/{key}"' in li)
    return found


def test_marks_are_those_of_the_reader(open_browser):
    ada, ben = open_browser(), open_browser()
    before = line(ben, LOOM.key)
    ada.fill(f"/papers/{LOOM.key}/marks", mark="save")
    assert 'value="-save" aria-pressed="true"' in line(ada, LOOM.key)
    assert line(ben, LOOM.key) == before
    ada.fill(f"/papers/{LOOM.key}/tags", tags="textiles")
    assert ">textiles</a>" in line(ada, LOOM.key)
    assert "textiles" not in line(ben, LOOM.key)
    ada.fill(f"/papers/{LOOM.key}/marks", mark="-save")
    assert 'value="save" aria-pressed="false"' in line(ada, LOOM.key)


def test_votes_and_comments_are_those_of_all(open_browser):
    ada, ben = open_browser(), open_browser()
    for key in (LOOM.key, "good"):
        assert '<span class="count">0</span>' in line(ben, key)
        ada.fill(f"/papers/{key}/marks", mark="vote")
        assert '<span class="count">1</span>' in line(ben, key)
        person = People(Store()).welcome("somebody")
        Discussion(Store()).say(person, key, "well")
        assert "1 comment</a>" in line(ben, key)
        Discussion(Store()).say(person, key, "well, well")
        assert "2 comments</a>" in line(ben, key)


def test_a_paper_that_was_fetched_again_is_shown_as_it_is_now(browser):
    assert "jacquard" in line(browser, LOOM.key)
    Preprints(Store()).add([replace(LOOM, version=3, summary="Now it spins.", title="Spinning")])
    assert "Now it spins." in line(browser, LOOM.key)
    assert "jacquard" not in line(browser, LOOM.key)


def test_a_run_changes_the_card_and_its_page(browser):
    assert "not run" in line(browser, "good")
    assert "CSV" not in browser.get("/papers/good").text
    Store().add(evidence("good", machine={}))
    assert "not run" not in line(browser, "good")
    assert "CSV" in browser.get("/papers/good").text


def test_a_card_that_was_edited_is_shown_as_it_is_now(browser, tmp_path):
    browser.get("/papers/good")
    card = next((tmp_path / "papers").glob("good.toml"))
    card.write_text(card.read_text().replace("Sketch of good", "Draft of good"))
    assert "Draft of good" in line(browser, "good")
    assert "Draft of good" in browser.get("/papers/good").text


def test_the_buttons_of_all_papers_are_of_one_form(browser):
    page = browser.get("/").text
    assert page.count('<form id="marking"') == 1
    assert page.count('name="form_key"') == 1
    buttons = re.findall(r'<button form="marking" formaction="/papers/([^"]+)/marks"', page)
    assert buttons.count("good") == buttons.count(LOOM.key) == 4


def test_files_of_all_pages_are_sent_once(browser):
    first = browser.get("/static/live.js")
    assert first.text.startswith("//")
    again = browser.get("/static/live.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.text) == (304, "")
    assert browser.get("/static/nothing.js").status_code == 404
