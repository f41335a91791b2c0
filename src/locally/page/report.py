"""One self-contained HTML page of all papers with their latest evidence: no network, no script.

Beside the page lie each figure as PDF and PNG and each run's records as CSV.
"""

import csv
import io
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from locally.errors import UsageError
from locally.evidence import Claim, Evidence, Finding, Measure, Outcome, Paper, Status, average, interval, show_interval
from locally.page.store import Store

LOG_SHOWN = 4_000  # characters
NOT_RUNNABLE = "not yet runnable"
NOT_RUN = "not run"
KINDS = {  # CSS class of each badge
    str(Outcome.HOLDS): "holds",
    str(Outcome.FAILS): "fails",
    str(Outcome.INCONCLUSIVE): "inconclusive",
    NOT_RUNNABLE: "none",
    NOT_RUN: "none",
} | {str(s): "stopped" for s in Status if s is not Status.FINISHED}


@dataclass(frozen=True)
class Cell:
    mean: str
    spread: str = ""


@dataclass(frozen=True)
class MethodTable:
    metrics: list[str]
    rows: list[tuple[str, list[Cell]]]


@dataclass(frozen=True)
class ClaimRow:
    claim: Claim
    measured: str = ""
    label: str = ""
    kind: str = ""


@dataclass(frozen=True)
class FigureView:
    svg: Markup
    name: str
    caption: str
    pdf: str  # addresses, relative to the page
    png: str


@dataclass(frozen=True)
class PaperView:
    """All that the templates show of one paper."""

    paper: Paper
    evidence: Evidence | None
    label: str
    kind: str
    authors: str
    claims: list[ClaimRow]
    table: MethodTable | None
    figures: list[FigureView]
    records: str  # address of the CSV file
    machine: str
    log: str


def write(folder: Path, papers: Sequence[Paper], store: Store) -> Path:
    """Write the report into `folder` and return the path of the page, replacing an earlier one only when whole.

    Raises:
        UsageError: the folder cannot be written.
    """
    evidence = {p.slug: store.latest(p.slug) for p in papers}
    views = [view(p, evidence[p.slug]) for p in papers]
    views.sort(key=lambda v: (v.evidence is None, not v.paper.runnable))  # what ran comes first
    page = render(views)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        for v in views:
            if v.evidence is None:
                continue
            for figure, shown in zip(v.evidence.figures, v.figures, strict=True):
                (folder / shown.pdf).write_bytes(figure.pdf)
                (folder / shown.png).write_bytes(figure.png)
            (folder / v.records).write_text(records_csv(v.evidence.measures), encoding="utf-8")
        draft = folder / ".index.html"
        draft.write_text(page, encoding="utf-8")
        os.replace(draft, folder / "index.html")
    except OSError as error:
        raise UsageError(f"cannot write the report to {folder}: {error.strerror}") from None
    return folder / "index.html"


def templates() -> Environment:
    """What the report and the served page are written with."""
    return Environment(
        loader=PackageLoader("locally.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        auto_reload=False,  # the package's own files do not change under us
    )


def style_sheet() -> str:
    return (Path(__file__).parent / "templates" / "style.css").read_text(encoding="utf-8")


def render(views: Sequence[PaperView]) -> str:
    return (
        templates()
        .get_template("report.html")
        .render(
            views=views,
            ran=sum(v.evidence is not None for v in views),
            tally=tally((v.label, v.kind) for v in views),
            written=datetime.now().strftime("%Y-%m-%d %H:%M"),
            style=Markup(style_sheet()),
        )
    )


def tally(badges: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """(label, CSS class, how many), in a fixed order."""
    counts = Counter(badges)
    order = list(KINDS)
    return [(*key, counts[key]) for key in sorted(counts, key=lambda k: order.index(k[0]))]


def unrun_label(paper: Paper) -> str:
    return NOT_RUN if paper.runnable else NOT_RUNNABLE


def view(
    paper: Paper,
    evidence: Evidence | None,
    *,
    records: str = "data/{slug}.csv",
    figures: str = "figures/{slug}-{i}.{kind}",
) -> PaperView:
    """What the templates show; `records` and `figures` say where those files are, as seen from the page."""
    if evidence is None:
        label = unrun_label(paper)
        claims = [ClaimRow(c) for c in paper.claims]
        return PaperView(paper, None, label, KINDS[label], short_authors(paper), claims, None, [], "", "", "")
    at = lambda i, kind: figures.format(slug=paper.slug, i=i, kind=kind)
    return PaperView(
        paper=paper,
        evidence=evidence,
        label=evidence.label,
        kind=KINDS[evidence.label],
        authors=short_authors(paper),
        claims=[_claim_row(f) for f in evidence.verdict.findings] or [ClaimRow(c) for c in paper.claims],
        table=method_table(evidence.measures, [f.claim.metric for f in evidence.verdict.findings]),
        figures=[
            FigureView(Markup(_own_ids(f.svg, f"{paper.slug}-{i}")), f.name, f.caption, at(i, "pdf"), at(i, "png"))
            for i, f in enumerate(evidence.figures, 1)
        ],
        records=records.format(slug=paper.slug),
        machine=_machine(evidence),
        log=evidence.log[-LOG_SHOWN:].strip(),
    )


def short_authors(paper: Paper) -> str:
    return ", ".join(paper.authors[:3]) + (" and others" if len(paper.authors) > 3 else "")


def _machine(evidence: Evidence) -> str:
    facts = evidence.machine
    return (
        f"{facts['processor']}, {facts['cores']} cores, {facts['memory_gib']} GiB, {facts['system']}" if facts else ""
    )


def _claim_row(finding: Finding) -> ClaimRow:
    kind = "needs" if finding.outcome is Outcome.NEEDS_SCALE else KINDS[str(finding.outcome)]
    return ClaimRow(finding.claim, finding.measured, finding.label, kind)


def method_table(measures: Iterable[Measure], claimed: Sequence[str], limit: int = 8) -> MethodTable | None:
    """Methods by metrics: those that claims name first, then those recorded for most methods, `limit` at most."""
    values: dict[tuple[str, str], dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    methods: dict[str, None] = {}
    spread: dict[str, set[str]] = defaultdict(set)
    for m in measures:
        values[m.method, m.metric][m.seed].append(m.value)
        methods[m.method] = None
        spread[m.metric].add(m.method)
    if not values:
        return None
    metrics = sorted(spread, key=lambda name: (name not in claimed, -len(spread[name])))[:limit]
    rows = []
    for method in methods:
        cells = [_cell(values.get((method, metric), {})) for metric in metrics]
        if any(cell.mean for cell in cells):
            rows.append((method, cells))
    return MethodTable(metrics, rows)


def _cell(by_seed: dict[int | None, list[float]]) -> Cell:
    if not by_seed:
        return Cell("")
    values = [average(v) for v in by_seed.values()]
    estimate, low, high = interval(values)
    if low == high:
        return Cell(f"{estimate:.4g}")
    return Cell(f"{estimate:.4g}", show_interval(estimate, low, high).split(" ", 1)[1])


def records_csv(measures: Iterable[Measure]) -> str:
    measures = list(measures)
    settings = sorted({key for m in measures for key in m.setting})
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "metric", "value", "seed", *settings])
    for m in measures:
        seed = "" if m.seed is None else m.seed
        writer.writerow([m.method, m.metric, repr(m.value), seed, *(m.setting.get(key, "") for key in settings)])
    return text.getvalue()


def _own_ids(svg: str, prefix: str) -> str:
    """Prefix the plot's ids, since ids must be unique within the page that many plots share."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    return svg.replace("<svg ", '<svg role="img" ', 1)
