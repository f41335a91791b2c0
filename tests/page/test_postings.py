"""The inverted index in memory ranks as SQLite's FTS5 does, however its papers came in."""

import sqlite3

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from locally.page.search import Document, Index
from locally.page.search.documents import COLUMNS
from locally.page.search.postings import SEGMENTS, Postings
from locally.page.search.words import WEIGHTS, folded

WORDS = ("local", "linear", "learning", "graph", "tensor", "kernel", "prune", "solve", "bound", "private")
TEXT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map(" ".join)
PAPERS = st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=12)


def documents(texts) -> list[Document]:
    return [Document(str(i), title, "", "", summary, "") for i, (title, summary) in enumerate(texts)]


def postings_of(papers: list[Document], *, at_once: int) -> Postings:
    index = Index()
    for start in range(0, len(papers), at_once):
        index.update(papers[start : start + at_once])
        index.warm()
    return index._load().postings


def stem(papers: list[Document], word: str) -> frozenset[int]:
    index = Index()
    index.update(papers)
    row = index._memory.execute("select stem from vocabulary where word = ?", (word,)).fetchone()
    return frozenset(row or ())


@given(PAPERS, st.lists(st.sampled_from(WORDS), min_size=1, max_size=3, unique=True), st.booleans())
def test_it_ranks_as_fts5(texts, words, every):
    papers = documents(texts)
    table = sqlite3.connect(":memory:")
    table.execute(f"create virtual table papers using fts5({', '.join(COLUMNS)}, tokenize = 'porter unicode61')")
    table.executemany("insert into papers values (?, ?, ?, ?, ?)", [p.columns for p in papers])
    wanted = (" AND " if every else " OR ").join(f'"{w}"' for w in words)
    score = f"bm25(papers, {', '.join(map(str, WEIGHTS))})"
    expected = table.execute(f"select rowid - 1, -{score} from papers where papers match ?", (wanted,)).fetchall()
    groups = [[stem(papers, word)] for word in words]
    found = postings_of(papers, at_once=len(papers)).ranked(groups, 100, every=every)
    scores = dict(expected)
    assert set(found) == scores.keys()
    ranked = [scores[row] for row in found]
    np.testing.assert_allclose(ranked, sorted(ranked, reverse=True), rtol=1e-5, atol=1e-9)


def test_papers_one_by_one_are_papers_all_at_once():
    rng = np.random.default_rng(0)
    texts = [(" ".join(rng.choice(WORDS, 3)), " ".join(rng.choice(WORDS, 20))) for _ in range(3 * SEGMENTS)]
    papers = documents([("paper", "of them all"), *texts])
    groups = [[stem(papers, "graph")], [stem(papers, "local") | stem(papers, "linear")]]
    one, all_ = postings_of(papers, at_once=1), postings_of(papers, at_once=len(papers))
    assert len(one.segments) <= SEGMENTS
    for every in (True, False):
        assert one.ranked(groups, 20, every=every) == all_.ranked(groups, 20, every=every)


def test_words_that_stand_for_one_another_count_as_one():
    papers = documents([("graph graph", ""), ("graph tensor", ""), ("kernel", ""), ("bound", ""), ("solve", "")])
    both = stem(papers, "graph") | stem(papers, "tensor")
    postings = postings_of(papers, at_once=5)
    rows, scores = postings._scored(both)
    assert rows.tolist() == [0, 1]
    assert scores[0] == pytest.approx(scores[1])


def test_nothing_is_found_for_a_word_that_no_paper_has():
    postings = postings_of(documents([("graph", "tensor"), ("kernel", "")]), at_once=2)
    assert postings.ranked([[frozenset()]], 5, every=True) == []
    assert postings.ranked([[frozenset({10_000})]], 5, every=False) == []
    assert Postings().ranked([[frozenset({0})]], 5, every=True) == []


def test_accents_and_ligatures_do_not_hide_a_paper():
    index = Index()
    index.update(documents([("Évariste Galois", "eﬃcient groups"), ("Ångström", "spectra"), ("kites", "fly")]))
    for query, key in (("evariste", "0"), ("Évariste", "0"), ("efficient", "0"), ("angstrom", "1"), ("ångstr", "1")):
        assert index.search(query)[:1] == [key]
    assert folded("naïve Öl") == ["naive", "ol"]
