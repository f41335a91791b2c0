"""The public interface: what `docs/api.txt` lists is there, and nothing comes or goes without it."""

import importlib

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
