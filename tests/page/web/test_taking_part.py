"""What readers do is kept under who they are: a cookie that nobody can forge, or the name that a proxy gives."""

import re

import pytest

from locally.page.web.identity import COOKIE
from locally.page.web.taking_part import COMMENTS
from tests.page.web.conftest import LOOM, ORGAN

JSON = {"accept": "application/json"}
AS_JSON = JSON | {"content-type": "application/json"}
HEADER = "X-Forwarded-User"


class TestMarks:
    def test_a_vote_counts_once_a_person_and_can_be_taken_back(self, browser, open_browser):
        for reader, count in ((browser, 1), (browser, 1), (open_browser(), 2)):
            answer = reader.post(f"/papers/{LOOM.key}/marks", json={"mark": "vote"}, headers=JSON)
            assert answer.json() == {"mark": "vote", "on": True, "count": count}
        answer = browser.post(f"/papers/{LOOM.key}/marks", json={"mark": "-vote"}, headers=JSON)
        assert answer.json() == {"mark": "vote", "on": False, "count": 1}

    def test_by_form_one_comes_back_to_where_one_was(self, browser):
        answer = browser.fill("/papers/good/marks", mark="later", next="/?order=newest&page=2")
        assert (answer.status_code, answer.headers["location"]) == (303, "/?order=newest&page=2")
        assert browser.titles(mine="later") == ["good"]
        page = browser.get("/papers/good").text
        assert re.search(r'value="-later" aria-pressed="true"', page)
        assert re.search(r'value="save" aria-pressed="false"', page)
        browser.fill("/papers/good/marks", mark="read")
        assert browser.titles(mine="later") == []
        assert "good" not in browser.titles(mine="unread")

    @pytest.mark.parametrize(
        "away", ["https://evil.example/", "//evil.example", "/\\evil.example", "javascript:alert(1)", "/\nx", "//[", ""]
    )
    def test_a_form_leads_nowhere_else(self, browser, away):
        answer = browser.fill("/papers/good/marks", mark="save", next=away)
        assert answer.headers["location"] == "/papers/good"

    def test_what_no_database_can_keep_is_refused(self, browser):
        answer = browser.post("/papers/good/note", content=rb'{"text": "\ud800"}', headers=AS_JSON)
        assert answer.status_code == 422

    def test_what_is_not_there_cannot_be_marked(self, browser):
        assert browser.fill("/papers/nonsense/marks", mark="save").status_code == 404
        assert browser.fill("/papers/good/marks", mark="love").status_code == 422
        assert browser.post("/papers/good/marks", data={"mark": "save"}).status_code == 403
        evil = {"origin": "http://evil.example"}
        form = {"mark": "save", "form_key": browser.form_key()}
        assert browser.post("/papers/good/marks", data=form, headers=evil).status_code == 403


class TestTagsAndNotes:
    def test_tags_filter_the_feed(self, browser):
        browser.fill("/papers/good/tags", tags="engine, to cite")
        browser.fill(f"/papers/{LOOM.key}/tags", tags="engine")
        assert browser.titles(tags="engine", order="newest") == [LOOM.key, "good"]
        assert browser.titles(tags="engine not to-cite") == [LOOM.key]
        assert "good" not in browser.titles(tags="not engine")
        assert ORGAN.key in browser.titles(tags="not engine")
        browser.fill("/papers/good/tags", remove="engine")
        assert browser.titles(tags="engine") == [LOOM.key]
        assert browser.fill("/papers/good/tags", tags="(").status_code == 422

    def test_a_note_is_seen_by_who_wrote_it(self, browser, open_browser):
        browser.fill(f"/papers/{LOOM.key}/note", text="</textarea><script>x</script>")
        mine, other = (reader.get(f"/papers/{LOOM.key}").text for reader in (browser, open_browser()))
        assert "&lt;/textarea&gt;&lt;script&gt;x" in mine
        assert "&lt;/textarea&gt;" not in other


