"""`locally run | report`: run experiments, keep their evidence, write the report."""

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from locally import catalogue
from locally.cli.status import EXIT_INTERRUPTED, exit_status
from locally.errors import UsageError
from locally.evidence import Evidence, Paper, Scale, Status

if TYPE_CHECKING:
    from locally.page.outlook import Outlook
    from locally.page.runner import Progress
    from locally.page.store import Store


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
    cluster: Annotated[
        str, typer.Option(help="Dask cluster to run on: tcp://host:port, a scheduler file, or local:N workers.")
    ] = "",
    ahead: Annotated[
        bool, typer.Option("--estimate", help="Print time, memory, disk and data of the study, and do not start it.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Start what will not fit into memory by its estimate.")
    ] = False,
) -> None:
    """Run papers' experiments, store their evidence, and say whether the claims hold."""
    from locally.page.runner import SEEDS, Job
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
    if cluster and jobs != 1:
        raise UsageError("give --jobs or --cluster, not both: a cluster's workers say how much they take")
    if not cluster:
        _check_device(device)
    folder = _report_folder(output)
    where = str(data.resolve()) if data else ""
    work = [
        (Job(p.slug, wanted, tuple(range(count)), device, where, time_limit, memory_limit), p.claims) for p in chosen
    ]
    store = Store()
    if resume:
        work = _not_stored(work, store, as_json)
    if ahead or wanted is Scale.PAPER:
        outlooks = _look_ahead(chosen, work, store, jobs, cluster)
        _show(outlooks, as_json and ahead, sys.stdout if ahead else sys.stderr)
        if ahead:
            return
        if not anyway:
            _refuse_too_large(outlooks)

    worst = 0
    board = _board(work, as_json)
    kept = 0
    try:
        with board, _runs(work, jobs, cluster, board.progress) as runs:
            for evidence in runs:
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


def _look_ahead(papers: list[Paper], work: list[Any], store: "Store", jobs: int, cluster: str) -> list["Outlook"]:
    """Of each job; the quick study is run first where no run is stored and the card leads on from there."""
    from locally.page.outlook import look_ahead
    from locally.page.runner import SEEDS

    known = {paper.slug: paper for paper in papers}
    stored = {job.slug: store.history(job.slug) for job, _ in work}
    here = not cluster
    outlooks = {job.slug: look_ahead(known[job.slug], job, stored[job.slug], here=here) for job, _ in work}
    asked = [(job, claims) for job, claims in work if outlooks[job.slug].estimate is None and known[job.slug].work]
    if asked:
        print(f"locally: measuring {len(asked)} quick studies first, of which no run is stored", file=sys.stderr)
        seeds = tuple(range(SEEDS[Scale.QUICK]))
        quick = [
            (replace(job, scale=Scale.QUICK, seeds=seeds, memory_limit=0.0, time_limit=0.0), c) for job, c in asked
        ]
        with _runs(quick, jobs, cluster, lambda _: None) as runs:
            for evidence in runs:
                if evidence.status is not Status.REFUSED:
                    store.add(evidence)
        for job, _ in asked:
            outlooks[job.slug] = look_ahead(known[job.slug], job, store.history(job.slug), here=here)
    return list(outlooks.values())


def _show(outlooks: list["Outlook"], as_json: bool, file: TextIO) -> None:
    from locally.page.outlook import together

    for outlook in outlooks:
        said = json.dumps(outlook.to_dict(), ensure_ascii=False) if as_json else "\n".join(outlook.lines())
        print(said, file=file, flush=True)
    if len(outlooks) > 1 and not as_json:
        print(together(outlooks), file=file, flush=True)


def _refuse_too_large(outlooks: list["Outlook"]) -> None:
    reasons = [outlook.too_large for outlook in outlooks if outlook.too_large]
    if reasons:
        raise UsageError(f"{'; '.join(reasons)}: give --anyway to start it all the same")


@contextmanager
def _runs(
    work: list[Any], jobs: int, cluster: str, on_progress: "Callable[[Progress], None]"
) -> Iterator[Iterator[Evidence]]:
    """The evidence of each job as it ends, here or on a cluster."""
    with _interruptible() as interrupted:
        if not cluster:
            from locally.page.runner import run_jobs

            with closing(run_jobs(work, at_once=jobs, on_progress=on_progress, interrupted=interrupted)) as runs:
                yield runs
            return
        from locally.page.cluster import Cluster, say

        with Cluster(cluster, say=say) as workers, closing(workers.run(work, on_progress, interrupted)) as runs:
            yield runs


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets an event: an exception may be lost where the main thread stands in a callback or takes a lock.

    A second Ctrl-C raises at once.
    """
    interrupted = threading.Event()

    def first(_number: int, _frame: Any) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)


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
