"""The evidence as pages: one table of all papers, and a page a paper with every claim, its source and its figures."""

from docs import records
from docs.markdown import amount, duration, plain, table
from locally.evidence import Claim, Finding, Paper


def overview() -> str:
    head = ("#", "Method", "Wing", "Verdict", "Time", "Memory", "Why")
    rows = []
    for paper in _with_runs():
        run = records.runs()[paper.slug]
        wing = f"[{paper.wing}](../wings/{paper.wing}.md#{paper.slug})"
        cost = (duration(run["seconds"]), f"{amount(run['peak_memory_mib'])} MiB")
        name = f"[{paper.slug}]({paper.slug}.md)"
        rows.append((paper.number, name, wing, run["verdict"], *cost, plain(run["reason"])))
    return table(head, rows)


def pages() -> dict[str, str]:
    """Markdown by path."""
    return {f"evidence/{paper.slug}.md": page(paper) for paper in _with_runs()}


def page(paper: Paper) -> str:
    run = records.runs()[paper.slug]
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(run["versions"].items()))
    lines = [
        f"# {paper.slug}",
        "",
        f"*{plain(paper.title)}*, {plain(', '.join(paper.authors))}, {plain(paper.venue)}, "
        f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv}).",
        "",
        plain(paper.summary),
        "",
        f"**{run['verdict']}**: {plain(run['reason'])}",
        "",
        *(_claim(found) for found in records.findings(paper)),
        "## The run",
        "",
        f"`locally run {paper.slug} --scale {run['scale']} --seeds {len(run['seeds'])}` "
        f"took {duration(run['seconds'])} and at most {amount(run['peak_memory_mib'])} MiB "
        f"on {machine['cores']} cores ({plain(machine['processor'])}), "
        f"device {run['device']}, on {run['started'][:10]}.",
        "",
        f"Versions: {plain(versions)}.",
        "",
    ]
    return "\n".join(lines)


def _claim(found: Finding) -> str:
    claim: Claim = found.claim
    setting = ", ".join(f"{name} = {value}" for name, value in claim.setting.items())
    where = f" at {plain(setting)}" if setting else ""
    rows = [
        ("Quantity", f"{plain(claim.metric)} of {plain(claim.method)}{where}"),
        ("Claimed", plain(claim.threshold)),
        ("Measured", plain(found.measured) or "-"),
        ("Seeds", found.seeds or "exact"),
        ("Source of the figure", plain(claim.source)),
    ]
    if not found.measured:
        rows = [row for row in rows if row[0] not in ("Measured", "Seeds")]
    return f"### {plain(claim.statement)}\n\n" + table(("", found.label), rows)


def _with_runs() -> list[Paper]:
    return [paper for paper in records.papers() if paper.slug in records.runs()]
