"""The page itself: papers to read, to search, to run and to talk about, served to a browser.

Everything works without JavaScript; with it, results come as one types and a run is followed as it goes. What a paper
says of itself is hostile input: templates escape it and no script but ours runs.
"""

from locally.errors import UsageError

try:
    import fastapi  # noqa: F401
    import markdown_it  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as missing:
    raise UsageError(f"the page needs {missing.name}: pip install 'locally[page]'") from None

from locally.page.web.answers import BODY_LIMIT
from locally.page.web.app import create_app, say_where, serve

__all__ = ["BODY_LIMIT", "create_app", "say_where", "serve"]
