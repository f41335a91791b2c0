"""The command line, `locally list | show | search | run | report | fetch | serve`: one module a group of commands.

Exit status of `run`: 0 when every claim that the scale can decide holds, 1 when one does not, 2 for bad usage, 3 when
an experiment crashed. Whatever the user can mend is one line on standard error and exit status 2. Heavy libraries are
imported by the commands that need them.
"""

import sys
from typing import Annotated, NoReturn

import typer
from click import ClickException

from locally import __version__
from locally.cli.digest import digest
from locally.cli.fetching import fetch
from locally.cli.generate import generate
from locally.cli.linearize import linearize
from locally.cli.prune import prune
from locally.cli.reading import list_papers, search, show
from locally.cli.running import report, run
from locally.cli.serving import serve
from locally.cli.status import EXIT_INTERRUPTED, EXIT_NOT_HELD, EXIT_USAGE
from locally.cli.subscribe import subscribe
from locally.errors import UsageError

app = typer.Typer(
    help="Daily papers that run: methods for local and linear learning, each with its claim as an experiment.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> NoReturn:
    """Entry point: turn what the user can mend into one line and exit status 2."""
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UsageError as error:
        message = str(error)
    except ClickException as error:
        message = error.format_message() or "see locally --help"
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        sys.exit(EXIT_NOT_HELD)
    except (KeyboardInterrupt, typer.Abort):
        print("locally: stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print(f"locally: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(EXIT_USAGE)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"locally {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Daily papers that run: methods for local and linear learning, each with its claim as an experiment."""


app.command("list")(list_papers)
for command in (search, show, run, report, fetch, serve, generate, linearize, subscribe, digest, prune):
    app.command()(command)
