"""What the pages are generated from: the cards, the last stored runs at default scale, the benchmarks' results."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from docs.readme import stored_runs
from locally import catalogue
from locally.evidence import Finding, Outcome, Paper

BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "results"


@cache
def papers() -> list[Paper]:
    return catalogue.load([catalogue.BUILT_IN])


@cache
def runs() -> dict[str, dict[str, Any]]:
    return stored_runs()


def findings(paper: Paper) -> list[Finding]:
    """What the last stored run says of every claim, [] where none is stored."""
    run = runs().get(paper.slug)
    return [Finding.from_dict(claim) for claim in run["claims"]] if run else []


def against(paper: Paper) -> list[Finding]:
    """The claims that do not hold."""
    return [f for f in findings(paper) if f.outcome in (Outcome.FAILS, Outcome.INCONCLUSIVE)]


def rooms(paper: Paper) -> list[str]:
    """Dotted names of the rooms of the paper's own wing that its objects live in, the first first."""
    found = [".".join(path.split(".")[:3]) for path in paper.objects]
    own = [room for room in found if room.split(".")[1] == paper.wing]
    return list(dict.fromkeys(own))


def comparisons(room: str) -> list[dict[str, Any]]:
    """What the room's benchmark measured, [] without a result."""
    file = BENCHMARKS / f"{room.rsplit('.', 1)[1]}.json"
    return json.loads(file.read_text(encoding="utf-8"))["comparisons"] if file.exists() else []
