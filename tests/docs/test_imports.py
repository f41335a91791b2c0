"""Who may import whom: the contracts of `.importlinter` hold, and they see what hides inside a function."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONTRACTS = ROOT / ".importlinter"
LINT = (
    "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(config_filename={!r}, no_cache=True))"
)

pytest.importorskip("importlinter")


def lint(sources: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which imports the package from `sources`."""
    return subprocess.run(
        [sys.executable, "-c", LINT.format(str(CONTRACTS))],
        env=os.environ | {"PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_contracts_hold():
    done = lint(ROOT / "src")
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("linalg/lanczos.py", "from locally.page.store import Store"),
        ("evidence/claims.py", "from locally import catalogue"),
        ("solvers/omega_bandit/solves.py", "from locally.optimize.constrained import Status"),
        ("papers/halpern.py", "from locally.papers import loop"),
        ("page/worker.py", "from locally.cli import app"),
    ],
)
def test_an_arrow_against_the_staircase_is_seen_inside_a_function_too(tmp_path, file, line):
    shutil.copytree(ROOT / "src" / "locally", tmp_path / "locally", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "locally" / file).open("a", encoding="utf-8") as source:
        source.write(f"\n\ndef late():\n    {line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "src" / "locally" / "py.typed").exists()
    assert "Typing :: Typed" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
