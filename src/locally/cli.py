"""The command line: `locally list | show | search | run | report | serve`.

Exit status of `run`: 0 when every claim that the scale can decide holds, 1 when one does not, 2 for bad usage, 3 when
an experiment crashed. Whatever the user can mend is one line on standard error and exit status 2. Heavy libraries are
imported by the commands that need them.
"""

import json
import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from click import ClickException

from locally import __version__, catalogue
from locally.errors import UsageError
from locally.evidence import Evidence, Outcome, Paper, Scale, Status

if TYPE_CHECKING:
    from locally.page.store import Store

EXIT_NOT_HELD, EXIT_USAGE, EXIT_CRASHED, EXIT_INTERRUPTED = 1, 2, 3, 130
BADGE = {"holds": "green", "fails": "red", "inconclusive": "yellow"}
ANSI = {"holds": 32, "fails": 31, "inconclusive": 33, "verdict": 0}

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


@app.command("list")
def list_papers(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
) -> None:
    """List the papers: number, title, year, wing, verdict of the last run and its age."""
    from locally.page.glance import last_runs

    papers, last = catalogue.load(), last_runs()
    if as_json:
        rows = []
        for p in papers:
            run = last.get(p.slug)
            rows.append(
                {
                    "number": p.number,
                    "slug": p.slug,
                    "title": p.title,
                    "year": p.year,
                    "wing": p.wing,
                    "runnable": p.runnable,
                    "verdict": run.label if run else None,
                    "scale": str(run.scale) if run else None,
                    "started": run.started if run else None,
                }
            )
        print(json.dumps(rows, ensure_ascii=False))
        return
    _print_papers(papers, last)


@app.command()
def search(words: Annotated[list[str], typer.Argument(help="Words to look for.")]) -> None:
    """Find papers by words of their title, authors, keywords, summary and claims."""
    from locally.page.glance import last_runs

    found = catalogue.search(catalogue.load(), " ".join(words))
    if not found:
        raise UsageError(f"nothing found for {' '.join(words)!r}")
    _print_papers(found, last_runs())


@app.command()
def show(slug: Annotated[str, typer.Argument(help="Slug, its beginning, number or arXiv id.")]) -> None:
    """Show a paper's card, its claims, the last evidence and how to call it from Python."""
    from rich.console import Console
    from rich.markup import escape

    from locally.page.store import Store

    paper = catalogue.find(catalogue.load(), slug)
    evidence = Store().latest(paper.slug)
    console = Console(highlight=False)
    console.print(f"[bold]{escape(paper.title)}[/bold]")
    console.print(escape(f"{', '.join(paper.authors)}. {paper.venue}, {paper.published}."))
    console.print(f"number {paper.number} · {paper.slug} · {paper.wing}" + _arxiv_link(paper), style="dim")
    console.print(f"\n{escape(paper.summary)}\n")
    findings = evidence.verdict.findings if evidence else ()
    for i, claim in enumerate(paper.claims):
        console.print(f"[bold]Claim.[/bold] {escape(claim.statement)} ({escape(claim.source)})")
        console.print(escape(f"  claimed:  {claim.metric}, {claim.method} {claim.threshold}"))
        if i < len(findings) and findings[i].claim == claim:
            console.print(f"  measured: {escape(findings[i].measured or '-')}  {_badge(findings[i].label)}")
    if evidence is None:
        console.print("\nnot run yet" if paper.runnable else "\nnot yet runnable: the method has no experiment")
    else:
        console.print(f"\nLast run: {_badge(evidence.label)} {escape(evidence.verdict.reason)}")
        console.print(f"{evidence.started}, {evidence.seconds:.1f} s, {evidence.peak_memory_mib:.0f} MiB", style="dim")
        console.print(f"{evidence.command}", style="dim")
    if paper.example:
        console.print("\n[bold]From Python[/bold]")
        console.print(escape(paper.example))


