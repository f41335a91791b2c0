"""The README and CONTRIBUTING say what is true: their code runs, their table is what the stored runs give."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.table import PAGE, page, results
from docs.readme import BEGIN, CLAIMS, END, stored_runs, summary, table
from locally import catalogue

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_readmes_code_runs(code):
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_the_tables_are_generated_from_cards_and_runs():
    papers, runs = catalogue.load([catalogue.BUILT_IN]), stored_runs()
    assert README.split(BEGIN)[1].split(END)[0] == summary(papers, runs)
    assert CLAIMS.read_text(encoding="utf-8") == table(papers, runs)


def test_the_page_of_benchmarks_is_generated_from_the_stored_results():
    assert PAGE.read_text(encoding="utf-8").startswith(page(results()))


def test_every_runnable_paper_has_a_stored_run():
    runnable = {p.slug for p in catalogue.load([catalogue.BUILT_IN]) if p.runnable}
    assert runnable <= stored_runs().keys()


def test_the_picture_is_there():
    assert "docs/report.png" in README
    assert (ROOT / "docs" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_commands_in_the_readme_exist():
    words = set(re.findall(r"^locally (\w+)", README, re.MULTILINE))
    shown = subprocess.run([sys.executable, "-m", "locally.cli", "--help"], capture_output=True, text=True).stdout
    assert words
    assert all(re.search(rf"^\s+{word}\b", shown, re.MULTILINE) for word in words)
    targets = set(re.findall(r"`?make (\w+)", README + CONTRIBUTING))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_paper_of_contributing_is_added_by_its_two_files_alone(tmp_path):
    card = re.search(r"```toml\n(.*?)```", CONTRIBUTING, re.DOTALL).group(1)
    code = re.search(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL).group(1)
    (tmp_path / "richardson.toml").write_text(card)
    (tmp_path / "richardson.py").write_text(code)
    places = {"LOCALLY_PAPERS": str(tmp_path), "LOCALLY_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "locally.cli", "run", "richardson", "--scale", "quick", "--json"]
    ended = subprocess.run(command, env=os.environ | places, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert '"verdict": "holds"' in ended.stdout
