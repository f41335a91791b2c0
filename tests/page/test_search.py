"""Search finds what a reader means: words, beginnings, misspellings, other words for the same; nothing breaks it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally import catalogue
from locally.page.search import Index


@pytest.fixture(scope="module")
def index() -> Index:
    return Index([p for p in catalogue.load() if p.number <= 31])


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("halpern", "halpern"),
        ("lipschits", "local-lipschitz"),  # no paper spells it so
        ("sinkhrn", "manifold-linearizing"),
        ("jacot", "neural-tangent-kernel"),
        ("2206.00846", "dp-stationary-points"),
        ("prun", "tyr-the-pruner"),  # half typed
        ("byzantine machines", "monna"),
        ("local differential privacy regression", "ldp-sparse-regression"),
    ],
)
def test_the_paper_that_is_meant_comes_first(index, query, first):
    assert index.search(query)[0].slug == first


def test_other_words_for_the_same_are_found_too(index):
    found = [p.slug for p in index.search("language model compression by removing heads", 5)]
    assert "tyr-the-pruner" in found


def test_twins_are_like_each_other(index):
    assert index.similar("auglocal")[0].slug == "momentum-auxiliary-network"
    assert index.similar("no-such-paper") == []
    assert all(p.slug != "halpern" for p in index.similar("halpern"))


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_no_query_breaks_it(index, query):
    found = index.search(query, 5)
    assert len(found) <= 5
    assert len({p.slug for p in found}) == len(found)


def test_one_paper_is_a_catalogue_too():
    (only,) = Index(catalogue.load()[:1]).search("constrained")
    assert only.number == 1
