"""Where Locally keeps what it stores: the user's data folder, or the one that LOCALLY_HOME names."""

import os
from pathlib import Path

from locally.errors import UsageError


def home() -> Path:
    """The data folder, made when it is missing.

    Raises:
        UsageError: it cannot be made or written to.
    """
    named = os.environ.get("LOCALLY_HOME")
    if named:
        folder = Path(named).expanduser()
    else:
        from platformdirs import user_data_path

        folder = user_data_path("locally", appauthor=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot write the data folder {folder}: {error.strerror}; name another with LOCALLY_HOME"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write the data folder {folder}; name another with LOCALLY_HOME")
    return folder


def database_url() -> str:
    """SQLite in the data folder, or the database that LOCALLY_DATABASE names by SQLAlchemy URL."""
    return os.environ.get("LOCALLY_DATABASE") or f"sqlite:///{home() / 'runs.sqlite'}"
