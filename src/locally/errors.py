"""What goes wrong outside the mathematics, in words that the person at the keyboard can act on."""

import importlib
from types import ModuleType


class UsageError(Exception):
    """Something that the user can mend: the command line shows it as one line and ends with exit status 2."""


class MissingExtra(UsageError, ImportError):
    """An optional package is not installed; the message says which extra brings it."""


def require(package: str, extra: str) -> ModuleType:
    """Import `package`, which the optional dependency `extra` brings.

    >>> require("math", "control").floor(2.5)
    2
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise MissingExtra(f'{package} is not installed: pip install "locally[{extra}]" brings it') from None
