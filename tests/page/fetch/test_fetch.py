"""Fetching from a server on loopback: what is kept, what is asked again, and what a broken answer leaves behind."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
import sqlalchemy as sa

from locally.page import fetch as fetching
from locally.page.fetch import Wanted, fetch, transport
from locally.page.fetch.transport import Client, FetchError, retry_after
from locally.page.preprints import Preprint, Preprints, Remembered, merge
from locally.page.schema import preprints as table
from locally.page.store import Store
from tests.page.fetch.test_parsers import ATOM, BOMB, DAILY

Reply = tuple[int, dict[str, str], bytes]


class Source:
    """A server that answers as the test says, and remembers what it was asked."""

    def __init__(self) -> None:
        self.replies: dict[str, Callable[[dict[str, str], dict[str, str]], Reply]] = {}
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []
        source = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                query = {name: values[0] for name, values in parse_qs(parts.query).items()}
                headers = {name.lower(): value for name, value in self.headers.items()}
                source.asked.append((parts.path, query, headers))
                status, extra, body = source.replies[parts.path](query, headers)
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(body))} | extra).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def say(self, path: str, *replies: Reply) -> None:
        """These in turn, the last one again and again."""
        left = list(replies)
        self.replies[path] = lambda query, headers: left.pop(0) if len(left) > 1 else left[0]


@pytest.fixture
def source() -> Iterator[Source]:
    source = Source()
    source.say("/arxiv", (200, {}, ATOM))
    source.say("/daily", (200, {}, DAILY))
    yield source
    source.server.shutdown()
    source.server.server_close()


@pytest.fixture
def preprints() -> Preprints:
    return Preprints(Store())


def wanted(source: Source, **other) -> Wanted:
    return Wanted(date(2026, 3, 3), arxiv=f"{source.base}/arxiv", huggingface=f"{source.base}/daily", **other)


def quick(waits: list[float] | None = None) -> Client:
    return Client(pause=0.0, sleep=(waits if waits is not None else []).append)


def kept(preprints: Preprints) -> list[str]:
    return sorted(row[0] for row in preprints.store.query(sa.select(table.c.key)))


def feed(*numbers: int, total: int = 0, version: int = 1) -> bytes:
    entries = "".join(
        f"<entry><id>http://arxiv.org/abs/2603.{n:05d}v{version}</id><title>Paper {n}, version {version}</title>"
        f"<summary>About {n}.</summary><published>2026-03-01T00:00:00Z</published>"
        f"<updated>2026-03-0{version}T00:00:00Z</updated><author><name>A</name></author></entry>"
        for n in numbers
    )
    found = f'<t:totalResults xmlns:t="http://a9.com/-/spec/opensearch/1.1/">{total or len(numbers)}</t:totalResults>'
    return f'<feed xmlns="http://www.w3.org/2005/Atom">{found}{entries}</feed>'.encode()


class TestKeeping:
    def test_one_paper_from_two_sources_is_one_paper(self, source, preprints):
        arxiv, daily = fetch(preprints, wanted(source), client=quick())
        assert (arxiv.added.new, len(arxiv.refused), arxiv.problem) == (2, 2, "")
        assert (daily.added.new, daily.added.changed, len(daily.refused)) == (1, 1, 3)
        both = preprints.get("2603.00001")
        assert both.title.startswith("Weaving Patterns: Algebraic")  # as the archive has it
        assert (both.version, both.upvotes, both.day) == (2, 42, "2026-03-03")
        assert (both.sources, both.keywords) == (("arxiv", "huggingface"), ("loom", "sparse recovery"))

    def test_the_order_of_the_sources_does_not_matter(self, source, preprints):
        fetch(preprints, wanted(source), sources=("huggingface",), client=quick())
        assert preprints.get("2603.00001").title == "Weaving Patterns: as a community lists it"
        fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        both = preprints.get("2603.00001")
        assert (both.version, both.upvotes, both.day) == (2, 42, "2026-03-03")
        assert both.title.startswith("Weaving Patterns: Algebraic")

    def test_a_later_version_replaces_and_an_earlier_does_not(self, source, preprints):
        for version, title in ((1, 1), (3, 3), (2, 3)):
            source.say("/arxiv", (200, {}, feed(7, version=version)))
            fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
            assert preprints.get("2603.00007").title == f"Paper 7, version {title}"
        assert preprints.get("2603.00007").published == "2026-03-01T00:00:00+00:00"

    def test_what_is_known_changes_nothing(self, source, preprints):
        fetch(preprints, wanted(source), client=quick())
        before = preprints.between(0, 99)
        again = fetch(preprints, wanted(source), client=quick())
        assert [(r.added.new, r.added.changed) for r in again] == [(0, 0), (0, 0)]
        assert preprints.between(0, 99) == before
        assert preprints.between(2, 99) == []  # nor was anything written

    def test_pages_are_followed_to_the_end_or_the_limit(self, source, preprints, monkeypatch):
        monkeypatch.setattr(fetching.arxiv, "PAGE", 3)

        def page(query: dict[str, str], _: dict[str, str]) -> Reply:
            start, size = int(query["start"]), int(query["max_results"])
            return 200, {}, feed(*range(start, min(start + size, 8)), total=8)

        source.replies["/arxiv"] = page
        (report,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert (report.pages, report.added.new) == (3, 8)
        assert "submittedDate:[202603030000 TO 202603032359]" in source.asked[0][1]["search_query"]
        (report,) = fetch(Preprints(preprints.store), wanted(source, limit=4), sources=("arxiv",), client=quick())
        assert (report.pages, report.added.same) == (2, 4)

    def test_each_day_of_the_daily_papers_is_asked_for(self, source, preprints):
        fetch(preprints, wanted(source, days=3), sources=("huggingface",), client=quick())
        assert [query["date"] for _, query, _ in source.asked] == ["2026-03-03", "2026-03-02", "2026-03-01"]


class TestPoliteness:
    def test_only_news_is_asked_for(self, source, preprints):
        def answer(_: dict[str, str], headers: dict[str, str]) -> Reply:
            if headers.get("if-none-match") == '"one"' and "if-modified-since" in headers:
                return 304, {}, b""
            return 200, {"ETag": '"one"', "Last-Modified": "Mon, 02 Mar 2026 00:00:00 GMT"}, ATOM

        source.replies["/arxiv"] = answer
        (first,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        (second,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert (first.unchanged, second.unchanged, second.problem) == (0, 1, "")

    def test_an_unchanged_page_does_not_hide_the_next(self, source, preprints, monkeypatch):
        """The first import broke off after one page; the second goes on where it ended."""
        monkeypatch.setattr(fetching.arxiv, "PAGE", 2)
        broken = [True]

        def answer(query: dict[str, str], headers: dict[str, str]) -> Reply:
            start = int(query["start"])
            if start == 2 and broken[0]:
                return 404, {}, b""
            if "if-none-match" in headers:
                return 304, {}, b""
            return 200, {"ETag": f'"{start}"'}, feed(*range(start, min(start + 2, 3)), total=3)

        source.replies["/arxiv"] = answer
        (first,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert "404" in first.problem
        assert len(kept(preprints)) == 2
        broken[0] = False
        (second,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert (second.unchanged, second.added.new) == (1, 1)

    def test_back_off_waits_as_asked_and_then_longer_and_longer(self, source, preprints):
        soon = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
        source.say(
            "/arxiv",
            (429, {"Retry-After": "7"}, b""),
            (503, {"Retry-After": soon}, b""),
            (500, {}, b""),
            (502, {}, b""),
            (200, {}, ATOM),
        )
        waits: list[float] = []
        (report,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick(waits))
        assert report.added.new == 2
        assert waits[0] == 7.0
        assert 50 < waits[1] <= 60
        assert 6 <= waits[2] <= 10
        assert 12 <= waits[3] <= 20

    def test_patience_ends(self, source, preprints):
        source.say("/arxiv", (503, {}, b""))
        source.say("/daily", (429, {"Retry-After": "86400"}, b""))
        arxiv, daily = fetch(preprints, wanted(source), client=quick())
        assert "503" in arxiv.problem
        assert "asks to come back in 86400 s" in daily.problem
        assert len(source.asked) == transport.ATTEMPTS + 1

    def test_requests_keep_their_distance(self, source):
        waits: list[float] = []
        client = Client(pause=3.0, sleep=waits.append)
        for _ in range(2):
            client.get(Remembered(f"{source.base}/arxiv"))
        assert len(waits) == 1
        assert 2 < waits[0] <= 3

    def test_an_empty_page_though_more_is_promised_is_asked_for_again(self, source, preprints):
        source.say("/arxiv", (200, {}, feed(total=5)), (200, {}, feed(1, 2)))
        (report,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert report.added.new == 2
        source.say("/arxiv", (200, {"ETag": '"x"'}, feed(total=5)))
        (report,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert "empty, though 5" in report.problem
        assert preprints.remembered(source.base).etag == ""


class TestEnemies:
    @pytest.mark.parametrize("body", [BOMB, b"{}", ATOM[:-20], b"\x00" * 100])
    def test_a_malformed_page_leaves_nothing_behind(self, source, preprints, body):
        source.say("/arxiv", (200, {"ETag": '"bad"'}, body))
        source.say("/daily", (200, {}, body))
        for report in fetch(preprints, wanted(source), client=quick()):
            assert report.problem.startswith("http://127.0.0.1")
        assert kept(preprints) == []

    def test_too_large_an_answer_is_cut_short(self, source, preprints, monkeypatch):
        monkeypatch.setattr(transport, "BODY_LIMIT", 2**20)
        source.say("/arxiv", (200, {}, b" " * (2**20 + 1)))
        (report,) = fetch(preprints, wanted(source), sources=("arxiv",), client=quick())
        assert "larger than 1 MiB" in report.problem

    def test_what_a_server_says_cannot_write_to_the_terminal(self, source, preprints):
        source.say("/away", (302, {"Location": "http://127.0.0.1/\x1b[31m"}, b""))
        with pytest.raises(FetchError) as caught:
            quick().get(Remembered(f"{source.base}/away"))
        assert "\x1b" not in str(caught.value)

    def test_an_answer_that_breaks_off_is_not_kept(self, source, preprints):
        source.say("/daily", (200, {"Content-Length": str(len(DAILY) + 100)}, DAILY))
        (report,) = fetch(preprints, wanted(source), sources=("huggingface",), client=quick())
        assert report.problem
        assert kept(preprints) == []

    @pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "/etc/passwd", "http://"])
    def test_only_the_web_is_read(self, address):
        with pytest.raises(FetchError, match="only http"):
            quick().get(Remembered(address))

    @pytest.mark.parametrize("elsewhere", ["file:///etc/passwd", "ftp://127.0.0.1/x"])
    def test_a_redirect_leads_to_the_web_only(self, source, elsewhere):
        source.say("/away", (302, {"Location": elsewhere}, b""))
        with pytest.raises(FetchError, match=r"refused|not allowed"):
            quick().get(Remembered(f"{source.base}/away"))

    def test_a_row_that_cannot_be_written_takes_the_page_with_it(self, preprints):
        good = Preprint("2603.00001", "t", ("a",), "s", "2026-03-01", "2026-03-01", "2026-03-01")
        bad = Preprint("2603.00002", None, ("a",), "s", "2026-03-01", "2026-03-01", "2026-03-01")  # type: ignore[arg-type]
        with pytest.raises(sa.exc.IntegrityError):
            preprints.add([good, bad], Remembered("http://x/", "etag"))
        assert kept(preprints) == []
        assert preprints.remembered("http://x/").etag == ""


def test_merging_is_the_same_from_either_side():
    one = Preprint("k", "t", (), "s", "2026-03-02", "u", "2026-03-02", version=1, sources=("arxiv",))
    other = Preprint("k", "x", (), "y", "2026-03-01", "v", "2026-03-05", upvotes=3, sources=("huggingface",))
    assert merge(one, other) == merge(other, one)
    assert merge(one, one) == one


def test_a_date_for_retry_after_may_lie_behind_us():
    assert retry_after("Mon, 02 Mar 2020 00:00:00 GMT") == 0.0


def locally(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locally.cli", "fetch", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120)


def test_the_command_says_what_came_and_ends_with_3_where_a_source_failed(source):
    words = ["--arxiv-url", f"{source.base}/arxiv", "--huggingface-url", f"{source.base}/daily", "--pause", "0"]
    ended = locally(*words, "--day", "2026-03-03", "--days", "1")
    assert ended.returncode == 0
    assert ended.stdout.splitlines() == [
        "arxiv: 2 new, 0 changed, 0 known already",
        "huggingface: 1 new, 1 changed, 0 known already",
    ]
    assert ended.stderr.count("left out") == 5
    source.say("/daily", (200, {}, json.dumps({"error": "no"}).encode()))
    ended = locally(*words)
    assert ended.returncode == 3
    assert "expected a list of papers, got dict" in ended.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--source", "nature"), "--source must be one of arxiv, huggingface"),
        (("--category", "cs.LG) OR (all:x"), "--category must be one of arXiv's"),
        (("--day", "yesterday"), "--day must be a date"),
        (("--days", "0"), "--days must be 1 to 366"),
        (("--limit", "0"), "--limit must be 1 to"),
        (("--pause", "-1"), "--pause must be 0 to"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words, says):
    ended = locally(*words)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert says in ended.stderr
