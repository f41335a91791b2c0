"""The public interface: what `docs/api.txt` lists is there, and nothing comes or goes without it."""

import importlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from docs import api
from locally.errors import MissingExtra

REGENERATE = "the public names changed: if on purpose, write the list anew with python -m docs.api"


def test_no_name_comes_or_goes_unnoticed():
    assert api.LISTED.read_text(encoding="utf-8") == api.listing(), REGENERATE


@pytest.mark.parametrize("module", api.public())
def test_what_is_listed_is_there(module):
    try:
        room = importlib.import_module(module)
        missing = [name for name in api.public()[module] if not hasattr(room, name)]
    except MissingExtra as error:
        pytest.skip(str(error))
    assert not missing


@pytest.mark.parametrize("module", api.public())
def test_what_is_listed_is_documented(module):
    try:
        room = importlib.import_module(module)
        silent = sorted({found for name in api.public()[module] for found in undocumented(name, getattr(room, name))})
    except MissingExtra as error:
        pytest.skip(str(error))
    assert not silent, "no docstring, neither its own nor that of a base:\n" + "\n".join(silent)


def undocumented(name: str, public: Any) -> Iterator[str]:
    """Whatever has no docstring, as "file: name": the public object, and each public method and property of a class."""
    if not inspect.isclass(public):
        if inspect.isfunction(public) and not public.__doc__:
            yield f"{file_of(inspect.unwrap(public).__module__)}: {name}"
        return
    own = vars(public).get("__doc__")
    if not own or own.startswith(f"{public.__name__}("):  # the latter is what `dataclass` writes by itself
        yield f"{file_of(public.__module__)}: {public.__qualname__}"
    documented = {
        key for base in public.__mro__ for key, member in vars(base).items() if getattr(member, "__doc__", "")
    }
    for base in public.__mro__:
        if not base.__module__.startswith(("locally.", __name__)):
            continue
        for key, member in vars(base).items():
            called = getattr(member, "__func__", member)  # of class and static methods
            counts = inspect.isfunction(called) or isinstance(member, property | cached_property)
            if counts and not key.startswith("_") and key not in documented:
                yield f"{file_of(base.__module__)}: {base.__qualname__}.{key}"


def file_of(module: str) -> str:
    path = Path(str(sys.modules[module].__file__))
    return str(path.relative_to(api.PACKAGE.parent)) if path.is_relative_to(api.PACKAGE) else path.name


def test_what_has_no_docstring_is_found():
    @dataclass
    class _Base:
        width: int

        def inherited(self): ...

        def told(self):
            """The width."""

    class Silent(_Base):
        def told(self): ...

        @property
        def half(self): ...

        @classmethod
        def of(cls): ...

        def _private(self): ...

    found = {line.rsplit(".", 1)[1] for line in undocumented("Silent", Silent)}
    assert found == {"Silent", "half", "of", "inherited"}
    assert len(list(undocumented("_Base", _Base))) == 2
    assert list(undocumented("found", lambda: None)) == ["test_api.py: found"]
    assert not list(undocumented("dataclass", dataclass))


def test_a_room_is_read_without_being_imported(tmp_path, monkeypatch):
    room = tmp_path / "wing" / "room"
    room.mkdir(parents=True)
    (room / "__init__.py").write_text('import nowhere_to_be_found\n\n__all__ = ["B", "a"]\n')
    monkeypatch.setattr(api, "PACKAGE", tmp_path)
    assert api.exported("locally.wing.room") == ("B", "a")
    assert api.rooms("wing") == ["locally.wing.room"]


def test_names_that_examples_import_are_public():
    code = "import numpy as np\nfrom locally.solvers.omega_bandit import SOR, ChebCB as C\nfrom math import pi\n"
    assert list(api.imported(code)) == ["locally.solvers.omega_bandit.SOR", "locally.solvers.omega_bandit.ChebCB"]
