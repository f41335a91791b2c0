"""The served page over HTTP: reading, searching, running, and what a stranger must not be able to do."""

import json
import re
import time
from collections.abc import Iterator

import feedparser
import pytest
from starlette.testclient import TestClient

from locally.page.store import Store
from locally.page.web import BODY_LIMIT, create_app

HOSTILE = "Sketch & <script>alert('title')</script> of good"
JSON = {"accept": "application/json"}


@pytest.fixture
def client(add_paper) -> Iterator[TestClient]:
    add_paper("good", title=HOSTILE)
    add_paper("failing", "def experiment(run):\n    for s in run.seeds: run.record('ours', 'error', 5.0, seed=s)\n")
    add_paper("unwritten", None)
    with TestClient(create_app(Store()), base_url="http://127.0.0.1") as client:
        yield client


def form_key(client: TestClient, slug: str = "good") -> str:
    found = re.search(r'name="form_key" value="([^"]+)"', client.get(f"/papers/{slug}").text)
    assert found is not None
    return found[1]


def run_to_its_end(client: TestClient, slug: str) -> dict:
    asked = client.post(f"/papers/{slug}/runs", json={"scale": "quick"}, headers=JSON)
    assert asked.status_code == 202
    with client.stream("GET", f"/requests/{asked.json()['id']}/events") as stream:
        events = [json.loads(line.removeprefix("data: ")) for line in stream.iter_lines() if line.startswith("data: ")]
    assert events[-1]["state"] == "done"
    fractions = [e["fraction"] for e in events if e["state"] == "running"]
    assert fractions == sorted(fractions)
    return events[-1]


class TestReading:
    def test_the_feed_lists_every_paper_and_escapes_what_they_say(self, client):
        page = client.get("/").text
        assert page.count('<span class="number">') == 34
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert" in page

    def test_filters_stand_in_the_address(self, client):
        found = client.get("/", params={"wing": "privacy", "order": "newest"}).text
        assert found.count('<span class="number">') == 2
        assert "dp-stationary-points" in found
        found = client.get("/", params={"verdict": "not yet runnable", "q": "unwritten"}).text
        assert re.findall(r'class="title" href="/papers/([^"]+)"', found) == ["unwritten"]

    def test_searching_and_finding_nothing(self, client):
        assert "/papers/local-lipschitz" in client.get("/", params={"q": "lipschits"}).text
        part = client.get("/", params={"q": "xyzzyx"}, headers={"x-part": "list"}).text
        assert "Nothing found" in part
        assert "<html" not in part

    def test_a_paper_that_is_not_there_is_a_page_that_says_so(self, client):
        answer = client.get("/papers/nonsense")
        assert answer.status_code == 404
        assert "there is no paper" in answer.text
        assert client.get("/papers/good?run=7").status_code == 404
        assert client.get("/nowhere").status_code == 404

    def test_a_paper_without_experiment_has_no_run_button(self, client):
        assert 'id="run"' not in client.get("/papers/unwritten").text
        assert "Papers like this one" in client.get("/papers/unwritten").text


class TestRunning:
    def test_a_run_appears_with_table_figure_and_records(self, client):
        done = run_to_its_end(client, "good")
        page = client.get("/papers/good").text
        assert 'data-verdict="holds"' in page
        assert "<svg" in page
        for name, start in (("1.pdf", b"%PDF"), ("1.png", b"\x89PNG"), ("1.svg", b"<svg")):
            assert client.get(f"/papers/good/figures/{name}").content.startswith(start)
        assert client.get("/papers/good/figures/9.pdf").status_code == 404
        assert client.get("/papers/good/records.csv").text.startswith("method,metric,value,seed,n")
        assert client.get(f"/papers/good?run={done['run_id']}").status_code == 200
        assert client.get("/papers/failing/records.csv").status_code == 404

    def test_earlier_runs_stay_readable(self, client):
        first = run_to_its_end(client, "failing")["run_id"]
        run_to_its_end(client, "failing")
        page = client.get("/papers/failing").text
        assert f"?run={first}" in page
        assert "This is an earlier run" in client.get(f"/papers/failing?run={first}").text

    def test_the_atom_feed_tells_what_came_out(self, client):
        run_to_its_end(client, "good")
        feed = feedparser.parse(client.get("/feed.atom").content)
        assert not feed.bozo
        assert feed.entries[0].title == f"holds: {HOSTILE}"
        assert feedparser.parse(client.get("/feed.atom?wing=privacy").content).entries == []
        assert client.get("/feed.atom?wing=kitchen").status_code == 404

    def test_bad_requests_are_named(self, client):
        answer = client.post("/papers/good/runs", json={"scale": "huge"}, headers=JSON)
        assert answer.status_code == 422
        assert "quick, default, paper" in answer.json()["error"]
        assert client.post("/papers/unwritten/runs", json={}, headers=JSON).status_code == 422
        assert client.post("/papers/nonsense/runs", json={}, headers=JSON).status_code == 404
        assert client.post("/papers/good/runs", content=b"[", headers=JSON | {"content-type": "application/json"})
        assert client.post("/requests/99/cancel", json={}, headers=JSON).status_code == 404
        assert client.get("/requests/99/events", headers=JSON).status_code == 404


class TestSafety:
    def test_a_form_needs_our_secret(self, client):
        key = form_key(client)
        form = {"scale": "quick", "form_key": key}
        assert client.post("/papers/good/runs", data={"scale": "quick"}).status_code == 403
        assert client.post("/papers/good/runs", data=form | {"form_key": "guess"}).status_code == 403
        assert client.post("/papers/good/runs", data=form, headers={"origin": "http://evil.example"}).status_code == 403
        answer = client.post("/papers/good/runs", data=form, follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, "/papers/good#run")

    def test_every_answer_carries_the_policy(self, client):
        for address in ("/", "/papers/good", "/papers/nonsense", "/static/live.js", "/feed.atom"):
            policy = client.get(address).headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
        assert "<script>" not in client.get("/papers/good").text.replace("&lt;script&gt;", "")

    def test_large_requests_and_foreign_names_are_refused(self, client):
        assert client.post("/papers/good/runs", content=b"x" * (BODY_LIMIT + 1)).status_code == 413
        assert client.get("/", headers={"host": "evil.example"}).status_code == 400
        assert client.get("/static/..%2Fstore.py").status_code == 404

    def test_with_a_token_nobody_else_sees_anything(self, add_paper):
        token = "a-secret-of-some-length"
        with TestClient(create_app(Store(), token=token), base_url="http://127.0.0.1") as client:
            assert client.get("/").status_code == 401
            assert client.get("/", params={"token": "wrong"}).status_code == 401
            assert client.get("/", headers={"authorization": f"Bearer {token}"}).status_code == 200
            opened = client.get("/", params={"token": token}, follow_redirects=False)
            assert (opened.status_code, opened.headers["location"]) == (303, "/")
            assert client.get("/").status_code == 200  # by cookie


def test_the_address_answers_quickly_enough_to_type_into(client):
    """No absolute time: a search costs at most a few times what the plain feed costs."""
    client.get("/", params={"q": "kernel"})
    times = {}
    for name, params in (("feed", {}), ("search", {"q": "kernel"})):
        start = time.perf_counter()
        for _ in range(5):
            assert client.get("/", params=params).status_code == 200
        times[name] = time.perf_counter() - start
    assert times["search"] <= 5 * times["feed"]
