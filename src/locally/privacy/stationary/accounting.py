"""What a private run costs: mechanisms, calibration of their noise, and the statement that a result carries.

Every figure comes from the accountants of Google's `dp-accounting` (extra `privacy`); nothing here integrates a privacy
loss of its own. What this module adds is the dictionary between an algorithm's releases and that library's events.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.errors import require

if TYPE_CHECKING:
    import dp_accounting


# Renyi orders: any set gives a valid bound, and these stay within half a per cent of the library's own at a third of
# the cost. Fractional orders are dear for Poisson samples; for samples of fixed size cost grows with the square of the
# order up to 256 and is linear beyond.
ORDERS = (
    *(1.1, 1.25, 1.5, 1.75, 2, 2.25, 2.5, 2.75, 3, 3.5, 4, 4.5, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 23, 26),
    *(30, 34, 38, 43, 50, 58, 68, 80, 100, 128, 165, 258, 384, 512, 720, 1024),
)


class Adjacency(StrEnum):
    """Which pairs of data sets must be hard to tell apart."""

    REPLACE = "replace"  # one example exchanged for another; the number of examples is public
    ADD_REMOVE = "add_remove"  # one example more or less; the batch sizes are then nominal, public constants

    @property
    def bounded_terms(self) -> int:
        """How many terms of a sum of bounded terms differ between neighbours: its sensitivity in units of the bound."""
        return 2 if self == Adjacency.REPLACE else 1


class Accountant(StrEnum):
    """By what arithmetic releases compose; chosen by the caller, named in the privacy statement."""

    RDP = "rdp"  # Renyi: fast, a few per cent loose
    PLD = "pld"  # privacy loss distributions: tight, slower


class Sampling(StrEnum):
    """How a release picks its examples; set by the method, named in the privacy statement."""

    ALL = "every example"
    POISSON = "Poisson sample"  # each example independently
    FIXED = "sample of fixed size without replacement"  # each subset of that size alike


class Composition(StrEnum):
    """How the releases of a run meet one example; set by the method, named in the privacy statement."""

    SEQUENTIAL = "adaptive sequential"  # one example may take part in every release
    PARALLEL = "parallel"  # one example takes part in the releases of one line only


@dataclass(frozen=True)
class Mechanism:
    """`count` Gaussian releases of one kind, as one example meets them.

    Attributes:
        what: the quantity released, in words.
        noise_multiplier: standard deviation of the noise / l2-sensitivity of the quantity between neighbours.
        count: releases that compose on one example.
        sampling, rate: how each release picks its examples, and the (expected) share of all that it picks.
        population: number of examples to pick from; needed for samples of fixed size.
        releases: releases over all disjoint parts of the data; `count` where nothing is split.
    """

    what: str
    noise_multiplier: float
    count: int
    sampling: Sampling = Sampling.ALL
    rate: float = 1.0
    population: int = 0
    releases: int | None = None

    def __post_init__(self) -> None:
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must be non-negative, got {self.noise_multiplier!r}")
        check_count("count", self.count, at_least=0)
        check_between("rate", self.rate, 0, 1)

    def __str__(self) -> str:
        picked = "" if self.sampling == Sampling.ALL else f", {self.sampling} at rate {self.rate:.4g}"
        times = self.releases if self.releases is not None else self.count
        return f"{times} x Gaussian on {self.what}, noise multiplier {self.noise_multiplier:.4g}{picked}"


@dataclass(frozen=True)
class PrivacyStatement:
    """What was promised, by which mechanisms, and what the promise rests on.

    The released quantities together (every iterate included) are (epsilon, delta)-differentially private with respect
    to `adjacency`. Choosing hyper-parameters by looking at the data is not covered.
    """

    epsilon: float
    delta: float
    adjacency: Adjacency
    accountant: Accountant
    composition: Composition
    mechanisms: tuple[Mechanism, ...]
    assumptions: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = (
            f"({self.epsilon:.4g}, {self.delta:.3g})-differentially private, adjacency: {self.adjacency}, "
            f"{self.composition} composition, accountant: {self.accountant}"
        )
        lines = [f"  {mechanism}" for mechanism in self.mechanisms]
        return "\n".join([head, *lines, *(f"  assumes: {a}" for a in self.assumptions)])


def check_budget(
    epsilon: float | None, delta: float, multipliers: object, adjacency: Adjacency, accountant: Accountant
) -> None:
    """The part of every method's constructor that is about privacy: exactly one of epsilon and noise multipliers."""
    if (epsilon is None) == (multipliers is None):
        raise ValueError("give either epsilon or noise multipliers, not both and not neither")
    if epsilon is not None:
        check_positive("epsilon", epsilon)
    check_positive("delta", delta, below=1)
    check_choice("adjacency", adjacency, tuple(Adjacency))
    check_choice("accountant", accountant, tuple(Accountant))


