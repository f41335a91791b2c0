"""What a paper claims, what is recorded, and the verdict that follows from the records.

Nothing here imports a numerical library until a verdict needs a quantile, so that reading cards stays instant.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

Setting = Mapping[str, str | int | float | bool]

CONFIDENCE = 0.95


class Scale(StrEnum):
    """How much an experiment may take: quick <= 10 s, default <= 60 s on two cores, paper as long as it needs."""

    QUICK = "quick"
    DEFAULT = "default"
    PAPER = "paper"

    @property
    def rank(self) -> int:
        """0 for quick, 1 for default, 2 for paper."""
        return list(Scale).index(self)


class Outcome(StrEnum):
    """What the records say of a claim, and of a paper as a whole; computed by `Claim.judge` and `judge`."""

    HOLDS = "holds"  # the whole interval is on the claimed side
    INCONCLUSIVE = "inconclusive"  # the interval straddles the threshold, or there is none
    FAILS = "fails"  # the whole interval is on the other side
    NEEDS_SCALE = "needs a larger scale"  # than the run's


class Status(StrEnum):
    """How a run ended; only a finished one has a verdict worth the name."""

    FINISHED = "finished"
    CRASHED = "crashed"
    TIMED_OUT = "timed out"
    OUT_OF_MEMORY = "out of memory"
    CANCELLED = "cancelled"
    REFUSED = "could not start"  # for a reason that the user can mend


class Relation(StrEnum):
    """How a measured figure stands to the claim's value; written on the card."""

    AT_MOST = "<="
    AT_LEAST = ">="
    BELOW = "<"
    ABOVE = ">"
    BETWEEN = "between"  # two bounds, both included


