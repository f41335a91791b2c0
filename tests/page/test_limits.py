"""Strangers get so much and no more; the memory that this takes has a bound."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from locally.page.limits import Allowance, BodyLimit, retry_after, sender


@given(st.integers(1, 5), st.lists(st.floats(0, 30), max_size=60))
def test_never_more_than_the_bucket_and_its_refill(burst, pauses):
    now = [0.0]
    allowance = Allowance(burst, 60.0, clock=lambda: now[0])
    taken = 0
    for pause in pauses:
        now[0] += pause
        wait = allowance.take("me")
        taken += not wait
        assert taken <= burst + now[0] * burst / 60.0 + 1e-6
        if wait:
            now[0] += wait + 1e-9
            assert allowance.take("me") == 0.0
            taken += 1


def test_keys_do_not_fill_the_memory_and_threads_do_not_double():
    allowance = Allowance(5, 60.0, keys=100, clock=lambda: 0.0)
    for i in range(1000):
        allowance.take(str(i))
    assert len(allowance._buckets) == 100
    got: list[float] = []
    threads = [threading.Thread(target=lambda: got.extend(allowance.take("all") for _ in range(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(wait == 0.0 for wait in got) == 5


def test_bad_arguments_and_whole_seconds():
    for arguments in ((0, 1.0), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ValueError, match="must be positive"):
            Allowance(*arguments)
    assert retry_after(0.2) == {"Retry-After": "1"}
    assert sender("2001:db8::1") == sender("2001:db8::ffff")
    assert sender("::ffff:192.0.2.7") == sender("192.0.2.7") != sender("192.0.2.8")


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(str(len(await request.body())))


@pytest.fixture
def client():
    app = Starlette(routes=[Route("/echo", echo, methods=["POST"])])
    app.add_middleware(BodyLimit, limit=1000)
    return TestClient(app)


def test_a_body_is_bounded_whether_or_not_it_says_how_long_it_is(client):
    assert client.post("/echo", content=b"x" * 1000).text == "1000"
    assert client.post("/echo", content=b"x" * 1001).status_code == 413
    assert client.post("/echo", content=(b"x" * 100 for _ in range(10))).text == "1000"
    assert client.post("/echo", content=(b"x" * 100 for _ in range(11))).status_code == 413
    assert client.post("/echo", headers={"content-length": "-1"}).status_code == 413


def endless(app) -> tuple[int, list]:
    """Messages that the application behind the bound read of a body without end, and what was answered."""
    read, sent = 0, []

    async def receive():
        nonlocal read
        read += 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [], "query_string": b"", "http_version": "1.1"}
    asyncio.run(BodyLimit(app, 1000)(scope, receive, send))
    return read, sent


def test_an_endless_body_is_neither_kept_nor_waited_for():
    read, sent = endless(Starlette(routes=[Route("/", echo, methods=["POST"])]))
    assert read == 11
    assert sent[0]["status"] == 413


def test_an_answer_that_has_begun_is_not_begun_again():
    async def eager(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while (await receive())["type"] == "http.request":
            await send({"type": "http.response.body", "body": b".", "more_body": True})
        await send({"type": "http.response.body", "body": b"end"})

    read, sent = endless(eager)
    assert read == 11
    assert [m.get("body") or m["status"] for m in sent] == [200, *[b"."] * 10, b"end"]
