"""The catalogue as it is now, without reading it anew for every page that is asked for."""

import os
from typing import Any

from locally import catalogue
from locally.evidence import Paper

_kept: tuple[Any, list[Paper]] | None = None


def load() -> list[Paper]:
    """All papers by number; read again when a file beside them has come, gone or changed.

    Raises:
        UsageError: as `catalogue.load` does.
    """
    global _kept
    seen = _stamps()
    if _kept is None or _kept[0] != seen:
        _kept = seen, catalogue.load()
    return _kept[1]


def _stamps() -> list[Any]:
    stamps: list[Any] = []
    for folder in catalogue.folders():
        try:
            with os.scandir(folder) as entries:
                files = sorted((e.name, s.st_mtime_ns, s.st_size) for e in entries if (s := e.stat()))
        except OSError:  # the catalogue says what is wrong with it
            files = []
        stamps.append((str(folder), files))
    return stamps
