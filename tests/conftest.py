"""Fixtures for every test."""

from pathlib import Path

import jaxtyping
import pytest
from hypothesis import settings

# the same examples each time, so that a change is judged by itself; `pytest --hypothesis-profile=random` looks further
settings.register_profile("locally", deadline=None, max_examples=40, derandomize=True)
settings.register_profile("random", deadline=None, max_examples=200, print_blob=True)
settings.load_profile("locally")


@pytest.fixture
def without_shape_checks():
    """Let wrong shapes reach the function's own refusal, as they do outside the test run."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def golden() -> Path:
    """Folder of the reference vectors."""
    return Path(__file__).parent / "golden"