@app.command()
def run(
    slugs: Annotated[list[str] | None, typer.Argument(help="Slugs, their beginnings, numbers or arXiv ids.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Run every paper that has an experiment.")] = False,
    scale: Annotated[str, typer.Option(help="quick (10 s), default (60 s) or paper (full size).")] = "default",
    seeds: Annotated[int | None, typer.Option(help="Number of seeds; 3, 5 or 10 by scale.")] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Experiments to run at once; cores are shared out.")] = 1,
    resume: Annotated[bool, typer.Option(help="Skip what is stored for this code, scale, seeds and device.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per paper and no report.")] = False,
    device: Annotated[str, typer.Option(help="A torch device, such as cpu or cuda:0.")] = "cpu",
    data: Annotated[Path | None, typer.Option(help="Folder with your data sets, for scale paper.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for each experiment; 0 for the scale's own.")] = 0.0,
    memory_limit: Annotated[float, typer.Option(help="MiB for each experiment; 0 for most of the machine.")] = 0.0,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the report.")] = None,
) -> None:
    """Run papers' experiments, store their evidence, and say whether the claims hold."""
    from locally.page.runner import SEEDS, Job, run_jobs
    from locally.page.store import Store

    chosen = _choose(slugs or [], everything)
    wanted = _scale(scale)
    count = SEEDS[wanted] if seeds is None else seeds
    for name, value, least in (("--seeds", count, 1), ("--jobs", jobs, 1)):
        if value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    for name, limit in (("--time-limit", time_limit), ("--memory-limit", memory_limit)):
        if not 0 <= limit < float("inf"):
            raise UsageError(f"{name} must be non-negative and finite, got {limit}")
    if data is not None and not data.is_dir():
        raise UsageError(f"--data names {data}, which is not a folder")
    _check_device(device)
    folder = _report_folder(output)
    where = str(data.resolve()) if data else ""
    work = [
        (Job(p.slug, wanted, tuple(range(count)), device, where, time_limit, memory_limit), p.claims) for p in chosen
    ]
    store = Store()
    if resume:
        work = _not_stored(work, store, as_json)

    worst = 0
    board = _board(work, as_json)
    kept = 0
    try:
        with board:
            for evidence in run_jobs(work, at_once=jobs, on_progress=board.progress):
                if evidence.status is not Status.REFUSED:
                    store.add(evidence)
                    kept += 1
                board.ended(evidence)
                if as_json:
                    print(json.dumps(evidence.to_dict(), ensure_ascii=False), flush=True)
                worst = max(worst, exit_status(evidence))
    except KeyboardInterrupt:
        print(f"locally: stopped; {kept} finished of {len(work)} kept", file=sys.stderr)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if not as_json:
        print(f"Report: {_write_report(folder, store)}")
    raise typer.Exit(worst)


