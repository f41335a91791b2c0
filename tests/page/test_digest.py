"""The digest tells what changed since the last one, once, to those who want it."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from locally import catalogue
from locally.evidence import Measure, Scale, Status, judge
from locally.page.digest import Digests, changes
from locally.page.outbox import Letter, Outbox
from locally.page.preprints import Preprint, Preprints
from locally.page.schema import messages, subscriptions, views
from locally.page.store import Store
from locally.page.subscriptions import Period
from tests.page.mailing import ROOT, MailServer
from tests.page.test_outbox import START, Clock
from tests.page.test_store import CLAIM, evidence

HOSTILE = "Sketch\\n.\\nBcc: eve@example.org <script>alert(1)</script> & of first"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MailServer]:
    with MailServer(tmp_path / "mail") as running:
        yield running


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(clock) -> Callable[..., None]:
    """run("slug", "holds") stores a run with that verdict."""

    def add(slug: str, verdict: str, status: Status = Status.FINISHED) -> None:
        value = {"holds": 0.5, "fails": 5.0}[verdict]
        measures = tuple(Measure("ours", "error", value, seed) for seed in (0, 1))
        found = judge([CLAIM], measures, Scale.QUICK)
        started = clock.now.isoformat(timespec="seconds")
        Store().add(evidence(slug, verdict=found, measures=measures, started=started, status=status))

    return add


@pytest.fixture
def digests(server, clock, add_paper) -> Digests:
    add_paper("first", title=HOSTILE)
    add_paper("second")
    return Digests(Store(), server.settings(), catalogue.load(), clock=clock)


def subscribe(digests: Digests, address: str, period: Period = Period.DAILY, wing: str = "") -> None:
    digests.subscriptions.ask(address, period, wing)
    text = digests.store.query(sa.select(messages.c.content).order_by(messages.c.id.desc()))[0][0].replace("=\r\n", "")
    link = next(w for w in text.split() if "/confirm/" in w).rpartition("/")[2]
    digests.subscriptions.confirm(period, link)


def deliver(digests: Digests) -> list:
    """The digests that go out now."""
    before = len(digests.server.letters())  # type: ignore[attr-defined]
    digests.queue()
    Outbox(digests.store, digests.settings, clock=digests._clock).deliver()
    return [x for x in digests.server.letters()[before:] if "Confirm" not in x.message["Subject"]]  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def remember(digests, server) -> None:
    digests.server = server


def test_changed_verdicts_since_the_last_digest(digests, run, clock):
    subscribe(digests, "ada@example.org")
    run("first", "holds")
    run("second", "holds")
    (letter,) = deliver(digests)
    assert letter.text.count("first verdict: holds") == 2
    assert letter.message["Subject"] == "Locally: 2 verdicts changed, 2 papers trending"
    assert deliver(digests) == []
    clock.now += timedelta(days=1)
    run("first", "holds")
    run("first", "fails", Status.CRASHED)
    run("second", "fails")
    (letter,) = deliver(digests)
    assert "holds -> fails (quick scale)" in letter.text
    assert "https://locally.example/papers/second" in letter.text
    assert letter.text.count("->") == 1
    clock.now += timedelta(days=3)
    assert deliver(digests) == []  # nothing new, nothing sent


def test_a_digest_is_text_and_html_with_one_click_to_end_it(digests, run):
    subscribe(digests, "ada@example.org")
    run("first", "holds")
    (letter,) = deliver(digests)
    message = letter.message
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert message["List-Unsubscribe"] == f"<https://locally.example{letter.link('end')}>"
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert message["Bcc"] is None
    assert message.defects == []
    assert "Sketch . Bcc: eve@example.org" in letter.text
    assert "<script>" not in letter.html
    assert "&lt;script&gt;" in letter.html
    digests.subscriptions.end(letter.link("end").rpartition("/")[2])
    assert digests.due() == []


def test_weekly_comes_once_a_week_and_a_wing_only_tells_of_its_own(digests, run, clock):
    subscribe(digests, "ada@example.org", Period.WEEKLY, "solvers")
    subscribe(digests, "bob@example.org", Period.WEEKLY, "privacy")
    days = []
    for day in range(10):
        run("first", ("holds", "fails")[day % 2])
        days += [(day, letter.recipient) for letter in deliver(digests)]
        clock.now += timedelta(days=1)
    assert days == [(0, "ada@example.org"), (7, "ada@example.org")]


def test_a_run_that_was_stored_late_is_not_missed(digests, run, clock):
    subscribe(digests, "ada@example.org")
    run("first", "holds")
    assert len(deliver(digests)) == 1
    clock.now -= timedelta(hours=6)  # began before that digest, ended after it
    run("second", "holds")
    clock.now += timedelta(hours=30)
    (letter,) = deliver(digests)
    assert "first verdict: holds" in letter.text
    assert "papers/second" in letter.text


def test_trending_papers_fetched_ones_too_but_only_for_those_who_want_everything(digests, clock):
    when = clock.now.isoformat(timespec="seconds")
    preprint = Preprint(
        "2601.00001", "A\u2028fetched title", ("Ada", "Bob", "Eve", "Zoe"), "Words.", when, when, when[:10]
    )
    Preprints(digests.store).add([preprint])
    with digests.store.writing() as connection:
        for paper, count in (("2601.00001", 3), ("second", 2), ("gone", 9)):
            connection.execute(views.insert().values(paper=paper, day=when[:10], count=count))
    subscribe(digests, "ada@example.org")
    subscribe(digests, "bob@example.org", wing="solvers")
    everything, solvers = deliver(digests)
    assert everything.text.index("https://locally.example/papers/2601.00001") < everything.text.index("papers/second")
    assert "Ada, Bob, Eve and others" in everything.text
    assert "2601" not in solvers.text
    assert solvers.message["Subject"] == "Locally (solvers): 1 paper trending"
    clock.now += timedelta(days=2)
    assert deliver(digests) == []  # nobody turned to them since


def test_two_processes_write_one_digest(digests, run):
    subscribe(digests, "ada@example.org")
    run("first", "holds")
    due = digests.due()
    assert [digests._queue(due[0]), digests._queue(due[0])] == [True, False]
    with digests.store.writing() as connection:  # even if the day had been lost
        connection.execute(subscriptions.update().values(seen_period="", seen_run=0))
    assert digests.queue() == 0
    assert len(digests.store.query(sa.select(messages.c.id).where(messages.c.kind == "digest"))) == 1


def test_changes_between_two_runs(digests, run):
    for verdict in ("holds", "fails", "holds"):
        run("first", verdict)
    told = lambda since, until: [(c.before, c.after) for c in changes(digests.store, digests.papers, since, until)]
    assert told(0, 3) == [("", "holds")]
    assert told(1, 2) == [("holds", "fails")]
    assert told(1, 3) == []


def locally(server: MailServer, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locally.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, env=server.environment(), timeout=60)


def test_from_the_command_line(digests, run, server):
    ended = locally(server, "subscribe", "ada@example.org", "--wing", "solvers", "--weekly")
    assert ended.stdout == "A mail with a link to confirm is on its way.\n"
    period, link = server.letters()[0].link("confirm").split("/")[-2:]
    digests.subscriptions.confirm(Period(period), link)
    digests._clock.now = START
    run("first", "holds")
    shown = locally(server, "digest", "--dry-run").stdout
    assert "To: a…@example.org" in shown
    assert "ada@" not in shown
    assert shown.endswith("1 due\n")
    assert len(server.letters()) == 1
    assert locally(server, "digest", "--send").stdout == "1 sent\n"
    assert locally(server, "digest", "--send").stdout == "nothing to send\n"
    assert server.letters()[1].message["Subject"].startswith("Locally (solvers): 1 verdict changed")


def test_bad_usage_is_one_line(server, monkeypatch):
    for words, says in (
        (("subscribe", "ada"), "not an e-mail address"),
        (("subscribe", "ada@example.org", "--wing", "kitchen"), "--wing must be one of"),
        (("subscribe", "unknown@example.org"), "does not take mail"),
        (("digest",), "either --dry-run or --send"),
    ):
        ended = locally(server, *words)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert says in ended.stderr
        assert ended.stderr.count("\n") == 1
    command = [sys.executable, "-m", "locally.cli", "digest", "--send"]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=60, cwd=ROOT)
    assert (ended.returncode, "no mail server" in ended.stderr) == (2, True)


def test_letters_that_wait_are_sent_by_the_next_command(digests, run, server):
    server.stop()
    assert "tries again" in locally(server, "subscribe", "ada@example.org").stdout
    server.start()
    with digests.store.writing() as connection:
        connection.execute(messages.update().values(due=""))
    assert locally(server, "digest", "--send").stdout == f"1 {Letter.SENT}\n"