@dataclass(frozen=True)
class Measure:
    """One recorded number. `seed` is None for what does not depend on one."""

    method: str
    metric: str
    value: float
    seed: int | None = None
    setting: Setting = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; NaN and infinity as strings."""
        return {
            "method": self.method,
            "metric": self.metric,
            "value": encode_float(self.value),
            "seed": self.seed,
            "setting": dict(self.setting),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The measure that `to_dict` wrote."""
        return cls(data["method"], data["metric"], float(data["value"]), data["seed"], dict(data["setting"]))


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence: `metric` of `method` stands in `relation` to `value`.

    Attributes:
        statement: the sentence that a reader sees.
        metric, method: which measures decide it.
        relation, value: the threshold; a pair of bounds for "between".
        source: where the figure comes from (theorem, table).
        scale: the smallest scale at which the claim can be decided.
        setting: restricts the measures to those recorded with these settings.
    """

    statement: str
    metric: str
    method: str
    relation: Relation
    value: float | tuple[float, float]
    source: str
    scale: Scale = Scale.QUICK
    setting: Setting = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.relation is Relation.BETWEEN:
            if not isinstance(self.value, tuple) or not self.value[0] <= self.value[1]:
                raise ValueError(f'value must be [low, high] with low <= high for "between", got {self.value!r}')
        elif isinstance(self.value, tuple) or math.isnan(self.value):
            raise ValueError(f'value must be one number for "{self.relation}", got {self.value!r}')

    @property
    def threshold(self) -> str:
        """The right-hand side as people write it: "<= 0.5", "in [1, 2]"."""
        if isinstance(self.value, tuple):
            return f"in [{self.value[0]:g}, {self.value[1]:g}]"
        return f"{self.relation} {self.value:g}"

    def satisfied_by(self, low: float, high: float) -> bool | None:
        """True if all of [low, high] satisfies the claim, False if none of it does, None between."""
        match self.relation:
            case Relation.AT_MOST:
                every, some = high <= self.value, low <= self.value  # type: ignore[operator]
            case Relation.AT_LEAST:
                every, some = low >= self.value, high >= self.value  # type: ignore[operator]
            case Relation.BELOW:
                every, some = high < self.value, low < self.value  # type: ignore[operator]
            case Relation.ABOVE:
                every, some = low > self.value, high > self.value  # type: ignore[operator]
            case Relation.BETWEEN:
                bottom, top = self.value  # type: ignore[misc]
                every, some = bottom <= low and high <= top, low <= top and high >= bottom
        return True if every else None if some else False

    def judge(self, measures: Iterable[Measure], scale: Scale) -> "Finding":
        """Decide the claim from the recorded seeds; see `interval` for the confidence interval."""
        if scale.rank < self.scale.rank:
            return Finding(self, Outcome.NEEDS_SCALE, reason=f"needs {self.scale} scale")
        by_seed: dict[int | None, list[float]] = {}
        for m in measures:
            if (m.method, m.metric) == (self.method, self.metric) and self.setting.items() <= m.setting.items():
                by_seed.setdefault(m.seed, []).append(m.value)
        if not by_seed:
            return Finding(self, Outcome.INCONCLUSIVE, reason=f'no "{self.metric}" was recorded for {self.method}')
        if None in by_seed and len(by_seed) > 1:
            return Finding(self, Outcome.INCONCLUSIVE, reason="recorded both with and without a seed")
        values = [average(v) for v in by_seed.values()]
        if any(math.isnan(v) for v in values):
            return Finding(self, Outcome.INCONCLUSIVE, seeds=len(values), reason="a measure is not a number")

        exact = None in by_seed
        estimate, low, high = interval(values, exact=exact)
        seeds = 0 if exact else len(values)
        satisfied = self.satisfied_by(low, high)
        shown = show_interval(estimate, low, high)
        if seeds == 1:
            outcome, reason = Outcome.INCONCLUSIVE, f"{shown} on a single seed: no interval"
        elif satisfied is None:
            outcome, reason = Outcome.INCONCLUSIVE, f"{shown} straddles {self.threshold}"
        else:
            outcome = Outcome.HOLDS if satisfied else Outcome.FAILS
            reason = f"{shown} {'is' if satisfied else 'is not'} {self.threshold}"
        return Finding(self, outcome, estimate, low, high, seeds, reason)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; infinite bounds as strings."""
        value = [encode_float(v) for v in self.value] if isinstance(self.value, tuple) else encode_float(self.value)
        return {
            "statement": self.statement,
            "metric": self.metric,
            "method": self.method,
            "relation": str(self.relation),
            "value": value,
            "source": self.source,
            "scale": str(self.scale),
            "setting": dict(self.setting),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The claim that `to_dict` wrote; scale and setting may be missing."""
        raw = data["value"]
        value = (float(raw[0]), float(raw[1])) if isinstance(raw, list | tuple) else float(raw)
        return cls(
            statement=data["statement"],
            metric=data["metric"],
            method=data["method"],
            relation=Relation(data["relation"]),
            value=value,
            source=data["source"],
            scale=Scale(data.get("scale", Scale.QUICK)),
            setting=dict(data.get("setting", {})),
        )


@dataclass(frozen=True)
class Finding:
    """What the records say about one claim. `seeds` is 0 where the quantity does not depend on a seed."""

    claim: Claim
    outcome: Outcome
    estimate: float = math.nan
    low: float = math.nan
    high: float = math.nan
    seeds: int = 0
    reason: str = ""

    @property
    def label(self) -> str:
        """The outcome in words; for NEEDS_SCALE, which scale."""
        return f"needs {self.claim.scale} scale" if self.outcome is Outcome.NEEDS_SCALE else str(self.outcome)

    @property
    def measured(self) -> str:
        """The estimate with its interval, "" where there is none."""
        return "" if math.isnan(self.estimate) else show_interval(self.estimate, self.low, self.high)

    def to_dict(self) -> dict[str, Any]:
        """The claim's own data and what was found, as plain JSON data."""
        return self.claim.to_dict() | {
            "outcome": self.label,
            "estimate": encode_float(self.estimate),
            "interval": [encode_float(self.low), encode_float(self.high)],
            "seeds": self.seeds,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The finding that `to_dict` wrote."""
        outcome = Outcome(data["outcome"]) if data["outcome"] in list(Outcome) else Outcome.NEEDS_SCALE
        low, high = (float(v) for v in data["interval"])
        return cls(Claim.from_dict(data), outcome, float(data["estimate"]), low, high, data["seeds"], data["reason"])


@dataclass(frozen=True)
class Verdict:
    """The worst outcome over the claims that this scale can decide, and which claim decided it."""

    outcome: Outcome
    reason: str
    findings: tuple[Finding, ...] = ()

    @property
    def deciding(self) -> Finding | None:
        """The finding that the verdict rests on: the first with its outcome, else the first; None without findings."""
        return next(
            (f for f in self.findings if f.outcome is self.outcome), self.findings[0] if self.findings else None
        )


def judge(claims: Sequence[Claim], measures: Sequence[Measure], scale: Scale) -> Verdict:
    """Judge every claim; the paper's verdict is the worst: fails, then inconclusive, then holds."""
    findings = tuple(claim.judge(measures, scale) for claim in claims)
    decidable = [f for f in findings if f.outcome is not Outcome.NEEDS_SCALE]
    if not decidable:
        needed = min((c.scale for c in claims), key=lambda s: s.rank, default=Scale.QUICK)
        return Verdict(Outcome.INCONCLUSIVE, f"every claim needs at least {needed} scale", findings)
    for outcome in (Outcome.FAILS, Outcome.INCONCLUSIVE):
        worst = [f for f in decidable if f.outcome is outcome]
        if worst:
            return Verdict(outcome, f"{worst[0].claim.metric}: {worst[0].reason}", findings)
    if len(decidable) == 1:
        return Verdict(Outcome.HOLDS, f"{decidable[0].claim.metric}: {decidable[0].reason}", findings)
    return Verdict(Outcome.HOLDS, f"all {len(decidable)} decidable claims hold", findings)


def interval(values: Sequence[float], *, exact: bool = False) -> tuple[float, float, float]:
    """Mean and Student-t interval at 95 % over seeds.

    A deterministic quantity, or one that came out the same on every seed, is its own interval; one infinite value
    makes the interval the hull of the values, since no normal approximation covers that.
    """
    mean = average(values)
    if exact or len(values) == 1 or min(values) == max(values):
        return (values[0], values[0], values[0]) if min(values) == max(values) else (mean, mean, mean)
    if any(math.isinf(v) for v in values):
        return mean, min(values), max(values)
    from scipy.special import stdtrit

    n = len(values)
    deviation = math.hypot(*sorted(v - mean for v in values)) / math.sqrt(n - 1)
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * deviation / math.sqrt(n)
    return mean, mean - half, mean + half


def average(values: Sequence[float]) -> float:
    """Mean that no order of the values changes; divides first, so that large ones do not overflow."""
    return math.fsum(v / len(values) for v in values)


def show_interval(estimate: float, low: float, high: float) -> str:
    """The estimate and [low, high], four digits each; the estimate alone where the interval is a point."""
    return f"{estimate:.4g}" if low == high else f"{estimate:.4g} [{low:.4g}, {high:.4g}]"


def encode_float(value: float) -> float | str:
    """JSON has no NaN and no infinity: they travel as the strings that float() reads back."""
    return value if math.isfinite(value) else str(float(value))


@dataclass(frozen=True)
class Work:
    """How large a paper's study is at each scale, so that one run tells what another will take.

    Attributes:
        time, memory: of a study, for the same number of seeds, as multiples of what the default one takes.
        operations: in floating point, of networks of full size, which come on top at paper scale: once, and for each
            seed. They go as fast as the device multiplies, and no smaller study tells how fast that is.
        disk: GiB that a study at paper scale keeps until it is finished.
    """

    time: Mapping[Scale, float]
    memory: Mapping[Scale, float]
    operations: tuple[float, float] = (0.0, 0.0)
    disk: float = 0.0


@dataclass(frozen=True)
class Paper:
    """A card: bibliography, a summary in our words, the claims, and the public objects that implement the method."""

    number: int
    slug: str
    title: str
    authors: tuple[str, ...]
    published: str  # ISO date
    venue: str
    wing: str
    summary: str
    claims: tuple[Claim, ...]
    arxiv: str = ""
    keywords: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()  # dotted paths
    example: str = ""  # a few lines of Python that call the method
    experiment: Path | None = None  # the Python file beside the card, where there is one
    work: Work | None = None

    @property
    def runnable(self) -> bool:
        """Whether there is an experiment."""
        return self.experiment is not None

    @property
    def stem(self) -> str:
        """The slug as a Python name: of the card's and the experiment's file."""
        return self.slug.replace("-", "_")

    @property
    def year(self) -> int:
        """Of publication."""
        return int(self.published[:4])

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON data."""
        return {
            "number": self.number,
            "slug": self.slug,
            "title": self.title,
            "authors": list(self.authors),
            "arxiv": self.arxiv,
            "published": self.published,
            "venue": self.venue,
            "wing": self.wing,
            "keywords": list(self.keywords),
            "objects": list(self.objects),
            "summary": self.summary,
            "example": self.example,
            "runnable": self.runnable,
            "claims": [c.to_dict() for c in self.claims],
        }