def sampling_for(adjacency: Adjacency, accountant: Accountant) -> Sampling:
    """The sampling scheme whose amplification the accountant can bound under this adjacency."""
    fixed = adjacency == Adjacency.REPLACE and accountant == Accountant.RDP
    return Sampling.FIXED if fixed else Sampling.POISSON


def sampled(what: str, relative_noise: float, count: int, batch: int, population: int, sampling: Sampling) -> Mechanism:
    """A mechanism on batches of (expected) size `batch`; the whole population needs no sampling."""
    if batch >= population:
        return Mechanism(what, relative_noise, count)
    return Mechanism(what, relative_noise, count, sampling, batch / population, population)


@lru_cache(maxsize=1024)
def spent_epsilon(
    mechanisms: tuple[Mechanism, ...],
    delta: float,
    adjacency: Adjacency = Adjacency.REPLACE,
    accountant: Accountant = Accountant.RDP,
    composition: Composition = Composition.SEQUENTIAL,
) -> float:
    """Epsilon of the composed mechanisms at `delta`; infinity where a release carries no noise.

    Raises:
        ValueError: `delta` outside (0, 1), or a sampling scheme that the accountant cannot treat.
        MissingExtra: `dp-accounting` is not installed.

    >>> spent_epsilon((Mechanism("gradient", 5.0, 10), Mechanism("difference", 8.0, 90)), 1e-5)
    6.67...
    """
    check_positive("delta", delta, below=1)
    if composition == Composition.PARALLEL:
        return max((spent_epsilon((m,), delta, adjacency, accountant) for m in mechanisms), default=0.0)
    if any(m.noise_multiplier == 0 and m.count > 0 for m in mechanisms):
        return math.inf
    with _without_order_warnings():
        composed = _fresh(adjacency, accountant)().compose(_event(mechanisms, adjacency, accountant))
        return float(composed.get_epsilon(delta))


@lru_cache(maxsize=1024)
def calibrate(
    mechanisms: tuple[Mechanism, ...],
    epsilon: float,
    delta: float,
    adjacency: Adjacency = Adjacency.REPLACE,
    accountant: Accountant = Accountant.RDP,
) -> tuple[Mechanism, ...]:
    """The mechanisms with their noise scaled by one common factor so that they compose to at most `epsilon`.

    The noise multipliers that come in say only how the noise is shared between the mechanisms. The epsilon reached is
    within one per cent of the asked one, never above it. Milliseconds with Renyi accounting of full batches, a second
    or two for samples of fixed size and for privacy loss distributions.

    Raises:
        ValueError: `epsilon` not positive, `delta` outside (0, 1), or no amount of noise is enough.

    >>> (m,) = calibrate((Mechanism("gradient", 1.0, 100),), epsilon=1.0, delta=1e-5)
    >>> 0.99 <= spent_epsilon((m,), 1e-5) <= 1.0
    True
    """
    check_positive("epsilon", epsilon)
    check_positive("delta", delta, below=1)
    mechanisms = tuple(m for m in mechanisms if m.count > 0)
    if not mechanisms:
        return ()
    library = _library()
    fresh = _fresh(adjacency, accountant)

    def event(scale: float) -> "dp_accounting.DpEvent":
        return _event(_scaled(mechanisms, scale), adjacency, accountant)

    def too_loud(scale: float) -> bool:
        return bool(fresh().compose(event(scale)).get_epsilon(delta) > epsilon)

    start, factor = 1.0, 2.0
    if accountant == Accountant.PLD and (adjacency == Adjacency.ADD_REMOVE or not _any_sampled(mechanisms)):
        # Renyi accounting takes milliseconds and asks for slightly more noise: the search is short from there.
        renyi = calibrate(mechanisms, epsilon, delta, adjacency, Accountant.RDP)
        start, factor = renyi[0].noise_multiplier / mechanisms[0].noise_multiplier, 1.25
    with _without_order_warnings():
        high = _first(lambda s: not too_loud(s), start, factor)
        low = high / factor if high > start else _first(too_loud, high / factor, 1 / factor)
        bracket = library.ExplicitBracketInterval(low, factor * low)
        scale = library.calibrate_dp_mechanism(fresh, event, epsilon, delta, bracket, tol=1e-4 * low)
    return _scaled(mechanisms, scale)


