"""How each paper is run at full size: what claims wait for it, which files it reads, what grows, what it needs.

Claims come from the cards; files and sizes are read off the experiment's code: its calls of `run.data`, and of
`run.pick`, where the sizes at default and at paper scale stand side by side.
"""

import ast
from collections.abc import Iterator

from docs import records
from docs.markdown import amount, duration, plain, table
from locally.evidence import Paper, Scale
from locally.page.data_files import data_files, is_run, is_run_method

SHORT = 70  # characters of code that a cell of a table can take
EXTRAS = {"gymnasium": "control", "transformers": "llm", "peft": "llm", "dp_accounting": "privacy", "onnx": "onnx"}


def sections() -> str:
    return "\n".join(section(paper) for paper in records.papers() if paper.experiment)


def section(paper: Paper) -> str:
    assert paper.experiment is not None
    tree = ast.parse(paper.experiment.read_text(encoding="utf-8"))
    files = list(data_files(tree))
    claims = [c for c in paper.claims if c.scale is Scale.PAPER]
    parts = [f"## {paper.number} {paper.slug}", ""]
    parts += [f"- {plain(c.statement)} ({plain(c.threshold)}; {plain(c.source)})" for c in claims]
    parts += ["", f"```\n{command(paper, tree, bool(files))}\n```", "", needs(paper, tree), ""]
    if files:
        parts += [table(("In the data folder", "What it is"), [(f"`{path}`", plain(what)) for path, what in files]), ""]
    grown = list(sizes(tree))
    if grown:
        head = ("Size", "default", "paper")
        parts += [table(head, [(plain(name), _code(small), _code(large)) for name, small, large in grown]), ""]
    return "\n".join(parts)


def command(paper: Paper, tree: ast.Module, reads: bool) -> str:
    device = " --device cuda" if on_device(tree) else ""
    return f"locally run {paper.slug} --scale paper{' --data DIR' if reads else ''}{device}"


def needs(paper: Paper, tree: ast.Module) -> str:
    said = []
    run = records.runs().get(paper.slug)
    if run:
        said.append(
            f"At default scale: {duration(run['seconds'])} and {amount(run['peak_memory_mib'])} MiB on "
            f"{run['machine']['cores']} cores."
        )
    said.append("Runs on a GPU when `--device` names one." if on_device(tree) else "Runs on processors alone.")
    extras = sorted({EXTRAS[name] for name in imported(tree) if name in EXTRAS})
    if extras:
        said.append(f"Extras: {', '.join(f'`{extra}`' for extra in extras)}.")
    return " ".join(said)


def on_device(tree: ast.Module) -> bool:
    """Whether the experiment places its tensors where `run.device` says."""
    return any(isinstance(n, ast.Attribute) and n.attr == "device" and is_run(n.value) for n in ast.walk(tree))


def imported(tree: ast.Module) -> Iterator[str]:
    """Packages that the experiment imports or requires."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
            yield ast.literal_eval(node.args[0])


def sizes(tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Name, value at default and value at paper scale, wherever the two differ and are short enough to show."""
    names = {
        node.value: f"{function.name.replace('_', ' ')}: {_target(node)}"
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
    }
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and is_run_method(node.func, "pick")):
            continue
        picked = {k.arg: k.value for k in node.keywords}
        if {"default", "paper"} <= picked.keys():
            for name, small, large in _differing(names.get(node, ""), picked["default"], picked["paper"], tree):
                if name and max(len(small), len(large)) <= SHORT:
                    yield name.removeprefix("experiment: "), small, large


def _differing(name: str, small: ast.expr, large: ast.expr, tree: ast.Module) -> Iterator[tuple[str, str, str]]:
    """Field by field for the two calls of one dataclass, otherwise as a whole."""
    fields = _fields(small, large, tree)
    for field, one, other in fields or [(name, small, large)]:
        if ast.unparse(one) != ast.unparse(other) and not (_hidden(one) or _hidden(other)):
            yield field, ast.unparse(one), ast.unparse(other)


def _hidden(value: ast.expr) -> bool:
    """Whether the value is a name whose meaning the reader does not see."""
    return isinstance(value, ast.Name) or (isinstance(value, ast.Call) and any(_hidden(v) for v in value.args))


def _fields(small: ast.expr, large: ast.expr, tree: ast.Module) -> list[tuple[str, ast.expr, ast.expr]]:
    if not (isinstance(small, ast.Call) and isinstance(large, ast.Call)):
        return []
    order = _fields_of(ast.unparse(small.func), tree)
    one, other = (
        dict(zip(order, call.args)) | {k.arg: k.value for k in call.keywords if k.arg} for call in (small, large)
    )
    return [(field.replace("_", " "), one[field], other[field]) for field in order if field in one and field in other]


def _fields_of(name: str, tree: ast.Module) -> list[str]:
    """Of a dataclass of the experiment, in order."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return [s.target.id for s in node.body if isinstance(s, ast.AnnAssign) and isinstance(s.target, ast.Name)]
    return []


def _target(assignment: ast.Assign) -> str:
    return ast.unparse(assignment.targets[0]).strip("()").replace("_", " ")


def _code(source: str) -> str:
    return f"`{source.replace('|', '&#124;')}`"
