"""Finished items of a long run, in files, so that an attempt after a kill takes up where this one stopped."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Kept:
    """The items of one call of `Run.parallel`.

    Args:
        folder: where the files stand; nothing is kept when it is None. Only our own runs write there: its files are
            unpickled.
        call: number of the call within its run.
    """

    def __init__(self, folder: Path | None, call: int) -> None:
        self._folder, self._call = folder, call

    def found(self, items: int) -> Iterator[tuple[int, Any]]:
        """Index and answer of each item that an earlier attempt has finished.

        A file that a power cut has left damaged counts as none: its item is worked out again.
        """
        import pickle

        for index in range(items if self._folder else 0):
            path = self._path(index)
            if not path.exists():
                continue
            try:
                answer = pickle.loads(path.read_bytes())
            except (pickle.UnpicklingError, EOFError):
                continue
            yield index, answer

    def put(self, index: int, answer: Any) -> None:
        """Keep an answer; one that cannot be pickled is worked out again after a kill."""
        import pickle

        if self._folder is None:
            return
        try:
            data = pickle.dumps(answer)
        except (pickle.PicklingError, TypeError, AttributeError):
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(index)
        path.with_suffix(".part").write_bytes(data)
        os.replace(path.with_suffix(".part"), path)

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._call}-{index}.item"
