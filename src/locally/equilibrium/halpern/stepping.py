"""Runs of stochastic steps between two full evaluations, in two forms with the same meaning.

`CompiledSteps` serves ready-made operators and resolvents on NumPy arrays: a run of steps is one call of a kernel.
`PlainSteps` serves everything else - functions of the user's, torch tensors on any device - and is what the tests
compare the kernels with. Nothing here changes its arguments.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from locally.equilibrium.halpern import kernels
from locally.equilibrium.halpern.operators import FiniteSumOperator, stacked
from locally.equilibrium.halpern.resolvents import Resolvent, ResolventLike, Unconstrained, tabulate

Batches = Int[ndarray, "steps b ..."]


class Steps(ABC):
    @abstractmethod
    def anchored(self, anchor: Any, u: Any, estimate: Any, k: int, eta: float) -> tuple[Any, Any]:
        """Step k from u with a given estimate of F(u): the next point and what the resolvent was applied to."""

    @abstractmethod
    def halpern(
        self, anchor: Any, u: Any, u_before: Any, estimate: Any, k: int, eta: float, drawn: Batches
    ) -> tuple[Any, Any, Any, Any]:
        """One PAGE correction and anchored step per batch: (u, u_before, estimate, argument)."""

    @abstractmethod
    def forb(
        self, centre: Any, v: Any, w: Any, w_before: Any, F_w: Any, eta: float, tau: float, alpha: float, drawn: Batches
    ) -> tuple[Any, Any]:
        """VR-FoRB steps on eta F + Id - centre while the snapshot w stays: (v, argument)."""

    @abstractmethod
    def extragradient(self, u: Any, w: Any, F_w: Any, gamma: float, alpha: float, drawn: Batches) -> tuple[Any, Any]:
        """Variance-reduced extragradient steps while the snapshot w stays: (u, argument)."""


class PlainSteps(Steps):
    def __init__(self, op: FiniteSumOperator, J: ResolventLike) -> None:
        self.op, self.J = op, J

    def anchored(self, anchor: Any, u: Any, estimate: Any, k: int, eta: float) -> tuple[Any, Any]:
        pull = 2 / (k + 4)
        argument = pull * anchor + (1 - pull) * u - eta * estimate
        return self.J(argument, eta), argument

    def halpern(
        self, anchor: Any, u: Any, u_before: Any, estimate: Any, k: int, eta: float, drawn: Batches
    ) -> tuple[Any, Any, Any, Any]:
        argument = u
        for s, batch in enumerate(drawn):
            estimate = estimate + self.op.diff(u, u_before, batch)
            u_before = u
            u, argument = self.anchored(anchor, u, estimate, k + s, eta)
        return u, u_before, estimate, argument

    def forb(
        self, centre: Any, v: Any, w: Any, w_before: Any, F_w: Any, eta: float, tau: float, alpha: float, drawn: Batches
    ) -> tuple[Any, Any]:
        argument = v
        for batch in drawn:
            reflected = eta * (F_w + self.op.diff(v, w_before, batch)) + (w - centre) + (v - w_before)
            argument = alpha * v + (1 - alpha) * w - tau * reflected
            v, w_before = self.J(argument, tau * eta), w
        return v, argument

    def extragradient(self, u: Any, w: Any, F_w: Any, gamma: float, alpha: float, drawn: Batches) -> tuple[Any, Any]:
        argument = u
        for batch in drawn:
            middle = alpha * u + (1 - alpha) * w
            half = self.J(middle - gamma * F_w, gamma)
            argument = middle - gamma * (F_w + self.op.diff(half, w, batch))
            u = self.J(argument, gamma)
        return u, argument


class CompiledSteps(Steps):
    def __init__(self, components: kernels.Components, pieces: kernels.Pieces) -> None:
        self.components, self.pieces = components, pieces

    def anchored(self, anchor: Any, u: Any, estimate: Any, k: int, eta: float) -> tuple[Any, Any]:
        u, argument = u.copy(), np.empty_like(u)
        kernels.anchored_step(self.pieces, anchor, u, estimate, argument, k, eta)
        return u, argument

    def halpern(
        self, anchor: Any, u: Any, u_before: Any, estimate: Any, k: int, eta: float, drawn: Batches
    ) -> tuple[Any, Any, Any, Any]:
        u, u_before, estimate, argument = u.copy(), u_before.copy(), estimate.copy(), u.copy()
        kernels.halpern_steps(
            self.components, self.pieces, anchor, u, u_before, estimate, argument, k, eta, stacked(drawn)
        )
        return u, u_before, estimate, argument

    def forb(
        self, centre: Any, v: Any, w: Any, w_before: Any, F_w: Any, eta: float, tau: float, alpha: float, drawn: Batches
    ) -> tuple[Any, Any]:
        v, w_before, argument = v.copy(), w_before.copy(), v.copy()
        kernels.forb_steps(
            self.components, self.pieces, centre, v, w, w_before, F_w, argument, eta, tau, alpha, stacked(drawn)
        )
        return v, argument

    def extragradient(self, u: Any, w: Any, F_w: Any, gamma: float, alpha: float, drawn: Batches) -> tuple[Any, Any]:
        u, argument = u.copy(), u.copy()
        kernels.extragradient_steps(self.components, self.pieces, u, w, F_w, argument, gamma, alpha, stacked(drawn))
        return u, argument


def steps_for(op: FiniteSumOperator, J: ResolventLike) -> Steps:
    """Compiled where both the operator and the resolvent are ready-made."""
    components = op.compiled()
    if components is None or not isinstance(J, Resolvent):
        return PlainSteps(op, bind(J, op))
    return CompiledSteps(components, tabulate(J, op.dim, op.dtype))


def bind(J: ResolventLike, op: FiniteSumOperator) -> ResolventLike:
    """J with its pieces written down once, for NumPy vectors of the operator's size."""
    if not isinstance(J, Resolvent) or isinstance(J, Unconstrained) or op.dtype is None:
        return J
    pieces = tabulate(J, op.dim, op.dtype)

    def apply(z: Any, eta: float) -> Any:
        out = z.copy()
        kernels.resolve(out, eta, pieces)
        return out

    return apply


def norm(v: Any) -> float:
    """Euclidean norm of a NumPy vector or torch tensor."""
    return float(v @ v) ** 0.5
