"""The reference: a page a room with its public names, filled from the docstrings, and the command line's options."""

import ast
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path

import click
import typer

from docs import api
from docs.markdown import plain, table
from locally.cli import app

TITLES = {"evidence": "The spine", "linalg": "The ground floor"}


def room_pages() -> dict[str, str]:
    """Markdown by path, a page for every module with public names."""
    pages: dict[str, str] = {}
    for module, names in api.public().items():
        path = page_of(module)
        pages[path] = pages.get(path, f"# {'.'.join(module.split('.')[:3])}\n") + _names(module, names)
    return pages


def page_of(module: str) -> str:
    """Rooms within a room share its page."""
    return "reference/" + "/".join(module.split(".")[1:3]) + ".md"


def _names(module: str, names: tuple[str, ...]) -> str:
    lines = [
        "",
        f"::: {module}",
        "    options:",
        "      members: []",
        "      heading_level: 2",
        "      show_root_heading: false",
        "",
    ]
    for name in names:
        lines += [f"::: {home_of(module, name)}.{name}", "    options:", "      heading_level: 2", ""]
    return "\n".join(lines)


def home_of(module: str, name: str) -> str:
    """The module to read a name's docstring from: the room, or the file that defines what the room loads on demand."""
    room = api.source(module)
    if name in _bound(room):
        return module
    for file in sorted(room.parent.glob("*.py")):
        if name in _bound(file):
            return f"{module}.{file.stem}"
    raise ValueError(f"{module} lists {name}, which no file of it defines")


@cache
def _bound(file: Path) -> frozenset[str]:
    """Names that a file defines or imports, for type checkers too."""
    found: set[str] = set()
    statements = list(ast.parse(file.read_text(encoding="utf-8")).body)
    for statement in statements:
        if isinstance(statement, ast.If):
            statements.extend(statement.body)
        elif isinstance(statement, ast.Import | ast.ImportFrom):
            found.update(alias.asname or alias.name for alias in statement.names)
        elif isinstance(statement, ast.ClassDef | ast.FunctionDef):
            found.add(statement.name)
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            found.update(target.id for target in targets if isinstance(target, ast.Name))
    return frozenset(found)


def rooms() -> str:
    """Every room with the first sentence of its docstring."""
    rows = []
    for path in room_pages():
        module = "locally." + path.removeprefix("reference/").removesuffix(".md").replace("/", ".")
        rows.append(
            (
                f"[`{module.removeprefix('locally.')}`]({path.removeprefix('reference/')})",
                plain(_first_sentence(module)),
            )
        )
    return table(("Room", "What it is"), rows)


def _first_sentence(module: str) -> str:
    return api.docstring(module).split("\n\n")[0].replace("\n", " ").strip()


def commands() -> str:
    """What each command of `locally` takes."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    functions = {
        typer.main.get_command_name(c.name or c.callback.__name__): c.callback
        for c in app.registered_commands
        if c.callback
    }
    return "\n".join(_command(name, command, functions[name]) for name, command in group.commands.items())


def _command(name: str, command: click.Command, function: Callable[..., object]) -> str:
    rows = []
    said = inspect.signature(function).parameters
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            usual = "" if parameter.default in (None, False, "") else f"`{parameter.default}`"
            words = ", ".join(f"`{option}`" for option in parameter.opts)
            rows.append((words, plain(parameter.help or ""), usual))
        else:
            rows.append((f"`{parameter.name}`", plain(said[parameter.name].annotation.__metadata__[0].help), ""))
    return f"## locally {name}\n\n{plain(command.help or '')}\n\n" + (
        table(("Option", "Meaning", "Default"), rows) if rows else ""
    )
