"""Two runs of one paper side by side: what the claims found, the measures, and what they ran with."""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from locally.evidence import Evidence, Finding, average
from locally.page.report import KINDS

ROWS = 200  # measures that are shown


@dataclass(frozen=True)
class ClaimPair:
    statement: str
    threshold: str
    measured: tuple[str, str]
    labels: tuple[str, str]
    kinds: tuple[str, str]


@dataclass(frozen=True)
class MeasurePair:
    method: str
    metric: str
    values: tuple[str, str]
    difference: str
    percent: str


@dataclass(frozen=True)
class Fact:
    name: str
    values: tuple[str, str]

    @property
    def differs(self) -> bool:
        return self.values[0] != self.values[1]


@dataclass(frozen=True)
class Comparison:
    claims: list[ClaimPair]
    measures: list[MeasurePair]
    facts: list[Fact]
    left_out: int  # measures


def compare(a: Evidence, b: Evidence) -> Comparison:
    """Everything that either has; what one lacks is an empty text there."""
    means = _means(a), _means(b)
    names = list(dict.fromkeys([*means[0], *means[1]]))
    pairs = [_measure(name, means) for name in names]
    return Comparison(_claims(a, b), pairs[:ROWS], _facts(a, b), max(0, len(pairs) - ROWS))


def _claims(a: Evidence, b: Evidence) -> list[ClaimPair]:
    found: dict[tuple[str, str], list[Finding | None]] = {}
    for side, run in enumerate((a, b)):
        for finding in run.verdict.findings:
            key = finding.claim.statement, finding.claim.threshold
            found.setdefault(key, [None, None])[side] = finding
    return [
        ClaimPair(
            statement,
            threshold,
            _both(pair, lambda f: f.measured),
            _both(pair, lambda f: f.label),
            _both(pair, lambda f: KINDS.get(str(f.outcome), "needs")),
        )
        for (statement, threshold), pair in found.items()
    ]


def _both(pair, show) -> tuple[str, str]:  # type: ignore[no-untyped-def]
    first, second = ("" if finding is None else show(finding) for finding in pair)
    return first, second


def _means(run: Evidence) -> dict[tuple[str, str], float]:
    """Mean over seeds of the mean over settings, of each metric of each method."""
    values: dict[tuple[str, str], dict[int | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for m in run.measures:
        values[m.method, m.metric][m.seed].append(m.value)
    return {name: average([average(v) for v in seeds.values()]) for name, seeds in values.items()}


def _measure(name: tuple[str, str], means: tuple[Mapping, Mapping]) -> MeasurePair:
    a, b = (m.get(name) for m in means)
    shown = ("" if a is None else f"{a:.4g}", "" if b is None else f"{b:.4g}")
    if a is None or b is None or not math.isfinite(b - a):
        return MeasurePair(*name, shown, "", "")
    percent = f"{(b - a) / abs(a):+.1%}" if a and math.isfinite((b - a) / abs(a)) and b != a else ""
    return MeasurePair(*name, shown, f"{b - a:+.3g}" if b != a else "same", percent)


def _facts(a: Evidence, b: Evidence) -> list[Fact]:
    sides = [
        {
            "Verdict": run.label,
            "Scale": str(run.scale),
            "Seeds": ", ".join(map(str, run.seeds)),
            "Started": run.started,
            "Seconds": f"{run.seconds:.1f}",
            "Memory": f"{run.peak_memory_mib:.0f} MiB",
            "Device": run.device,
            "Code": run.code_version,
            "Revision": run.git_revision,
            "Processor": str(run.machine.get("processor", "")),
        }
        | dict(run.versions)
        for run in (a, b)
    ]
    names = dict.fromkeys([*sides[0], *sides[1]])
    return [Fact(name, (sides[0].get(name, ""), sides[1].get(name, ""))) for name in names]
