"""What a study will take, from what earlier ones took and from how large its card says that it is.

The nearest that was measured counts: a run at the same scale before one at another, a run on this machine before one
elsewhere, the newest first. From there the card's sizes lead on. They are orders of magnitude, and the ranges say so.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from locally.evidence.claims import Scale, Status, Work
from locally.evidence.runs import Evidence

# Factors to both sides. The same study again differs by what else the machine does; sizes on a card are rough.
AGAIN_TIME, AGAIN_MEMORY = 1.5, 1.25
ELSEWHERE = 3.0
SCALED_TIME, SCALED_MEMORY = 4.0, 2.0
EFFICIENCY = 0.3  # of a matrix product's speed that training a network reaches
RECENT = 5  # runs that are looked at


@dataclass(frozen=True)
class Range:
    """A figure, and between what it is expected to lie."""

    likely: float
    low: float
    high: float

    @classmethod
    def around(cls, likely: float, factor: float) -> "Range":
        return cls(likely, likely / factor, likely * factor)

    def __add__(self, other: "Range") -> "Range":
        return Range(self.likely + other.likely, self.low + other.low, self.high + other.high)


@dataclass(frozen=True)
class Estimate:
    """Seconds by the clock, memory of all its processes together, and what both follow from."""

    seconds: Range
    memory_mib: Range
    basis: str


def estimate(
    work: Work | None,
    stored: Sequence[Evidence],
    *,
    scale: Scale,
    seeds: int,
    device: str = "cpu",
    machine: Mapping[str, str | int | float] | None = None,
    rate: Callable[[], float] = lambda: 0.0,
) -> Estimate | None:
    """What a study takes; None where no run tells, or the card says nothing of sizes and another scale was run.

    Args:
        work: sizes from the card.
        stored: runs of the paper, oldest first, of any scale, device and machine.
        scale, seeds, device: of the study.
        machine: as runs record it; which runs are from here.
        rate: floating-point operations a second of a matrix product on the device; asked where `work` has operations.
    """
    nearest = _nearest(work, stored, scale, device, machine or {})
    if not nearest:
        return None
    measured, elsewhere = nearest[0].scale, _where(nearest[0], device, machine or {})
    ratio = {"time": 1.0, "memory": 1.0}
    if measured is not scale:
        assert work is not None
        ratio = {"time": work.time[scale] / work.time[measured], "memory": work.memory[scale] / work.memory[measured]}
    seconds = statistics.median(e.seconds * seeds / len(e.seeds) for e in nearest) * ratio["time"]
    memory = statistics.median(e.peak_memory_mib for e in nearest) * ratio["memory"]
    again = measured is scale
    time = Range.around(seconds, (AGAIN_TIME if again else SCALED_TIME) * (ELSEWHERE if elsewhere else 1))
    basis = f"from {_count(len(nearest), 'run')} at {measured} scale{elsewhere}"
    if not again:
        basis += " and the sizes on its card"
        if operations := _operations(work, scale, seeds):
            time += Range.around(operations / (EFFICIENCY * rate()), SCALED_TIME)
    return Estimate(time, Range.around(memory, AGAIN_MEMORY if again else SCALED_MEMORY), basis)


def _nearest(
    work: Work | None, stored: Sequence[Evidence], scale: Scale, device: str, machine: Mapping[str, str | int | float]
) -> list[Evidence]:
    """The newest of the runs that tell most: all of one scale and from one machine."""
    usable = [e for e in stored if e.status is Status.FINISHED and e.seconds > 0 and (e.scale is scale or work)]

    def distance(e: Evidence) -> tuple[bool, bool, bool, int]:
        return (
            e.scale is not scale,
            e.device != device,
            _place(e.machine) != _place(machine),
            abs(e.scale.rank - scale.rank),
        )

    if not usable:
        return []
    best = min(map(distance, usable))
    newest = [e for e in reversed(usable) if distance(e) == best]
    return [e for e in newest if _place(e.machine) == _place(newest[0].machine)][:RECENT]


def _where(e: Evidence, device: str, machine: Mapping[str, str | int | float]) -> str:
    """Empty for here."""
    if e.device != device:
        return f" on {e.device}"
    return "" if _place(e.machine) == _place(machine) else " on another machine"


def _place(machine: Mapping[str, str | int | float]) -> tuple[object, ...]:
    return machine.get("processor"), machine.get("cores")


def _operations(work: Work | None, scale: Scale, seeds: int) -> float:
    if work is None or scale is not Scale.PAPER:
        return 0.0
    once, each = work.operations
    return once + seeds * each


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
