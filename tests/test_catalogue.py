"""Cards: all 31 are there and true, a malformed one is named, and papers are found by what people type."""

import importlib
from pathlib import Path

import pytest

from locally import catalogue
from locally.catalogue import CardError, find, load, read_card, search
from locally.errors import UsageError

PAPERS = load([catalogue.BUILT_IN])

CARD = """
number = 1
slug = "first-paper"
title = "First"
authors = ["A"]
published = 2020-01-01
venue = "V"
wing = "solvers"
summary = "S"
[[claims]]
statement = "s"
metric = "m"
method = "o"
relation = "<="
value = 1
source = "t"
"""


def test_the_page_holds_its_31_papers():
    assert [p.number for p in PAPERS] == list(range(1, 32))


@pytest.mark.parametrize("paper", PAPERS, ids=lambda p: p.slug)
def test_a_card_is_readable_and_true(paper):
    assert 2 <= paper.summary.count(". ") + 1 <= 6, "a summary has two to five sentences"
    assert paper.keywords
    assert paper.arxiv
    assert paper.runnable == bool(paper.objects), "a runnable paper names its public objects, and only such a one"
    assert paper.runnable == bool(paper.example)
    for path in paper.objects:
        module, name = path.rsplit(".", 1)
        assert callable(getattr(importlib.import_module(module), name)), path


