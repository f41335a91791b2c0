"""Fourteen equality-constrained problems of the Hock-Schittkowski collection, exact derivatives included.

Source: Hock and Schittkowski, Test Examples for Nonlinear Programming Codes (1981), in the form of the CUTEst set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from locally.checks import check_choice
from locally.optimize.constrained.problem import EqualityProblem
from locally.optimize.constrained.problems.instance import Instance
from locally.optimize.constrained.problems.jets import Jet, log, sin

Formulas = Callable[..., tuple[Jet | float, ...]]


def hock_schittkowski(name: str) -> Instance:
    """One of `NAMES`, multipliers starting at 0.

    Raises:
        ValueError: there is no such problem here.

    >>> hock_schittkowski("HS28").problem.fun(np.array([-4.0, 1.0, 1.0]))
    13.0
    """
    check_choice("name", name, NAMES)
    formulas, x0, optimum = _COLLECTION[name]
    start = np.array(x0, dtype=float)
    problem = problem_of(formulas, start)
    return Instance(name, problem, start, np.zeros(problem.m), optimum)


def problem_of(formulas: Formulas, x0: Float[ndarray, " n"]) -> EqualityProblem:
    """The problem whose objective and constraints `formulas` returns, written in arithmetic on its n arguments."""
    jets = _Jets(formulas)
    return EqualityProblem(
        n=x0.size,
        m=len(jets.at(x0)) - 1,
        fun=lambda x: jets.at(x)[0].value,
        grad=lambda x: jets.at(x)[0].gradient,
        constr=lambda x: np.array([c.value for c in jets.at(x)[1:]]),
        jac=lambda x: np.array([c.gradient for c in jets.at(x)[1:]]).reshape(-1, x.size),
        hess=lambda x, lam: sum((w * c.hessian for w, c in zip(lam, jets.at(x)[1:])), jets.at(x)[0].hessian),
    )


@dataclass(eq=False)
class _Jets:
    """All functions with two derivatives at the last point that was asked for."""

    formulas: Formulas
    key: bytes = b""
    values: tuple[Jet, ...] = ()

    def at(self, x: Float[ndarray, " n"]) -> tuple[Jet, ...]:
        if (key := x.tobytes()) != self.key:
            variables = Jet.variables(x)
            zero = 0.0 * variables[0]
            self.values, self.key = tuple(zero + formula for formula in self.formulas(*variables)), key
        return self.values


def _hs6(x, y):
    return (1 - x) ** 2, 10 * (y - x**2)


def _hs7(x, y):
    return log(1 + x**2) - y, (1 + x**2) ** 2 + y**2 - 4


def _hs28(x, y, z):
    return (x + y) ** 2 + (y + z) ** 2, x + 2 * y + 3 * z - 1


def _hs40(a, b, c, d):
    return -(a * b * c * d), a**3 + b**2 - 1, a**2 * d - c, d**2 - b


def _hs42(a, b, c, d):
    return (a - 1) ** 2 + (b - 2) ** 2 + (c - 3) ** 2 + (d - 4) ** 2, a - 2, c**2 + d**2 - 2


def _hs47(a, b, c, d, e):
    f = (a - b) ** 2 + (b - c) ** 3 + (c - d) ** 4 + (d - e) ** 4
    return f, a + b**2 + c**3 - 3, b - c**2 + d - 1, a * e - 1


def _hs48(a, b, c, d, e):
    return (a - 1) ** 2 + (b - c) ** 2 + (d - e) ** 2, a + b + c + d + e - 5, c - 2 * (d + e) + 3


def _hs50(a, b, c, d, e):
    f = (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 2
    return f, a + 2 * b + 3 * c - 6, b + 2 * c + 3 * d - 6, c + 2 * d + 3 * e - 6


def _hs51(a, b, c, d, e):
    f = (a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2
    return f, a + 3 * b - 4, c + d - 2 * e, b - e


def _hs52(a, b, c, d, e):
    f = (4 * a - b) ** 2 + (b + c - 2) ** 2 + (d - 1) ** 2 + (e - 1) ** 2
    return f, a + 3 * b, c + d - 2 * e, b - e


def _hs77(a, b, c, d, e):
    f = (a - 1) ** 2 + (a - b) ** 2 + (c - 1) ** 2 + (d - 1) ** 4 + (e - 1) ** 6
    return f, a**2 * d + sin(d - e) - 2 * sqrt(2), b + c**4 * d**2 - 8 - sqrt(2)


def _hs78(a, b, c, d, e):
    return a * b * c * d * e, a**2 + b**2 + c**2 + d**2 + e**2 - 10, b * c - 5 * (d * e), a**3 + b**3 + 1


def _hs79(a, b, c, d, e):
    f = (a - 1) ** 2 + (a - b) ** 2 + (b - c) ** 2 + (c - d) ** 4 + (d - e) ** 4
    return f, a + b**2 + c**3 - 2 - 3 * sqrt(2), b - c**2 + d + 2 - 2 * sqrt(2), a * e - 2


def _hs100lnp(a, b, c, d, e, f, g):
    objective = (
        *((a - 10) ** 2, 5 * (b - 12) ** 2, c**4, 3 * (d - 11) ** 2, 10 * e**6, 7 * f**2, g**4),
        *(-4 * (f * g), -10 * f, -8 * g),
    )
    first = 2 * a**2 + 3 * b**4 + c + 4 * d**2 + 5 * e - 127
    second = 4 * a**2 + b**2 - 3 * (a * b) + 2 * c**2 + 5 * f - 11 * g
    return sum(objective), first, second


_COLLECTION: dict[str, tuple[Formulas, tuple[float, ...], float]] = {
    "HS6": (_hs6, (-1.2, 1), 0.0),
    "HS7": (_hs7, (2, 2), -sqrt(3)),
    "HS28": (_hs28, (-4, 1, 1), 0.0),
    "HS40": (_hs40, (0.8,) * 4, -0.25),
    "HS42": (_hs42, (1,) * 4, 28 - 10 * sqrt(2)),
    "HS47": (_hs47, (2, sqrt(2), -1, 2 - sqrt(2), 0.5), 0.0),
    "HS48": (_hs48, (3, 5, -3, 2, -2), 0.0),
    "HS50": (_hs50, (35, -31, 11, 5, -5), 0.0),
    "HS51": (_hs51, (2.5, 0.5, 2, -1, 0.5), 0.0),
    "HS52": (_hs52, (2,) * 5, 1859 / 349),
    "HS77": (_hs77, (2,) * 5, 0.24150513),
    "HS78": (_hs78, (-2, 1.5, 2, -1, -1), -2.91970041),
    "HS79": (_hs79, (2,) * 5, 0.0787768209),
    "HS100LNP": (_hs100lnp, (1, 2, 0, 4, 0, 1, 1), 680.6300573),
}
NAMES = tuple(_COLLECTION)
