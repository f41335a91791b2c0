"""Answers of the store that are good until somebody writes to it."""

from collections.abc import Callable
from typing import Generic, TypeVar

from locally.page.store import Store

T = TypeVar("T")


class Lately(Generic[T]):
    """`lately()` is what `read()` gave, asked again only after a change of the database by whatever process.

    On a database that cannot tell of changes it is asked each time.
    """

    def __init__(self, store: Store, read: Callable[[], T]) -> None:
        self._store, self._read = store, read
        self._kept: tuple[object, T] | None = None

    def __call__(self) -> T:
        stamp, kept = self._store.stamp(), self._kept
        if kept is None or kept[0] != stamp:  # the stamp is older than the answer, so that no change is missed
            kept = self._kept = stamp, self._read()
        return kept[1]
