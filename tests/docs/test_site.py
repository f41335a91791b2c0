"""The site: built without a warning, nothing fetched by those who read it, every public name and link in its place."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs import api, arrows, decisions, hooks, records, reproduction
from docs.doctests import fenced
from docs.markdown import duration, plain
from docs.outline import Ask, Use

ROOT = Path(__file__).parent.parent.parent
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?(?:https?:)?//|<link[^>]*\shref=["']?(?:https?:)?//"""
)


@pytest.fixture
def site(tmp_path) -> Path:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    folder = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_whole_and_fetches_nothing(site):
    check_nothing_is_fetched(site)
    check_every_public_name_has_an_entry(site)
    check_what_the_decision_pictures_point_to(site)


def check_nothing_is_fetched(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    for page in pages:
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def check_every_public_name_has_an_entry(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").rglob("*.html"))
    anchors = set(re.findall(r'id="(locally\.[\w.]+)"', text))
    for module, names in api.public().items():
        for name in names:
            assert any(a.startswith(module) and a.endswith(f".{name}") for a in anchors), f"{module}.{name}"


def check_what_the_decision_pictures_point_to(site: Path) -> None:
    for wing in decisions.TREES:
        page = (site / "wings" / f"{wing}.html").read_text(encoding="utf-8")
        for target in re.findall(r'<a href="#([\w-]+)"><rect', page):
            assert f'id="{target}"' in page, (wing, target)


def leaves(tree: Ask) -> list[Use]:
    found = []
    for _, leads_to in tree.answers:
        if isinstance(leads_to, Ask):
            found += leaves(leads_to)
        elif isinstance(leads_to, Use):
            found.append(leads_to)
    return found


def test_every_wing_has_a_page_and_a_picture_that_lead_to_each_of_its_papers():
    wings = {paper.wing for paper in records.papers()}
    assert decisions.TREES.keys() == wings | {"linalg"}
    assert {leaf.slug for leaf in leaves(decisions.TREES["linalg"])} == {r.split(".")[-1] for r in api.rooms("linalg")}
    pages = {str(page.relative_to(hooks.SITE)) for page in hooks.SITE.rglob("*.md")}
    for wing in wings:
        assert f"wings/{wing}.md" in pages
        of_wing = {paper.slug for paper in records.papers() if paper.wing == wing}
        assert {leaf.slug for leaf in leaves(decisions.TREES[wing])} == of_wing


def test_the_pictures_name_what_is_public():
    for wing, tree in decisions.TREES.items():
        names = {n for module, group in api.public().items() if module.startswith(f"locally.{wing}.") for n in group}
        for leaf in leaves(tree):
            assert leaf.call in names or " " in leaf.call, (wing, leaf.call)


def test_every_arrow_of_the_picture_points_downwards():
    level = {part: i for i, floor in enumerate(arrows.floors()) for part in floor}
    for one, other in arrows.between_parts():
        assert level[one] <= level[other], (one, other)
    assert {"cli", "page", "papers", "linalg", "evidence", "checks"} <= level.keys()


def test_the_full_size_page_names_every_paper_that_runs_and_every_file_that_it_reads():
    page = reproduction.sections()
    for paper in records.papers():
        if paper.experiment is None:
            continue
        assert f"## {paper.number} {paper.slug}\n" in page
        calls = paper.experiment.read_text(encoding="utf-8").count("run.data(")
        section = page.split(f"## {paper.number} {paper.slug}\n")[1].split("\n## ")[0]
        assert ("--data DIR" in section) == (calls > 0)


def test_an_unknown_section_is_named():
    with pytest.raises(ValueError, match="no section 'Nowhere'"):
        hooks.section_of("README.md Nowhere")


def test_examples_of_docstrings_become_code():
    shown = fenced("Adds one.\n\n>>> f(1)\n2\n\nMore.")
    assert shown == "Adds one.\n\n```pycon\n>>> f(1)\n2\n```\n\nMore."


def test_text_is_shown_as_it_stands():
    assert plain("a_b | x <= [1, 2]*") == r"a\_b &#124; x &lt;= \[1, 2\]\*"
    assert [duration(s) for s in (3, 119, 120, 7200, 200000)] == ["3 s", "119 s", "2 min", "2 h", "2.31 days"]
