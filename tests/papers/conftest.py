"""The experiments at quick scale, one run for all tests of a paper."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import jaxtyping
import pytest

from locally.evidence import Run


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def shapes_unchecked() -> Callable[[], AbstractContextManager[None]]:
    """For whole experiments: checks of shapes, which the methods' own tests make, take longer than they do."""
    return unchecked


@pytest.fixture(scope="module")
def quick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The paper that the test file is named after, with the file's SEEDS or the first two."""
    stem = request.module.__name__.rpartition("test_")[2]
    experiment = importlib.import_module(f"locally.papers.{stem}").experiment
    seeds = getattr(request.module, "SEEDS", (0, 1))
    run = Run(scale="quick", seeds=seeds, scratch=tmp_path_factory.mktemp("scratch"))
    with unchecked():
        experiment(run)
    return run