class TestComments:
    def test_said_answered_and_withdrawn(self, browser, open_browser):
        browser.fill("/me", name="Ada <b>")
        said = browser.fill(f"/papers/{ORGAN.key}/comments", text="*Barrels* <script>x</script>")
        assert said.headers["location"] == f"/papers/{ORGAN.key}#comments"
        number = re.search(r'id="comment-(\d+)"', browser.get(f"/papers/{ORGAN.key}").text)[1]
        other = open_browser()
        other.fill(f"/papers/{ORGAN.key}/comments", text="Organs", parent=number)
        page = other.get(f"/papers/{ORGAN.key}").text
        assert "<em>Barrels</em> &lt;script&gt;x" in page
        assert "<strong>Ada &lt;b&gt;</strong>" in page
        assert "depth-1" in page
        assert "2 comments" in other.get("/?order=newest").text
        assert other.fill(f"/comments/{number}/withdraw").status_code == 404
        assert f"/comments/{number}/withdraw" not in page
        assert browser.fill(f"/comments/{number}/withdraw").status_code == 303
        page = other.get(f"/papers/{ORGAN.key}").text
        assert "Barrels</em>" not in page
        assert "was withdrawn" in page

    def test_bad_ones_are_told(self, browser):
        for fields in (
            {"text": " "},
            {"text": "x" * 10_001},
            {"text": "x", "parent": "9"},
            {"text": "x", "parent": "a"},
        ):
            assert browser.fill("/papers/good/comments", **fields).status_code == 422
        assert browser.fill("/comments/999/withdraw").status_code == 404

    def test_talking_too_fast_is_refused(self, browser):
        answers = [browser.fill("/papers/good/comments", text=str(i)).status_code for i in range(COMMENTS[0] + 1)]
        assert answers == [303] * COMMENTS[0] + [429]


class TestWho:
    def test_looking_makes_nobody(self, browser):
        browser.get("/")
        browser.get(f"/papers/{LOOM.key}")
        assert COOKIE not in browser.cookies
        browser.fill("/papers/good/marks", mark="save")
        assert COOKIE in browser.cookies

    def test_a_cookie_cannot_be_made_up(self, browser, open_browser):
        browser.fill("/papers/good/marks", mark="save")
        number, until, nonce, mac = browser.cookies[COOKIE].split(".")
        forger = open_browser()
        for forged in (
            "1",
            f"{int(number) + 1}.{until}.{nonce}.{mac}",
            f"{number}.{until}9.{nonce}.{mac}",
            "....",
            "é",
        ):
            answer = forger.get("/?mine=save", headers={"cookie": f"{COOKIE}={forged}".encode()})
            assert "Nothing found" in answer.text
        assert browser.titles(mine="save") == ["good"]

    def test_the_proxys_user_is_the_same_person_everywhere(self, open_browser):
        ada, again, mary = (open_browser({HEADER: name}, user_header=HEADER) for name in ("ada", "ada", "mary"))
        ada.fill("/papers/good/marks", mark="save")
        assert COOKIE not in ada.cookies
        assert again.titles(mine="save") == ["good"]
        assert mary.titles(mine="save") == []
        assert ">ada</a>" in again.get("/me").text
        for headers in ({}, {HEADER: " "}, {HEADER: "a" * 200}):
            assert open_browser(headers, user_header=HEADER).get("/").status_code == 401

    def test_without_that_option_the_header_is_nobodys(self, browser):
        browser.fill("/papers/good/marks", mark="save")
        assert browser.titles(mine="save") == ["good"]
        browser.cookies.clear()
        assert browser.get("/?mine=save", headers={HEADER: "ada"}).text.count('class="title"') == 0

    def test_my_papers_counts_what_is_mine(self, browser):
        browser.fill("/papers/good/tags", tags="engine")
        browser.fill("/papers/good/marks", mark="save")
        page = browser.get("/me").text
        assert "1 saved" in page
        assert "engine 1" in page
        assert browser.fill("/me", name=" ").status_code == 422
