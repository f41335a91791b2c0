"""Second-order forward differentiation of functions of a few variables that are written in plain arithmetic."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray


@dataclass(frozen=True, eq=False)
class Jet:
    """Value, gradient (n,) and Hessian (n, n) of one expression; arithmetic carries them along, O(n^2) an operation."""

    value: float
    gradient: ndarray  # shapes are not checked at run time: that takes ten times as long as the arithmetic
    hessian: ndarray

    @classmethod
    def variables(cls, x: Float[ndarray, " n"]) -> "list[Jet]":
        flat = np.zeros((x.size, x.size))
        return [cls(value, e, flat) for value, e in zip(x.tolist(), np.eye(x.size))]

    def chain(self, value: float, first: float, second: float) -> "Jet":
        """phi(self), given phi, phi' and phi'' at the value."""
        curved = second * (self.gradient[:, None] * self.gradient)
        return Jet(value, first * self.gradient, first * self.hessian + curved)

    def __add__(self, other: "Jet | int | float") -> "Jet":
        if isinstance(other, Jet):
            return Jet(self.value + other.value, self.gradient + other.gradient, self.hessian + other.hessian)
        return Jet(self.value + other, self.gradient, self.hessian)

    def __mul__(self, other: "Jet | int | float") -> "Jet":
        if not isinstance(other, Jet):
            return Jet(self.value * other, self.gradient * other, self.hessian * other)
        a, b = self, other
        mixed = a.gradient[:, None] * b.gradient
        return Jet(
            a.value * b.value,
            a.value * b.gradient + b.value * a.gradient,
            a.value * b.hessian + b.value * a.hessian + mixed + mixed.T,
        )

    def __pow__(self, power: int) -> "Jet":
        """Powers from 2 up."""
        t = self.value
        return self.chain(t**power, power * t ** (power - 1), power * (power - 1) * t ** (power - 2))

    def __neg__(self) -> "Jet":
        return self * -1.0

    def __sub__(self, other: "Jet | int | float") -> "Jet":
        return self + (-other)

    def __rsub__(self, other: int | float) -> "Jet":
        return -self + other

    __radd__ = __add__
    __rmul__ = __mul__


def sin(t: Jet) -> Jet:
    s = float(np.sin(t.value))
    return t.chain(s, float(np.cos(t.value)), -s)


def log(t: Jet) -> Jet:
    return t.chain(float(np.log(t.value)), 1 / t.value, -1 / t.value**2)
