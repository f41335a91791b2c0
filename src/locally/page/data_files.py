"""Which files of the user's an experiment reads, read off its calls of `run.data`."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path


def data_files(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Path and description of each `run.data` call; <name> stands for what is only known when it runs.

    >>> list(data_files(ast.parse("NAME = 'a9a'\\nrun.data(f'libsvm/{NAME}', f'rows of {part}')")))
    [('libsvm/a9a', 'rows of <part>')]
    """
    known = dict(_constants(tree))
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and is_run_method(n.func, "data")]
    calls.sort(key=lambda call: (call.lineno, call.col_offset))
    # one with other arguments than two in their places does not say here what it reads
    told = [c.args for c in calls if len(c.args) == 2 and not any(isinstance(a, ast.Starred) for a in c.args)]
    yield from dict.fromkeys((_words(path, known), _words(what, known)) for path, what in told)


def missing(experiment: Path, folder: Path | None) -> list[tuple[str, str]]:
    """Those of an experiment's files of which nothing is in the folder; some it may do without."""
    tree = ast.parse(experiment.read_text(encoding="utf-8"))
    return [(path, what) for path, what in data_files(tree) if not _there(path, folder)]


def is_run_method(function: ast.expr, name: str) -> bool:
    return isinstance(function, ast.Attribute) and function.attr == name and is_run(function.value)


def is_run(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "run"


def _there(path: str, folder: Path | None) -> bool:
    """Whether some file has this name; one that is all placeholders cannot be looked for."""
    pattern = re.sub("<[^<>]*>", "*", path)
    return not pattern.strip("*/") or (folder is not None and any(folder.glob(pattern)))


def _constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Names at the top of the module that stand for words."""
    for node in tree.body:
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts))
            for name, value in pairs:
                if isinstance(name, ast.Name) and isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield name.id, value.value


def _words(node: ast.expr, known: dict[str, str]) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    said = ""
    for part in parts:
        inner = part.value if isinstance(part, ast.FormattedValue) else part
        if isinstance(inner, ast.Constant):
            said += str(inner.value)
        else:
            said += known.get(ast.unparse(inner), f"<{ast.unparse(inner)}>")
    return said
