"""Whatever is sent to any address, the page answers: no server error, no crash, and always with its policy.

The page publishes no OpenAPI description; the one that the fuzzer works from is made here.
"""

from typing import Any
from urllib.parse import quote

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from locally.page.limits import Allowance
from locally.page.preprints import Preprint, Preprints
from locally.page.store import Store
from locally.page.web import create_app
from tests.page.test_store import evidence

KEY = "2601.00001"
FIELDS = {  # of each form
    "/papers/{slug}/runs": ("scale",),
    "/papers/{key}/marks": ("mark",),
    "/papers/{key}/tags": ("tags", "remove"),
    "/papers/{key}/note": ("text",),
    "/papers/{key}/comments": ("text", "parent"),
    "/me": ("name",),
    "/subscriptions": ("address", "period", "wing"),
}
VALUES = {  # that lead further in
    "slug": ["good", KEY],
    "key": ["good", KEY],
    "name": ["1.svg", "style.css"],
    "scale": ["quick", "paper"],
    "mark": ["vote", "-vote", "later"],
    "period": ["daily", "weekly", "week", "day"],
    "wing": ["solvers"],
    "order": ["like", "trending", "top"],
    "tags": ["a and not b", "(a or b", "a, b"],
    "address": ["ada@example.org"],
    "run": [1],
    "a": [1],
    "b": [1],
}


@pytest.fixture
def app(add_paper, monkeypatch: pytest.MonkeyPatch):
    """With a run, a fetched paper, a mail server that is away, and no bounds on how often one may ask."""
    for name, value in {
        "HOST": "127.0.0.1",
        "PORT": "9",
        "SENDER": "p@example.org",
        "URL": "http://127.0.0.1/",
    }.items():
        monkeypatch.setenv(f"LOCALLY_MAIL_{name}", value)
    monkeypatch.setattr(Allowance, "take", lambda self, key: 0.0)
    add_paper("good")
    store = Store()
    store.add(evidence("good", machine={}))
    day = "2026-01-02"
    Preprints(store).add(
        [Preprint(KEY, "A title", ("Ada",), "Words.", f"{day}T00:00:00+00:00", f"{day}T00:00:00+00:00", day)]
    )
    return create_app(store)


def described(app, led: bool) -> dict[str, Any]:
    """What the application takes, with the fields of its forms; without the stream, which goes on as long as a run.

    `led` holds what it takes to values that lead further in, where there are some.
    """
    description = app.openapi()
    del description["paths"]["/requests/{request_id}/events"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                if led and parameter["name"] in VALUES:
                    parameter["schema"] = {"enum": VALUES[parameter["name"]]}
            if method == "post":
                fields = {name: _field(name, led) for name in FIELDS.get(path, ())}
                schema = {"type": "object", "properties": fields}
                kinds = ("application/json", "application/x-www-form-urlencoded")
                operation["requestBody"] = {"content": {kind: {"schema": schema} for kind in kinds}}
    return description


def _field(name: str, led: bool) -> dict[str, Any]:
    return {"enum": VALUES[name]} if led and name in VALUES else {"type": "string"}


def fuzz(operation) -> set[int]:
    """The statuses that it answered with."""
    statuses = set()

    @settings(max_examples=15, suppress_health_check=list(HealthCheck), database=None)
    @given(case=operation.as_strategy())
    def answers(case):
        answer = case.call(headers={"host": "127.0.0.1"}, allow_redirects=False)
        assert answer.status_code < 500, case.as_curl_command()
        assert "content-security-policy" in answer.headers
        assert b"Traceback" not in answer.content
        statuses.add(answer.status_code)

    answers()
    return statuses


@pytest.mark.parametrize("led", [True, False])
def test_every_route_answers_whatever_is_sent(app, led):
    description = described(app, led)
    schema = schemathesis.openapi.from_dict(description)
    schema.app = app
    seen = {found.ok().label: fuzz(found.ok()) for found in schema.get_all_operations()}
    assert len(seen) == sum(map(len, description["paths"].values()))
    if led:  # it gets beyond the door
        assert sum(min(statuses) < 400 for statuses in seen.values()) >= len(seen) / 2, seen


@pytest.fixture
def client(app) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=True)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "BREW"]),
    path=st.lists(
        st.sampled_from(
            ["papers", "good", KEY, "requests", "1", "events", "cancel", "static", "subscriptions", "end", ".."]
        )
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        max_size=5,
    ),
    query=st.dictionaries(
        st.sampled_from([*VALUES, "q", "page", "day", "tags", "mine", "token"]), st.text(max_size=20)
    ),
    body=st.binary(max_size=200),
    kind=st.sampled_from(["application/json", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""]),
    accept=st.sampled_from(["application/json", "text/html", "*/*"]),
    cookie=st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=';,\\"'), max_size=40),
)
def test_addresses_methods_bodies_and_cookies_that_make_no_sense(
    client, method, path, query, body, kind, accept, cookie
):
    address = "http://127.0.0.1/" + "/".join(quote(part, safe="") for part in path)
    query = {name: value.encode("utf-8", "surrogatepass") for name, value in query.items()}
    headers = {"content-type": kind, "accept": accept, "cookie": f"locally-person={cookie}; locally-form={cookie}"}
    answer = client.request(method, address, params=query, content=body, headers=headers, follow_redirects=False)
    assert answer.status_code < 500
    assert "content-security-policy" in answer.headers
