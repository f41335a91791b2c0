"""A home of its own for each test, and papers whose experiments behave as the test needs."""

from collections.abc import Callable
from pathlib import Path

import pytest

CARD = """
number = {number}
slug = "{slug}"
title = "{title}"
authors = ["Ada Lovelace", "Charles Babbage"]
published = 1843-09-01
venue = "Taylor's Scientific Memoirs"
wing = "solvers"
keywords = ["engine"]
summary = "Notes on the engine <b>that weaves</b> algebraical patterns."
example = "print(1 + 1)"

[[claims]]
statement = "The error stays below one"
metric = "error"
method = "ours"
relation = "<="
value = 1.0
source = "Note G"
"""

GOOD = """
def experiment(run):
    for seed in run.track(run.seeds, "seeds"):
        for n in (1, 2, 4):
            run.record("ours", "error", 0.5 / n + 0.01 * seed, seed=seed, n=n)
            run.record("theirs", "error", 1.5 / n, seed=seed, n=n)
    run.plot_lines(x="n", y="error", log=True, caption="Error over n")
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """LOCALLY_HOME for this test and the processes that it starts."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LOCALLY_HOME", str(folder))
    monkeypatch.delenv("LOCALLY_DATABASE", raising=False)
    return folder


@pytest.fixture
def add_paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """add_paper("slug", code) puts a paper on the page; its number follows the order of the calls from 901."""
    folder = tmp_path / "papers"
    folder.mkdir()
    monkeypatch.setenv("LOCALLY_PAPERS", str(folder))
    numbers = iter(range(901, 1000))

    def add(slug: str, code: str | None = GOOD, *, card: str | None = None, title: str = "") -> Path:
        stem = folder / slug.replace("-", "_")
        text = card or CARD.format(number=next(numbers), slug=slug, title=title or f"Sketch of {slug}")
        stem.with_suffix(".toml").write_text(text)
        if code is not None:
            stem.with_suffix(".py").write_text(code)
        return stem.with_suffix(".toml")

    return add
