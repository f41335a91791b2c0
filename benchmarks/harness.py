"""Paired timing: two callables in one process, in alternating order, reported as a ratio with its spread.

A benchmark module defines `main() -> list[Comparison]`; `python -m benchmarks` runs them all, prints the ratios and
writes `benchmarks/results/<name>.json`.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

SLACK = 1.05
HIGHER_IS_BETTER = ("nDCG", "a second", "that agree", "accuracy", "score")  # in the name of a quantity


@dataclass(frozen=True)
class Comparison:
    """One line of the table: what was compared, by how much, and how sure we are.

    `ratio` is ours / peer (below 1: ours is faster, smaller, better), or a plain figure where `peer` is empty, such as
    the exponent with which cost grows.
    """

    name: str
    quantity: str  # "time", "error", "iterations", "growth exponent", ...
    ratio: float
    low: float
    high: float
    ours: str
    peer: str = ""
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        return any(word in self.quantity for word in HIGHER_IS_BETTER)

    @property
    def peer_wins(self) -> bool:
        """The whole spread is on the peer's side."""
        return bool(self.peer) and (self.high < 1 if self.higher_is_better else self.low > 1)

    def worse_than(self, stored: "Comparison") -> bool:
        """By more than both spreads, and by more than what rounding or one timing of a growth does."""
        if self.higher_is_better:
            return self.high * SLACK < stored.low
        return self.low > stored.high * SLACK

    def __str__(self) -> str:
        spread = f" ({self.low:.3g} .. {self.high:.3g})" if self.low != self.high else ""
        against = f"{self.ours} / {self.peer}" if self.peer else self.ours
        return f"{self.name}: {self.quantity}, {against} = {self.ratio:.3g}{spread}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    name: str,
    ours: tuple[str, Callable[[], object]],
    peer: tuple[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 1,
    **detail: Any,
) -> Comparison:
    """Time both in turn (ours first, then peer first, ...) and take the ratio pair by pair."""
    for _ in range(warmup):
        ours[1](), peer[1]()
    pairs = []
    for i in range(rounds):
        order = (ours[1], peer[1]) if i % 2 == 0 else (peer[1], ours[1])
        first, second = seconds(order[0]), seconds(order[1])
        pairs.append((first, second) if i % 2 == 0 else (second, first))
    ratios = [a / b for a, b in pairs]
    detail |= {
        "seconds_ours": statistics.median(a for a, _ in pairs),
        "seconds_peer": statistics.median(b for _, b in pairs),
        "rounds": rounds,
    }
    return Comparison(name, "time", statistics.median(ratios), min(ratios), max(ratios), ours[0], peer[0], detail)


def growth(name: str, ours: str, sizes: Sequence[int], make: Callable[[int], Callable[[], object]]) -> Comparison:
    """Slope of log time over log size, each size timed three times after a warm-up; `make(size)` returns the work."""
    medians = []
    for size in sizes:
        work = make(size)
        work()
        medians.append(statistics.median(seconds(work) for _ in range(3)))
    slope = float(np.polyfit(np.log(sizes), np.log(medians), 1)[0])
    detail = {"sizes": list(sizes), "seconds": medians}
    return Comparison(name, "growth exponent", slope, slope, slope, ours, detail=detail)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
