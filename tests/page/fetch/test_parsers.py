"""What the parsers make of what the sources document, and of what an enemy sends instead."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.page.fetch import arxiv, huggingface
from locally.page.fetch.parsed import Malformed
from locally.page.preprints import SUMMARY, TITLE, Preprint, identify, instant, plain

HERE = Path(__file__).parent
ATOM = (HERE / "arxiv.xml").read_bytes()
DAILY = (HERE / "daily_papers.json").read_bytes()
BOMB = b"""<?xml version="1.0"?><!DOCTYPE feed [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">]>
<feed xmlns="http://www.w3.org/2005/Atom"><title>&c;</title></feed>"""
OUTSIDE = b"""<!DOCTYPE feed [<!ENTITY file SYSTEM "file:///etc/passwd">]><feed>&file;</feed>"""


class TestArxiv:
    def test_entries_as_documented(self):
        parsed = arxiv.parse(ATOM)
        first, old = parsed.found
        assert (parsed.entries, parsed.total) == (4, 4)
        assert first.key == "2603.00001"
        assert first.version == 2
        assert first.title.startswith(r"Weaving Patterns: Algebraic Looms for $\ell_1$ Problems <script>")
        assert first.summary == "A loom that weaves sparse solutions. We show that punched cards suffice."
        assert first.authors == ("Ada Lovelace", "Charles Babbage")
        assert first.organisation == "Analytical Engine Works"
        assert first.categories == ("math.OC", "cs.LG")
        assert (first.published, first.day) == ("2026-03-01T18:00:00+00:00", "2026-03-01")
        assert (old.key, old.arxiv) == ("math_0309136", "math/0309136")
        assert old.published == "2026-03-01T16:00:00+00:00"

    def test_what_cannot_be_kept_is_told(self):
        no_title, no_date = arxiv.parse(ATOM).refused
        assert "2603.00003 has no title" in no_title
        assert "no date" in no_date

    def test_an_error_of_the_service_is_told_in_its_words(self):
        entry = (
            "<entry><id>http://arxiv.org/api/errors#x</id><title>Error</title><summary>start too big</summary></entry>"
        )
        with pytest.raises(Malformed, match="arXiv says: start too big"):
            arxiv.parse(f'<feed xmlns="http://www.w3.org/2005/Atom">{entry}</feed>'.encode())

    @pytest.mark.parametrize("body", [BOMB, OUTSIDE])
    def test_document_types_and_entities_are_refused_unread(self, body):
        with pytest.raises(Malformed, match="document type"):
            arxiv.parse(body)

    @pytest.mark.parametrize(
        ("body", "words"),
        [
            (b"", "not XML"),
            (ATOM[: len(ATOM) // 2], "not XML"),
            (b"<html><body>Rate exceeded.</body></html>", "expected an Atom feed"),
            (b"<a>" * 100, "nested too deeply"),
            (ATOM.replace(b"UTF-8", b"UTF-77"), "not XML"),
            (ATOM.replace(b"Ada", b"Ad\xff"), "not XML"),
            (b'<?xml version="1.0" encoding="shift_jis"?><feed/>', "not XML"),
        ],
    )
    def test_anything_else_is_refused_whole(self, body, words):
        with pytest.raises(Malformed, match=words):
            arxiv.parse(body)

    def test_other_encodings_are_read(self):
        for encoding in ("UTF-16", "ISO-8859-1"):
            body = ATOM.decode().replace("UTF-8", encoding).encode(encoding)
            assert arxiv.parse(body).found[1].authors == ("Évariste Galois",)

    def test_huge_fields_are_cut(self):
        body = ATOM.replace(b"An Old Identifier", b"long " * 100_000).replace(b"It has a slash.", b"s" * 10**6)
        old = arxiv.parse(body).found[1]
        assert len(old.title) <= TITLE
        assert len(old.summary) == SUMMARY


class TestHuggingFace:
    def test_entries_as_documented(self):
        first, second = huggingface.parse(DAILY).found
        assert (first.key, first.version, first.upvotes, first.day) == ("2603.00001", 0, 42, "2026-03-03")
        assert first.keywords == ("loom", "sparse recovery")
        assert first.organisation == "Analytical Engine Works"
        assert (second.authors, second.upvotes, second.day) == (("Mary Somerville",), 0, "2026-03-02")

    def test_what_cannot_be_kept_is_told(self):
        refused = huggingface.parse(DAILY).refused
        assert [r.split(",")[0] for r in refused] == [
            "paper.id must be of type str",
            "paper must be of type dict",
            "an entry must be of type dict",
        ]

    @pytest.mark.parametrize("body", [b"", b"{}", b"null", b"[NaN]", b"\xff\xfe[", b"[" * 100_000, b'"' + b"x" * 99])
    def test_anything_else_is_refused_whole(self, body):
        with pytest.raises(Malformed):
            huggingface.parse(body)


def sound(preprint: Preprint) -> bool:
    json.dumps(preprint.title + preprint.summary, ensure_ascii=False).encode()  # no half of a surrogate pair
    return (
        identify(preprint.arxiv) is not None
        and 0 < len(preprint.title) <= TITLE
        and len(preprint.summary) <= SUMMARY
        and "\x00" not in preprint.title + preprint.summary + "".join(preprint.authors)
        and instant(preprint.published) == preprint.published
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
OPTIONAL = ("summary", "authors", "upvotes", "organization", "ai_keywords", "submittedOnDailyAt")
TEXT = st.text(st.characters(codec=None), max_size=60)


@settings(max_examples=200)
@given(body=st.binary(max_size=300))
def test_no_bytes_break_the_parsers(body):
    for parse in (arxiv.parse, huggingface.parse):
        with contextlib.suppress(Malformed):
            assert all(map(sound, parse(body).found))


@settings(max_examples=200)
@given(at=st.integers(0, len(ATOM) - 1), bits=st.binary(min_size=1, max_size=6))
def test_no_damage_breaks_the_atom_parser(at, bits):
    with contextlib.suppress(Malformed):
        assert all(map(sound, arxiv.parse(ATOM[:at] + bits + ATOM[at + len(bits) :]).found))


@settings(max_examples=300)
@given(
    paper=st.fixed_dictionaries(
        {"id": st.just("2603.00001v3") | JSON, "title": TEXT | JSON, "publishedAt": st.just("2026-03-01") | JSON},
        optional=dict.fromkeys(
            ("summary", "authors", "upvotes", "organization", "ai_keywords", "submittedOnDailyAt"), JSON | TEXT
        ),
    ),
    rest=st.dictionaries(st.sampled_from(["title", "summary", "publishedAt"]), JSON),
)
def test_no_json_breaks_the_parser(paper, rest):
    body = json.dumps([{"paper": paper} | rest]).encode()
    parsed = huggingface.parse(body)
    assert len(parsed.found) + len(parsed.refused) == 1
    assert all(map(sound, parsed.found))


@given(TEXT)
def test_cleaning_twice_changes_nothing(text):
    assert plain(plain(text, 40), 40) == plain(text, 40)