def _any_sampled(mechanisms: tuple[Mechanism, ...]) -> bool:
    return any(m.sampling != Sampling.ALL for m in mechanisms)


def _scaled(mechanisms: tuple[Mechanism, ...], scale: float) -> tuple[Mechanism, ...]:
    return tuple(replace(m, noise_multiplier=m.noise_multiplier * scale) for m in mechanisms)


def _first(good: Callable[[float], bool], start: float, factor: float) -> float:
    scale = start
    for _ in range(60):
        if good(scale):
            return scale
        scale *= factor
    raise ValueError(f"no noise between {start:g} and {scale:g} times the given multipliers meets this budget")


def _event(
    mechanisms: tuple[Mechanism, ...], adjacency: Adjacency, accountant: Accountant
) -> "dp_accounting.ComposedDpEvent":
    library = _library()
    # The library's PLD accountant measures noise against the norm bound of one example, half the sensitivity under
    # replacement; its RDP accountant against the sensitivity itself. Ours is the sensitivity throughout.
    unit = adjacency.bounded_terms if accountant == Accountant.PLD else 1
    events = []
    for m in mechanisms:
        event = library.GaussianDpEvent(m.noise_multiplier * unit)
        if m.sampling == Sampling.POISSON:
            event = library.PoissonSampledDpEvent(m.rate, event)
        elif m.sampling == Sampling.FIXED:
            event = library.SampledWithoutReplacementDpEvent(m.population, round(m.rate * m.population), event)
        events.append(library.SelfComposedDpEvent(event, m.count))
    composed = library.ComposedDpEvent(events)
    if not _fresh(adjacency, accountant)().supports(composed):
        raise ValueError(f"the {accountant} accountant cannot bound this sampling under adjacency {adjacency!r}")
    return composed


def _fresh(adjacency: Adjacency, accountant: Accountant) -> Callable[[], "dp_accounting.PrivacyAccountant"]:
    library = _library()
    relation = library.NeighboringRelation
    chosen = relation.REPLACE_ONE if adjacency == Adjacency.REPLACE else relation.ADD_OR_REMOVE_ONE
    if accountant == Accountant.PLD:
        return lambda: library.pld.PLDAccountant(chosen)
    return lambda: library.rdp.RdpAccountant(ORDERS, chosen)


def _library():
    library = require("dp_accounting", "privacy")
    require("dp_accounting.pld", "privacy")
    require("dp_accounting.rdp", "privacy")
    return library


@contextmanager
def _without_order_warnings() -> Iterator[None]:
    """Leave out the library's remarks on Renyi orders that it skips: skipping one is sound, and there are dozens."""

    def unlike(record: logging.LogRecord) -> bool:
        return "Excluding this order" not in record.getMessage()

    logger = logging.getLogger("absl")
    logger.addFilter(unlike)
    try:
        yield
    finally:
        logger.removeFilter(unlike)
