"""The methods of a wing, one section each: what for, how to call it, what it costs, where it loses."""

from typing import Any

from docs import api, records
from docs.markdown import amount, details, duration, plain, table
from locally.evidence import Paper


def of_wing(wing: str) -> str:
    """Markdown for the wing's page, in the order of the papers' numbers."""
    found = [paper for paper in records.papers() if paper.wing == wing]
    return costs(found) + "\n" + "\n".join(section(paper) for paper in found)


def of_ground_floor() -> str:
    """Markdown for the page of the rooms that the wings share; no paper stands behind them."""
    return "\n".join(_shared(room) for room in api.rooms("linalg"))


def _shared(room: str) -> str:
    name = room.rsplit(".", 1)[1]
    parts = [f"### {name} {{ #{name} }}\n", f"[Reference](../reference/linalg/{name}.md)\n", api.docstring(room)]
    return "\n".join([*parts, "", peers(room)])


def costs(papers: list[Paper]) -> str:
    rows = []
    for paper in papers:
        run = records.runs().get(paper.slug)
        measured = (run["verdict"], duration(run["seconds"]), f"{amount(run['peak_memory_mib'])} MiB") if run else "---"
        rows.append((f"[{paper.slug}](#{paper.slug})", *measured))
    head = ("Method", "Verdict", "Its experiment at default scale", "Peak memory")
    return table(head, rows)


def section(paper: Paper) -> str:
    room = next(iter(records.rooms(paper)), None)
    links = [f"[{plain(paper.title)}](https://arxiv.org/abs/{paper.arxiv}), {plain(paper.venue)}"]
    if room:
        _, wing, name = room.split(".")
        links.append(f"[reference](../reference/{wing}/{name}.md)")
    if records.findings(paper):
        links.append(f"[every claim with its figures](../evidence/{paper.slug}.md)")
    parts = [f"### {paper.slug} {{ #{paper.slug} }}\n", " · ".join(links) + "\n", plain(paper.summary) + "\n"]
    parts += [failing(paper), peers(room)] if room else []
    if paper.example:
        parts.append(details("An example that runs", f"```python\n{paper.example}\n```", "example"))
    return "\n".join(part for part in parts if part)


def failing(paper: Paper) -> str:
    """The claims that the evidence does not bear out."""
    found = records.against(paper)
    if not found:
        return ""
    said = [
        f"- *{f.label}*: {plain(f.claim.statement)} (claimed {f.claim.threshold}, measured {f.measured})" for f in found
    ]
    return "What did not come out as claimed:\n\n" + "\n".join(said) + "\n"


def peers(room: str | None) -> str:
    found = records.comparisons(room) if room else []
    rows = [ratio(c) for c in found if c["peer"]]
    growth = [growing(c) for c in found if not c["peer"] and c["quantity"] == "growth exponent"]
    parts = []
    if rows:
        head = ("On", "Quantity", "Method", "Beside", "Ratio")
        parts.append("Method divided by peer, so that below one the method needs less.\n\n" + table(head, rows))
    if growth:
        parts.append("\n".join(["How the time grows with the size of the problem:", "", *growth]) + "\n")
    return details("Beside its peers, measured", "\n".join(parts), "abstract") if parts else ""


def ratio(comparison: dict[str, Any]) -> tuple[str, ...]:
    c = comparison
    return (plain(c["name"]), plain(c["quantity"]), plain(c["ours"]), plain(c["peer"]), f"{c['ratio']:.3g}")


def growing(comparison: dict[str, Any]) -> str:
    return f"- {plain(comparison['name'])}, {plain(comparison['ours'])}: like size^{comparison['ratio']:.2g}"
