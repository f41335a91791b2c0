"""Shows the examples of docstrings as code: what stands after >>> becomes a block of its own in the reference."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?)(?:^(?!\s*$).+\n?)*", re.MULTILINE)


class Fenced(griffe.Extension):
    """Griffe calls it for every object that it reads."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """Every run of lines from a >>> to the next empty line between fences."""
    return EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", docstring).rstrip("\n")
