"""`locally serve`: the page in a browser."""

import re
from pathlib import Path
from typing import Annotated

import typer

from locally.errors import UsageError


def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; anything but this machine needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.")] = 8031,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Experiments to run at once; cores are shared out.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Folder with your data sets, for full-size runs.")] = None,
    token: Annotated[str | None, typer.Option(envvar="LOCALLY_TOKEN", help="Secret that a visitor must bring.")] = None,
    user_header: Annotated[
        str,
        typer.Option(
            envvar="LOCALLY_USER_HEADER",
            help="Header in which your reverse proxy names the user; let nobody reach the page past that proxy.",
        ),
    ] = "",
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Serve the page: read, search and run the papers in a browser."""
    from locally.page import LOOPBACK

    if host not in LOOPBACK and not token and not user_header:
        raise UsageError(
            f"--host {host} lets others in: give --token (or LOCALLY_TOKEN), at least 16 characters, or --user-header"
        )
    if user_header and not re.fullmatch(r"[A-Za-z0-9-]{1,100}", user_header):
        raise UsageError(f"--user-header must be the name of a header, such as X-Forwarded-User, got {user_header!r}")
    if token is not None and len(token) < 16:
        raise UsageError("--token must have at least 16 characters")
    if jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    if not 0 <= port < 65536:
        raise UsageError(f"--port must be 0 to 65535, got {port}")
    if data is not None and not data.is_dir():
        raise UsageError(f"--data names {data}, which is not a folder")
    from locally.page import web
    from locally.page.store import Store

    def opened(address: str) -> None:
        web.say_where(address)
        if open_it:
            import webbrowser

            webbrowser.open(address)

    where = str(data.resolve()) if data else ""
    web.serve(
        Store(),
        host=host,
        port=port,
        at_once=jobs,
        data=where,
        token=token,
        opened=opened,
        user_header=user_header,
    )
