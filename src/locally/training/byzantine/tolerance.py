"""How many faulty nodes each rule survives, and what the theory promises below that (arXiv 2209.10931)."""

from typing import NamedTuple

from locally.checks import check_count


class BeyondBreakdown(ValueError):
    """More faulty nodes than the rule can survive; the message gives the bound."""


class TooFewVectors(ValueError):
    """Fewer usable vectors than the rule needs, so that a result would rest on faulty ones."""


class Reduction(NamedTuple):
    """Mixing leaves at most `contraction` of the honest vectors' variance and moves their mean by at most
    sqrt(`displacement` * variance): the pair (alpha, lambda) of the paper."""

    contraction: float
    displacement: float


def check_network(n: int, f: int) -> None:
    """At least two nodes, of which fewer than half are faulty: beyond that no method can tell who is honest.

    Raises:
        TypeError, ValueError: n or f is not a count in range.
        BeyondBreakdown: f >= n / 2.
    """
    check_count("n", n, at_least=2)
    check_count("f", f, at_least=0)
    if 2 * f >= n:
        raise BeyondBreakdown(
            f"f must be below n / 2: at most {(n - 1) // 2} of n = {n} nodes may be faulty, got f = {f}"
        )


def check_breakdown(rule: str, n: int, f: int, factor: int, extra: int) -> None:
    """`rule` stands f >= 1 faulty nodes only among n >= factor * f + extra."""
    if f > 0 and n < factor * f + extra:
        raise BeyondBreakdown(
            f"{rule} needs n >= {factor} f + {extra} nodes, so at most f = {max((n - extra) // factor, 0)} faulty ones"
            f" of n = {n}; got f = {f}"
        )


def reduction_bound(n: int, f: int, rounds: int = 1) -> Reduction:
    """What `rounds` rounds of nearest-neighbour averaging guarantee for n >= 11 f (arXiv 2209.10931).

    Raises:
        BeyondBreakdown: n < 11 f, which the theory does not cover.

    >>> reduction_bound(16, 1)
    Reduction(contraction=0.658..., displacement=0.6)
    """
    check_network(n, f)
    check_count("rounds", rounds)
    if n < 11 * f:
        raise BeyondBreakdown(f"the theory needs n >= 11 f, got n = {n} and f = {f}")
    once = 9.88 * f / (n - f)
    effective = min(rounds, 1 / (1 - once**0.5) ** 2) if once < 1 else rounds
    return Reduction(once**rounds, 9 * f / (n - f) * effective)