@pytest.mark.parametrize("paper", [p for p in PAPERS if p.example], ids=lambda p: p.slug)
def test_the_example_on_the_card_runs_and_says_something(paper, capsys):
    exec(compile(paper.example, paper.slug, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("old", "new", "key", "reason"),
    [
        ('title = "First"', "", "title", "is missing"),
        ('title = "First"', 'title = ""', "title", "is empty"),
        ('title = "First"', "title = 3", "title", "type str"),
        ('title = "First"', 'titel = "First"\ntitle = "First"', "titel", "title?"),
        ("number = 1", "number = true", "number", "type int"),
        ('authors = ["A"]', "authors = [1]", "authors", "list of non-empty strings"),
        ('slug = "first-paper"', 'slug = "First Paper"', "slug", "lower-case"),
        ('slug = "first-paper"', 'slug = "other"', "slug", "other.toml"),
        ("published = 2020-01-01", 'published = "2020"', "published", "type date"),
        ('relation = "<="', 'relation = "=="', "claims[1].relation", "one of <=, >="),
        ("value = 1", "value = [1, 2, 3]", "claims[1].value", "[low, high]"),
        ("value = 1", "value = [1, 2]", "claims[1].value", "one number"),
        ("value = 1", "", "claims[1].value", "is missing"),
        ('source = "t"', 'source = "t"\nscale = "huge"', "claims[1].scale", "one of quick"),
        ("[[claims]]", "[[claim]]", "claims", "is missing"),
        ("number = 1", "number = ", "syntax", "line 2"),
        ("[[claims]]", "[work]\ntime = [1, 1, 1]\n[[claims]]", "work.memory", "is missing"),
        ("[[claims]]", "[work]\ntime = [1, 1]\nmemory = [1, 1, 1]\n[[claims]]", "work.time", "3 positive numbers"),
        ("[[claims]]", "[work]\ntime = [0, 1, 1]\nmemory = [1, 1, 1]\n[[claims]]", "work.time", "3 positive"),
        ("[[claims]]", "[work]\ntime = [1, 2, 1]\nmemory = [1, 1, 1]\n[[claims]]", "work.time", "1 at default"),
        ("[[claims]]", "[work]\ntime = [1, 1, 1]\nmemory = [1, 1, nan]\n[[claims]]", "work.memory", "3 positive"),
        (
            "[[claims]]",
            "[work]\ntime = [1, 1, 1]\nmemory = [1, 1, 1]\noperations = [1, -1]\n[[claims]]",
            "work.operations",
            "2 non-negative",
        ),
        ("[[claims]]", "[work]\ntime = [1, 1, 1]\nmemory = [1, 1, 1]\ndisk = inf\n[[claims]]", "work.disk", "GiB"),
        ("[[claims]]", "[work]\ntime = [1, 1, 1]\nmemory = [1, 1, 1]\ndisc = 1\n[[claims]]", "work.disc", "disk?"),
    ],
)
def test_a_malformed_card_is_named_with_key_and_reason(tmp_path, old, new, key, reason):
    file = tmp_path / "first_paper.toml"
    file.write_text(CARD.replace(old, new))
    with pytest.raises(CardError) as caught:
        read_card(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: {key}: ")
    assert reason in message


def test_a_well_formed_card_is_read(tmp_path):
    (tmp_path / "first_paper.toml").write_text(CARD)
    paper = read_card(tmp_path / "first_paper.toml")
    assert (paper.slug, paper.year, paper.runnable) == ("first-paper", 2020, False)
    assert paper.claims[0].threshold == "<= 1"


def test_two_cards_cannot_share_a_number(tmp_path):
    (tmp_path / "first_paper.toml").write_text(CARD)
    (tmp_path / "second_paper.toml").write_text(CARD.replace("first-paper", "second-paper"))
    with pytest.raises(CardError, match="number: 1 belongs to 'First' already"):
        load([tmp_path])


@pytest.mark.parametrize(
    "name", ["learning-to-relax", "9", "09", "learning-to-r", "2310.02246", "arXiv:2310.02246v2", " Learning-To-Relax"]
)
def test_a_paper_is_found_by_slug_number_prefix_and_arxiv_id(name):
    assert find(PAPERS, name).number == 9


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lerning-to-relax", "learning-to-relax"),
        ("local", "start of several papers: local-lipschitz"),
        ("nash", "small-gain-nash"),
        ("", "no paper ''"),
        ("77", "no paper '77'"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, says):
    with pytest.raises(UsageError) as caught:
        find(PAPERS, name)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("query", "slug"),
    [
        ("Lipschitz", "local-lipschitz"),
        ("nash equilibria", "small-gain-nash"),
        ("prunning llm", "tyr-the-pruner"),  # misspelt
        ("jacot kernel", "neural-tangent-kernel"),
        ("2310.02246", "learning-to-relax"),
    ],
)
def test_search_ranks_the_obvious_paper_first(query, slug):
    assert search(PAPERS, query)[0].slug == slug


def test_search_for_nothing_known_finds_nothing():
    assert search(PAPERS, "zzyzx qwfp") == []


def test_every_word_must_match():
    found = search(PAPERS, "privacy regression")
    assert found
    assert {"ldp-sparse-regression"} <= {p.slug for p in found}
    assert "neural-tangent-kernel" not in {p.slug for p in found}


def test_an_experiment_that_defines_nothing_is_named(tmp_path):
    (tmp_path / "first_paper.toml").write_text(CARD)
    (tmp_path / "first_paper.py").write_text("experiment = 3\n")
    with pytest.raises(UsageError, match=r"first_paper\.py defines no function experiment"):
        catalogue.experiment(read_card(tmp_path / "first_paper.toml"))


def test_a_missing_extra_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALLY_PAPERS", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="nowhere, which is not a folder"):
        load()


def test_the_built_in_folder_needs_no_registration():
    """Adding a paper touches no existing file: no module lists the papers by name."""
    sources = [p.read_text() for p in Path(catalogue.__file__).parent.glob("*.py")]
    assert not any("learning-to-relax" in s or "learning_to_relax" in s for s in sources)


def test_a_card_parsed_before_is_read_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALLY_HOME", str(tmp_path / "home"))
    cards = tmp_path / "cards"
    cards.mkdir()
    file = cards / "first_paper.toml"
    file.write_text(CARD)
    assert load([cards]) == load([cards])
    monkeypatch.setattr(catalogue.tomllib, "loads", lambda text: pytest.fail("parsed again without need"))
    assert load([cards])[0].published == "2020-01-01"
    monkeypatch.undo()
    monkeypatch.setenv("LOCALLY_HOME", str(tmp_path / "home"))
    file.write_text(CARD.replace('"First"', '"Changed"'))
    assert load([cards])[0].title == "Changed"


@pytest.mark.parametrize("content", ["", "[]", "[1]", '{"half', "\x00"])
def test_a_damaged_memory_of_cards_is_made_anew(tmp_path, monkeypatch, content):
    monkeypatch.setenv("LOCALLY_HOME", str(tmp_path))
    (tmp_path / "cards.json").write_text(content)
    assert len(load([catalogue.BUILT_IN])) == 31
    assert len(catalogue.json.loads((tmp_path / "cards.json").read_text())) == 31
