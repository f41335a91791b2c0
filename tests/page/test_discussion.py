"""Comments stand in threads, and what is written in them cannot harm who reads it."""

from html.parser import HTMLParser

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.errors import UsageError
from locally.page.discussion import DEPTH, LENGTH, Discussion, markdown
from locally.page.people import People
from locally.page.schema import comments
from locally.page.store import Store


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def talk(store) -> Discussion:
    return Discussion(store)


@pytest.fixture
def ada(store):
    return People(store).welcome("cookie:a", "Ada")


def test_answers_follow_what_they_answer(talk, ada):
    first = talk.say(ada, "p", "first")
    second = talk.say(ada, "p", "second")
    answer = talk.say(ada, "p", "to the first", first)
    talk.say(ada, "p", "to the answer", answer)
    talk.say(ada, "q", "elsewhere")
    said = [(c.text, c.depth) for c in talk.about("p")]
    assert said == [("first", 0), ("to the first", 1), ("to the answer", 2), ("second", 0)]
    assert talk.counts(["p", "q", "r"]) == {"p": 4, "q": 1}
    assert second > first


def test_threads_stop_moving_inwards(talk, ada):
    parent = None
    for _ in range(DEPTH + 3):
        parent = talk.say(ada, "p", "deeper", parent)
    assert max(c.depth for c in talk.about("p")) == DEPTH


def test_a_withdrawn_comment_leaves_its_place_to_the_answers(store, talk, ada):
    first = talk.say(ada, "p", "regret")
    talk.say(ada, "p", "but why", first)
    mary = People(store).welcome("cookie:m")
    assert talk.withdraw(mary, first) is None
    assert talk.withdraw(ada, first) == "p"
    gone, answer = talk.about("p")
    assert (gone.withdrawn, gone.text, answer.text) == (True, "", "but why")
    assert talk.counts(["p"]) == {"p": 1}
    assert store.query(sa.select(comments.c.text).where(comments.c.id == first)) == [("",)]


@pytest.mark.parametrize(("text", "says"), [("  ", "needs words"), ("x" * (LENGTH + 1), "at most")])
def test_empty_and_endless_comments_are_refused(talk, ada, text, says):
    with pytest.raises(UsageError, match=says):
        talk.say(ada, "p", text)


def test_an_answer_belongs_to_the_same_paper(talk, ada):
    elsewhere = talk.say(ada, "q", "there")
    for parent in (elsewhere, 99):
        with pytest.raises(UsageError, match="no comment"):
            talk.say(ada, "p", "here", parent)


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[tuple[str, str]] = set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {(name, value or "") for name, value in attrs}


HARMLESS = {"p", "em", "strong", "code", "pre", "ul", "ol", "li", "blockquote", "a", "br", "hr"}
WRITTEN = st.lists(
    st.sampled_from(
        ["<script>", "</p>", "<img src=x onerror=a(1)>", "[a](", "![a](", "javascript:alert(1)", "data:text/html,x",
         "&#106;avascript:", "http://x.example/\"onclick=\"y", ")", "<http://x.example>", "`", "```\n", "* ", "> ",
         "\n",
         "# h", "x", "<!--", "]]>", "**", "_", "\\", "|", "&lt;", "<a href='vbscript:x'>", "[b]: javascript:x\n", "[b]"]
    ),
    max_size=14,
).map("".join)  # fmt: skip


@settings(max_examples=400)
@given(WRITTEN | st.text(max_size=80))
def test_nothing_written_becomes_anything_but_text_and_links(text):
    seen = Seen()
    seen.feed(markdown(text))
    assert seen.tags <= HARMLESS
    for name, value in seen.attributes:
        assert name in ("href", "title", "rel", "class", "start"), (name, value)
        if name == "href":
            assert not value.lower().lstrip().startswith(("javascript:", "vbscript:", "data:", "file:"))


def test_links_vouch_for_nobody():
    assert 'rel="nofollow noopener noreferrer ugc"' in markdown("[x](https://x.example)")
