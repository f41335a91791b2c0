"""Search finds what a reader means: words, beginnings, misspellings, other words for the same; nothing breaks it."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally import catalogue
from locally.page.search import Document, Index, of_card


@pytest.fixture(scope="module")
def index() -> Index:
    index = Index()
    index.update([of_card(p) for p in catalogue.load() if p.number <= 31])
    return index


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
    assert index.search(query)[0] == first


def test_other_words_for_the_same_are_found_too(index):
    found = index.search("language model compression by removing heads", 5)
    assert "tyr-the-pruner" in found


def test_twins_are_like_each_other(index):
    assert index.similar("auglocal")[0] == "momentum-auxiliary-network"
    assert index.similar("no-such-paper") == []
    assert "halpern" not in index.similar("halpern")


@settings(max_examples=200)
@given(st.text(max_size=60))
def test_no_query_breaks_it(index, query):
    found = index.search(query, 5)
    assert len(found) <= 5
    assert len(set(found)) == len(found)


def test_one_paper_is_a_catalogue_too():
    index = Index()
    index.update([of_card(p) for p in catalogue.load()[:1]])
    assert index.search("constrained") == ["adasketch-newton"]


def test_the_place_of_one_text_is_that_among_many(index):
    basis = index._load().basis
    texts = ["private regression", "a pruned language model, pruned", "nothing of ours: zzyzx", "", "of the"]
    places = basis.places(basis.terms(texts))
    np.testing.assert_allclose([basis.place(text) for text in texts], places, atol=1e-6)


def test_a_collection_of_one_word_or_none_is_no_obstacle():
    for text, query in (("kites", "kites"), ("of the", "of"), ("paper", "paper")):
        index = Index()
        index.update([document("one", text)])
        assert index.search(query) == ["one"]
        index.update([document("two", "barrel organs play melodies")])
        assert index.search("melodies") == ["two"]


def document(key: str, text: str, **other) -> Document:
    return Document(key, title=text, keywords="", people="", summary="", claims="", **other)


@pytest.fixture(params=["memory", "file"])
def small(request, tmp_path) -> Index:
    index = Index(tmp_path / "search.sqlite" if request.param == "file" else None)
    index.update([document("loom", "weaving looms and cards"), document("organ", "barrel organs play melodies")])
    return index


class TestGrowing:
    def test_new_papers_are_found_at_once(self, small):
        assert small.search("telescope") == []
        small.update([document("star", "telescopes for double stars")])
        assert small.search("telescopes")[0] == "star"
        assert small.search("teelscope")[0] == "star"

    def test_a_changed_paper_is_found_by_its_new_words_only(self, small):
        small.update([document("loom", "steam engines")])
        assert small.search("steam") == ["loom"]
        assert small.search("weaving") == []
        assert small.search("melodies") == ["organ"]

    def test_cards_that_are_gone_are_not_found(self, small):
        small.update([document("card", "a card on kites", card=True)], cards={"card"})
        assert small.search("kites") == ["card"]
        small.update([], cards=set())
        assert small.search("kites") == []
        assert small.search("barrel") == ["organ"]

    def test_what_has_not_changed_is_not_written(self, small):
        before = small._load()
        small.update([document("organ", "barrel organs play melodies")])
        assert small._load() is before

    def test_the_basis_is_fitted_anew_when_the_collection_has_grown_by_half(self):
        words = [f"word{i} topic{i % 5} field{i % 3}" for i in range(40)]
        index = Index()
        index.update([document(f"d{i}", words[i]) for i in range(20)])
        fitted = [index._load().basis.fitted]
        for i in range(20, 40):
            index.update([document(f"d{i}", words[i])])
            if index._load().basis.fitted != fitted[-1]:
                fitted.append(index._load().basis.fitted)
        assert fitted == [20, 30]
        assert len(index._load().places) == 40

    def test_folding_in_gives_the_place_that_fitting_gave(self):
        papers = [of_card(p) for p in catalogue.load() if p.number <= 31]
        whole, grown = Index(), Index()
        whole.update(papers)
        grown.update(papers)
        twin = replace(papers[3], key="twin")
        grown.update([twin])
        loaded = grown._load()
        assert loaded.basis.fitted == len(papers)
        np.testing.assert_allclose(loaded.places[-1], loaded.places[3], atol=1e-6)
        np.testing.assert_allclose(loaded.places[:-1], whole._load().places, atol=1e-6)
        assert grown.similar("twin")[0] == papers[3].key

    def test_a_taste_is_learnt_from_what_was_folded_in_too(self, small):
        for i in range(6):
            small.update([document(f"k{i}", f"kites fly in wind {i}"), document(f"s{i}", f"ships sail on water {i}")])
        taste = small.taste({"k0", "k1", "k2"})
        assert taste.keys().isdisjoint({"k0", "k1", "k2"})
        assert min(taste[f"k{i}"] for i in (3, 4, 5)) > max(taste[f"s{i}"] for i in range(6))
        assert small.taste(set()) == small.taste({"nobody"}) == {}


class TestFile:
    def test_it_is_there_for_the_next_process_and_others_notice_what_is_new(self, tmp_path):
        one, other = Index(tmp_path / "x.sqlite"), Index(tmp_path / "x.sqlite")
        one.update([document("loom", "weaving looms"), document("organ", "barrel organs")], revision=7)
        assert other.search("looms") == ["loom"]
        assert other.revision == 7
        one.update([document("star", "double stars")])
        assert other.search("stars") == ["star"]
        assert Index(tmp_path / "x.sqlite").similar("star") != []

    def test_an_index_of_another_collection_starts_anew(self, tmp_path):
        index = Index(tmp_path / "x.sqlite")
        index.belongs_to("one")
        index.update([document("loom", "weaving looms")], revision=3)
        index.belongs_to("one")
        assert (index.revision, index.search("looms")) == (3, ["loom"])
        index.belongs_to("two")
        assert (index.revision, index.search("looms")) == (0, [])

    def test_an_update_that_fails_leaves_everything_as_it_was(self, small, monkeypatch):
        monkeypatch.setattr("locally.page.search.words.add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            small.update([document("star", "double stars"), document("loom", "changed")])
        assert small.search("stars") == []
        assert small.search("weaving") == ["loom"]

    def test_many_threads_search_while_one_writes(self, tmp_path):
        index = Index(tmp_path / "x.sqlite")
        index.update([document(f"d{i}", f"common word{i}") for i in range(30)])
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(index.search, "common") for _ in range(40)]
            for i in range(30, 40):
                index.update([document(f"d{i}", f"common word{i}")])
            assert all(30 <= len(found.result()) <= 40 for found in asked)
        assert len(index.search("common")) == 40


def test_a_large_change_is_loaded_behind_the_readers_back(tmp_path, monkeypatch):
    monkeypatch.setattr("locally.page.search.index.MANY", 5)
    one, other = Index(tmp_path / "x.sqlite"), Index(tmp_path / "x.sqlite")
    one.update([document(f"d{i}", f"weaving loom{i}") for i in range(10)])
    assert len(other.search("weaving")) == 10
    one.update([document("d0", "double stars")])  # what was loaded must be loaded anew
    assert "d0" in other.search("weaving")  # nobody waits
    other._behind.join()
    assert "d0" not in other.search("weaving")
    assert other.search("stars")[0] == "d0"
    one.update([document("few", "barrel organs")])
    assert other.search("organs")[0] == "few"  # a small one is there at once
