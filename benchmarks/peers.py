"""Peers whose needs clash with the project's: each in an environment of its own, asked through a process of its own.

A file beside the benchmark gives both sides: imported, it hands out `ask`; run as a module by the other environment's
interpreter, it answers requests, one JSON object a line.
"""

import atexit
import json
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parent / ".peers"


def environment(name: str, packages: Sequence[str], *, like_ours: bool = False) -> Path | None:
    """The interpreter of `name`'s environment with these packages in it; None, with the reason printed, if it fails.

    `like_ours`: what both sides use has the version that it has here.
    """
    folder = FOLDER / name
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.exists() and ready.read_text().splitlines() == list(packages):
        return python
    print(f"installing {', '.join(packages)} into {folder}")
    venv.create(folder, with_pip=True)
    pinned = ["-c", ROOT / "constraints.txt"] if like_ours else []
    command = [python, "-m", "pip", "install", "-q", *pinned, *packages]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        print(f"{name} is left out: {installed.stderr.strip().splitlines()[-1]}")
        return None
    ready.write_text("\n".join(packages))
    return python


def ask_in(
    name: str,
    packages: Sequence[str],
    module: str,
    variables: Mapping[str, str] | None = None,
    *,
    like_ours: bool = False,
) -> Callable[..., Any] | None:
    """`ask(task, **arguments)` of `module` run in `name`'s environment; None where that cannot be installed."""
    python = environment(name, packages, like_ours=like_ours)
    if python is None:
        return None
    worker = subprocess.Popen(
        [python, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | dict(variables or {}),
    )
    atexit.register(worker.kill)

    def ask(task: str, **arguments: Any) -> Any:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps({"task": task, **arguments}) + "\n")
        worker.stdin.flush()
        return json.loads(worker.stdout.readline())

    return ask


def answer(*tasks: Callable[..., Any]) -> None:
    """The other side: call the task that each request names and print what it returns."""
    known = {task.__name__: task for task in tasks}
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(known[request.pop("task")](**request)), flush=True)
