"""Extreme eigenpairs by thick restarts. Source: Wu and Simon, SIAM J. Matrix Anal. 22 (2000)."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from locally.checks import check_count, check_finite, check_positive
from locally.linalg.lanczos.recurrence import (
    Checked,
    Operator,
    check_coefficients,
    describe,
    fresh_direction,
    orthogonalise,
    rounding,
)


class Status(StrEnum):
    """How a search for extreme eigenpairs ended; set by `ExtremeEigenvalues`."""

    CONVERGED = "converged"
    PRODUCT_LIMIT = "product limit: the residuals say how far each pair has come"


@dataclass(frozen=True)
class Eigenpairs:
    """Extreme eigenvalues in descending order, with orthonormal vectors and the norms of A v - lambda v."""

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "k p"]
    residuals: Float[Tensor, " k"]
    status: Status
    products: int


@dataclass(frozen=True, kw_only=True)
class ExtremeEigenvalues:
    """The algebraically largest and smallest eigenvalues of a symmetric operator, by Lanczos with thick restarts.

    A restart keeps the Ritz vectors nearest to both wanted ends, so memory stays at `basis` vectors. Like every Krylov
    method it sees one copy of a multiple eigenvalue, until its space is exhausted and it goes on from a random vector.

    Args:
        largest, smallest: how many from each end, >= 0, together >= 1.
        rtol: a pair has converged when its residual is at most rtol times the largest Ritz value in size, in (0, 1).
        max_products: products after which to stop, at least largest + smallest.
        basis: vectors kept, more than largest + smallest + 2; default max(24, 4 (largest + smallest)).

    Raises:
        ValueError: an argument is out of range.
    """

    largest: int = 1
    smallest: int = 0
    rtol: float = 1e-6
    max_products: int = 1000
    basis: int | None = None

    def __post_init__(self) -> None:
        check_count("largest", self.largest, at_least=0)
        check_count("smallest", self.smallest, at_least=0)
        if not self.wanted:
            raise ValueError("largest + smallest must be at least 1, got 0")
        check_positive("rtol", self.rtol, below=1)
        check_count("max_products", self.max_products, at_least=self.wanted)
        if self.basis is not None:
            check_count("basis", self.basis, at_least=self.wanted + 3)

    @property
    def wanted(self) -> int:
        """Eigenpairs from both ends together."""
        return self.largest + self.smallest

    def solve(
        self,
        op: Operator,
        start: Float[Tensor, " p"] | None = None,
        *,
        generator: Generator | None = None,
        callback: Callable[[int, float], None] | None = None,
    ) -> Eigenpairs:
        """Run from `start`, by default a random vector; `callback(products, largest residual)` sees every product.

        Args:
            op: a symmetric matrix, or a function of one vector (p,); a function without `shape`, `dtype` and `device`
                needs `start`.

        Raises:
            ValueError: `start` cannot be used, more eigenvalues are wanted than there are, `op` is not symmetric.
            ArithmeticError: `op` returns NaN or infinity.

        >>> A = torch.diag(torch.arange(1.0, 101.0))
        >>> found = ExtremeEigenvalues(largest=2, smallest=1).solve(A, generator=torch.Generator().manual_seed(0))
        >>> found.values.round(decimals=2)
        tensor([100.,  99.,   1.])
        """
        if start is None:
            size, dtype, device = describe(op)
            start = torch.randn(size, dtype=dtype, device=device, generator=generator)
        check_finite("start", start)
        if start.ndim != 1 or not start.norm() > 0:
            raise ValueError(f"start must be one vector that is not zero, got shape {tuple(start.shape)}")
        if self.wanted > len(start):
            raise ValueError(f"largest + smallest = {self.wanted} eigenvalues of a matrix that has {len(start)}")
        rows = min(self.basis or max(24, 4 * self.wanted), len(start))
        space = RitzSpace(Checked(op, start[None]), start, rows, generator)
        while True:
            space.extend()
            if space.size < self.wanted:
                continue
            order = torch.cat([torch.arange(self.smallest), torch.arange(space.size - self.largest, space.size)]).flip(
                0
            )
            worst = float(space.residuals[order].max())
            if callback is not None:
                callback(space.products, worst)
            converged = worst <= self.rtol * float(space.theta.abs().max())
            if converged or space.products >= self.max_products:
                status = Status.CONVERGED if converged else Status.PRODUCT_LIMIT
                values, residuals = space.theta[order].to(start), space.residuals[order].to(start)
                return Eigenpairs(values, space.ritz_vectors(order), residuals, status, space.products)
            if space.size == rows:
                space.restart(self._kept(rows))

    def _kept(self, rows: int) -> Int[Tensor, " kept"]:
        """Ritz vectors that survive a restart: those wanted and, in half of the remaining room, their neighbours."""
        spare = (rows - self.wanted) // 2
        low = self.smallest + spare * self.smallest // self.wanted
        high = self.wanted + spare - low
        return torch.cat([torch.arange(low), torch.arange(rows - high, rows)])


class RitzSpace:
    """A growing orthonormal basis Q with T = Q A Q^T, its Ritz values and residuals, and the direction to go next."""

    def __init__(self, multiply: "Checked", start: Float[Tensor, " p"], rows: int, generator: Generator | None) -> None:
        self._multiply, self._generator = multiply, generator
        self._Q = start.new_zeros(rows + 1, len(start))
        self._Q[0] = start / start.norm()
        self._T = torch.zeros(rows, rows, dtype=torch.float64)
        self._coupling = torch.zeros(0, dtype=torch.float64)  # q_i^T A q_next for the rows so far
        self._scale = torch.zeros(1, dtype=torch.float64)  # a lower bound on the norm of A
        self.size, self.products = 0, 0
        self.theta = self.residuals = self._coupling
        self._S = self._T[:0, :0]

    def extend(self) -> None:
        """One product, and one more row."""
        j = self.size
        w = self._multiply(self._Q[j : j + 1])
        self.products += 1
        self._scale = torch.maximum(self._scale, w.norm().double().cpu())
        w, h = orthogonalise(w, self._Q[None, : j + 1])
        h = h[0].cpu()
        eps = torch.finfo(w.dtype).eps
        check_coefficients(h[None], torch.cat([self._coupling, h[-1:]])[None], self._scale, eps)
        self._T[j, :j] = self._T[:j, j] = self._coupling
        self._T[j, j] = h[j]
        beta = float(w.norm())
        if exhausted := beta <= rounding(eps, w.shape[1]) * float(self._scale):
            beta = 0.0
        self.size = j + 1
        self.theta, self._S = torch.linalg.eigh(self._T[: j + 1, : j + 1])
        self.residuals = beta * self._S[-1].abs()
        self._coupling = torch.zeros(j + 1, dtype=torch.float64)
        self._coupling[-1] = beta
        self._Q[j + 1] = fresh_direction(self._Q[: j + 1], self._generator) if exhausted else w[0] / beta

    def ritz_vectors(self, which: Int[Tensor, " k"]) -> Float[Tensor, "k p"]:
        return self._S[:, which].T.to(self._Q) @ self._Q[: self.size]

    def restart(self, kept: Int[Tensor, " k"]) -> None:
        """Go on from the Ritz vectors `kept`: T is diagonal on them, and all are coupled to the next direction."""
        following = self._Q[self.size].clone()
        beta = self._coupling[-1]
        k = len(kept)
        self._Q[:k] = self.ritz_vectors(kept)
        self._Q[k] = following
        self._coupling = beta * self._S[-1, kept]
        self._T.zero_()
        self._T[:k, :k] = self.theta[kept].diag()
        self.size = k


# Stochastic Lanczos quadrature ----------------------------------------------------------------------------------------
