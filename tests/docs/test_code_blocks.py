"""Every block of code on the site and in the README is true: Python runs, commands and their options exist."""

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import typer

from docs import hooks, records
from locally.cli import app

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
WRITTEN = {str(p.relative_to(hooks.SITE)): p.read_text(encoding="utf-8") for p in sorted(hooks.SITE.rglob("*.md"))}
SHOWN = {**hooks.written(), **hooks.generated(), "README.md": (ROOT / "README.md").read_text(encoding="utf-8")}
GROUP = typer.main.get_command(app)


def blocks(markdown: str, language: str) -> list[str]:
    """Blocks of one language, those in boxes that open on a click included."""
    return [
        "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))
        for indent, name, code in BLOCK.findall(markdown)
        if name == language
    ]


@pytest.mark.parametrize("page", [page for page, text in WRITTEN.items() if blocks(text, "python")])
def test_the_code_of_a_page_runs(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks(WRITTEN[page], "python"):
        exec(compile(code, page, "exec"), names)
    assert capsys.readouterr().out.strip()


def test_the_rest_of_the_code_is_run_by_other_tests():
    """The cards' examples by those of the catalogue, README and CONTRIBUTING by those of the README."""
    own = {code for text in WRITTEN.values() for code in blocks(text, "python")}
    elsewhere = {f"{paper.example}\n" for paper in records.papers()}
    for name in ("README.md", "CONTRIBUTING.md"):
        elsewhere.update(blocks((ROOT / name).read_text(encoding="utf-8"), "python"))
    shown = {code for text in SHOWN.values() for code in blocks(text, "python")}
    assert shown <= own | elsewhere
    assert shown >= own


def test_every_block_is_of_a_known_kind():
    kinds = {name for text in SHOWN.values() for _, name, _ in BLOCK.findall(text)}
    assert kinds <= {"", "python", "toml"}


def commands(text: str) -> list[list[str]]:
    """Lines of shell blocks and code in running text, in words, where they start with a command."""
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    lines += re.findall(r"(?<!`)`((?:locally|make) [^`]+)`(?!`)", text)
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", SHOWN)
def test_commands_are_as_the_programs_take_them(page):
    for words in commands(SHOWN[page]):
        while "=" in words[0]:  # variables before a command
            words = words[1:]
        check = CHECKS.get(words[0])
        assert check, f"{page}: who checks {' '.join(words)}?"
        check(words[1:])


def check_locally(words: list[str]) -> None:
    assert isinstance(GROUP, click.Group)
    words = [word for word in words if word != "..."]
    command = GROUP.commands[words[0]]
    if len(words) > 1:  # otherwise it is only spoken of
        command.make_context(words[0], words[1:])  # refuses what is no option


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words if "=" not in target)


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
    assert {name for group in extras for name in group.split(",")} <= project["optional-dependencies"].keys()


def check_dask(words: list[str]) -> None:
    scheduler = pytest.importorskip("distributed.cli.dask_scheduler")
    worker = pytest.importorskip("distributed.cli.dask_worker")
    {"scheduler": scheduler, "worker": worker}[words[0]].main.make_context(words[0], words[1:])


CHECKS = {"locally": check_locally, "make": check_make, "pip": check_pip, "dask": check_dask}


@pytest.mark.parametrize("line", ["locally run --all --cores 3", "locally ran x", "locally serve --port x"])
def test_a_command_that_does_not_exist_is_seen(line):
    with pytest.raises((click.UsageError, KeyError)):
        check_locally(line.split()[1:])