@app.command()
def report(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write to.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Write the page of papers with their latest evidence as one HTML file."""
    from locally.page.store import Store

    page = _write_report(_report_folder(output), Store())
    print(page)
    if open_it:
        import webbrowser

        if not webbrowser.open(page.as_uri()):
            raise UsageError(f"no browser found; open {page} yourself")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on; anything but this machine needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 for any that is free.")] = 8031,
    jobs: Annotated[int, typer.Option("--jobs", "-j", help="Experiments to run at once; cores are shared out.")] = 1,
    data: Annotated[Path | None, typer.Option(help="Folder with your data sets, for full-size runs.")] = None,
    token: Annotated[str | None, typer.Option(envvar="LOCALLY_TOKEN", help="Secret that a visitor must bring.")] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Open it in a browser.")] = False,
) -> None:
    """Serve the page: read, search and run the papers in a browser."""
    from locally.page import LOOPBACK

    if host not in LOOPBACK and not token:
        raise UsageError(f"--host {host} lets others in: give --token (or LOCALLY_TOKEN), at least 16 characters")
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
    web.serve(Store(), host=host, port=port, at_once=jobs, data=where, token=token, opened=opened)


def exit_status(evidence: Evidence) -> int:
    if evidence.status is Status.REFUSED:
        return EXIT_USAGE
    if evidence.status is not Status.FINISHED:
        return EXIT_CRASHED
    return 0 if evidence.verdict.outcome is Outcome.HOLDS else EXIT_NOT_HELD


def _choose(names: list[str], everything: bool) -> list[Paper]:
    papers = catalogue.load()
    if everything and names:
        raise UsageError("name papers or give --all, not both")
    if everything:
        return [p for p in papers if p.runnable]
    if not names:
        raise UsageError("name at least one paper, or give --all; locally list shows them")
    chosen = {p.slug: p for p in (catalogue.find(papers, name) for name in names)}
    for paper in chosen.values():
        if not paper.runnable:
            raise UsageError(f"{paper.slug} is not yet runnable: its method has no experiment")
    return list(chosen.values())


def _scale(name: str) -> Scale:
    if name not in list(Scale):
        raise UsageError(f"--scale must be one of {', '.join(Scale)}, got {name!r}")
    return Scale(name)


def _check_device(name: str) -> None:
    if name == "cpu":
        return
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from None


def _not_stored(work: list[Any], store: "Store", quiet: bool) -> list[Any]:
    from locally.page.runner import code_version

    left = [w for w in work if not store.has(w[0].slug, w[0].scale, w[0].seeds, w[0].device, code_version())]
    if len(left) < len(work) and not quiet:
        print(f"{len(work) - len(left)} of {len(work)} stored already for this code", file=sys.stderr)
    return left


def _board(work: list[Any], quiet: bool) -> Any:
    from locally.page.progress import LiveBoard, PlainBoard, QuietBoard

    if quiet:
        return QuietBoard()
    return (LiveBoard if sys.stderr.isatty() else PlainBoard)([job.slug for job, _ in work])


def _report_folder(output: Path | None) -> Path:
    from locally.home import home

    folder = output or home() / "report"
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"cannot write the report to {folder}: it is a file")
    return folder.resolve()


def _write_report(folder: Path, store: "Store") -> Path:
    from locally.page.report import write

    return write(folder, catalogue.load(), store)


def _print_papers(papers: list[Paper], last: dict[str, Any]) -> None:
    """Aligned columns: whole in a pipe; on a terminal titles are cut to fit, and slugs make room for them.

    By hand, since a rich table doubles the start-up time.
    """
    rows = [("#", "slug", "title", "year", "wing", "verdict", "age")]
    for paper in papers:
        run = last.get(paper.slug)
        verdict = run.label if run else "-" if paper.runnable else "not yet runnable"
        age = _age(run.started) if run else ""
        rows.append((str(paper.number), paper.slug, paper.title, str(paper.year), paper.wing, verdict, age))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    shown = list(range(len(widths)))
    if sys.stdout.isatty():
        room = shutil.get_terminal_size().columns - sum(widths) + widths[2] - 2 * (len(widths) - 1)
        if room < 24:
            shown.remove(1)
            room += widths[1] + 2
        widths[2] = min(widths[2], max(room, 12))
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for row in rows:
        cells = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(row, widths, strict=True)]
        padded = [cells[0].rjust(widths[0]), *(c.ljust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        if colour:
            padded[5] = f"\x1b[{ANSI.get(row[5], 2)}m{padded[5]}\x1b[0m"
        print("  ".join(padded[i] for i in shown).rstrip())


def _badge(label: str) -> str:
    return f"[{BADGE.get(label, 'dim')}]{label}[/]"


def _arxiv_link(paper: Paper) -> str:
    return f" · arxiv.org/abs/{paper.arxiv}" if paper.arxiv else ""


def _age(started: str) -> str:
    seconds = (datetime.now(UTC) - datetime.fromisoformat(started)).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit}"
    return "now"


if __name__ == "__main__":
    main()
