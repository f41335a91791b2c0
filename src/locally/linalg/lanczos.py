"""Spectra of symmetric matrices that are known only by their products: Lanczos on torch, with every vector kept.

Krylov bases with full reorthogonalisation, so that single precision breeds no ghost eigenvalues; extreme eigenpairs by
thick restarts; spectral densities and traces of functions by stochastic Lanczos quadrature. Sources: Lanczos (1950);
Wu and Simon, SIAM J. Matrix Anal. 22 (2000), for the restart; Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38 (2017),
for the quadrature.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from locally.checks import check_between, check_choice, check_count, check_finite, check_positive, check_square

Product = Callable[[Tensor], Tensor]
Operator = Product | Tensor


@dataclass(frozen=True)
class KrylovBasis:
    """A Q_m = Q_m T_m + beta_m q_{m+1} e_m^T for each of k starting vectors; T_m is tridiagonal.

    Attributes:
        alpha: diagonals of T_m, in double precision.
        beta: sub-diagonals, and in the last column the norm of what is left over; zero once a space is exhausted.
        vectors: orthonormal rows q_1, ..., q_m; zero rows past `steps`.
        steps: rows that each starting vector led to, below m where its Krylov space ended.
    """

    alpha: Float[Tensor, "k m"]
    beta: Float[Tensor, "k m"]
    vectors: Float[Tensor, "k m p"]
    steps: Int[Tensor, " k"]

    def tridiagonal(self) -> Float[Tensor, "k m m"]:
        off = self.beta[:, :-1]
        return self.alpha.diag_embed() + off.diag_embed(1) + off.diag_embed(-1)

    def quadrature(self) -> "SpectralMeasure":
        """Gauss quadrature of the spectrum as each starting vector sees it: Ritz values and their weights."""
        nodes, S = torch.linalg.eigh(self.tridiagonal())
        return SpectralMeasure(nodes, S[:, 0].square(), self.steps, self.vectors.shape[-1])


def lanczos(
    op: Operator,
    start: Float[Tensor, "k p"],
    steps: int,
    *,
    callback: Callable[[int, int], None] | None = None,
) -> KrylovBasis:
    """Run `steps` steps of Lanczos from every row of `start` at once, each with its own Krylov space.

    Every new vector is orthogonalised twice against all before it. That costs 4 m^2 p flops a start in all and m p
    numbers of memory; on the way it shows whether the operator is symmetric.

    Args:
        op: a symmetric matrix (p, p), or a function v -> A v of a stack (k, p) of row vectors, and of one vector (p,)
            where k is 1. Row i of a stack may meet a matrix of its own.
        start: finite and not zero; need not be normalised.
        steps: at least 1; no more than p are taken.
        callback: called with (steps done, steps in all).

    Raises:
        ValueError: `start` cannot be used, `op` returns another shape or is not symmetric.
        ArithmeticError: `op` returns NaN or infinity.

    >>> basis = lanczos(torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.ones(1, 3), steps=3)
    >>> torch.linalg.eigvalsh(basis.tridiagonal()).round(decimals=4)
    tensor([[1., 2., 4.]], dtype=torch.float64)
    """
    check_count("steps", steps)
    if start.ndim != 2 or not start.numel():
        raise ValueError(f"start must have shape (k, p) with k, p >= 1, got {tuple(start.shape)}")
    check_finite("start", start)
    norms = start.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise ValueError("start holds a zero vector")
    multiply = Checked(op, start)
    k, p = start.shape
    m = min(steps, p)
    alpha, beta = torch.zeros(2, k, m, dtype=torch.float64, device=start.device)
    Q = start.new_zeros(k, m, p)
    Q[:, 0] = start / norms
    taken = torch.ones(k, dtype=torch.int64, device=start.device)
    scale = torch.zeros(k, dtype=torch.float64, device=start.device)  # a lower bound on the norm of A
    eps = torch.finfo(start.dtype).eps
    for j in range(m):
        expected = torch.zeros(k, j + 1, dtype=torch.float64, device=start.device)
        if j:
            expected[:, j - 1] = beta[:, j - 1]
        w = multiply(Q[:, j])
        scale = torch.maximum(scale, w.norm(dim=1).double())
        w, h = orthogonalise(w, Q[:, : j + 1])
        check_coefficients(h, expected, scale, eps)
        alpha[:, j] = h[:, j]
        left = w.norm(dim=1).double()
        alive = left > rounding(eps, p) * scale
        beta[:, j] = torch.where(alive, left, 0)
        if j + 1 < m:
            Q[:, j + 1] = torch.where(alive[:, None], w / left.clamp_min(1e-300)[:, None].to(w.dtype), 0)
            taken += alive & (taken == j + 1)
        if callback is not None:
            callback(j + 1, m)
        if not alive.any():
            break
    return KrylovBasis(alpha, beta, Q, taken)


# Extreme eigenpairs ---------------------------------------------------------------------------------------------------


class Status(StrEnum):
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


@dataclass(frozen=True)
class Estimate:
    """A mean over independent probes; the standard error is NaN for a single one."""

    value: float
    stderr: float


@dataclass(frozen=True)
class SpectralMeasure:
    """The eigenvalue distribution of a p x p matrix, as `probes` Gauss quadratures of total weight 1 each.

    Attributes:
        nodes, weights: Ritz values of each probe in ascending order, and squared first components of the eigenvectors.
        steps: Lanczos steps behind each probe; past an exhausted space nodes are zero and weigh nothing.
        size: p.
    """

    nodes: Float[Tensor, "probes m"]
    weights: Float[Tensor, "probes m"]
    steps: Int[Tensor, " probes"]
    size: int

    @property
    def largest(self) -> float:
        """The largest Ritz value: never above the largest eigenvalue, and close to it after some tens of steps."""
        return float(self._seen().max())

    @property
    def smallest(self) -> float:
        return float(self._seen().min())

    def trace(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """tr f(A), for a function of a tensor of eigenvalues, element by element.

        Raises:
            ValueError: `function` is not finite at a node that has weight.

        >>> measure = spectral_measure(torch.diag(torch.arange(1.0, 11.0)), steps=10, probes=2)
        >>> round(measure.trace(torch.log).value, 3)  # log 10!
        15.104
        """
        weigh = self.weights > 0
        values = torch.where(weigh, function(torch.where(weigh, self.nodes, self._seen().max())), 0)
        if not values.isfinite().all():
            bad = self.nodes[~values.isfinite()][0]
            raise ValueError(f"function is not finite at the Ritz value {float(bad):.6g}")
        each = self.size * (self.weights * values).sum(1)
        stderr = float(each.std() / len(each) ** 0.5) if len(each) > 1 else math.nan
        return Estimate(float(each.mean()), stderr)

    def moment(self, order: int) -> Estimate:
        """tr(A^order) / p; exact for each probe up to order 2 m - 1."""
        check_count("order", order, at_least=0)
        found = self.trace(lambda x: x**order)
        return Estimate(found.value / self.size, found.stderr / self.size)

    def density(self, grid: Float[Tensor, " g"], width: float | None = None) -> Float[Tensor, " g"]:
        """The density at `grid`, each node spread to a normal of standard deviation `width`: 1 % of the range."""
        if width is None:
            width = max(0.01 * (self.largest - self.smallest), 1e-12 * max(abs(self.largest), 1e-300))
        check_positive("width", width)
        z = (grid.double()[:, None] - self.nodes.flatten()) / width
        bells = torch.exp(-z.square() / 2) / (width * math.sqrt(2 * math.pi))
        return bells @ self.weights.flatten() / len(self.nodes)

    def cumulative(self, x: float) -> float:
        """The fraction of eigenvalues at or below x."""
        return float(self.weights[self.nodes <= x].sum() / len(self.nodes))

    def quantile(self, q: float) -> float:
        """The smallest node with at least the fraction q of the eigenvalues at or below it, q in [0, 1]."""
        check_between("q", q, 0, 1)
        nodes, order = self._seen_sorted()
        total = order.cumsum(0) / len(self.nodes)
        at = int(torch.searchsorted(total, torch.tensor(q * (1 - 1e-12), dtype=total.dtype, device=total.device)))
        return float(nodes[min(at, len(nodes) - 1)])

    def _seen(self) -> Tensor:
        """Nodes that stand for Lanczos steps, not for the padding after an exhausted space."""
        padded = self.steps < self.nodes.shape[1]
        return self.nodes[~padded[:, None] | (self.weights > 0)]

    def _seen_sorted(self) -> tuple[Tensor, Tensor]:
        seen = self.weights > 0
        nodes, order = self.nodes[seen].sort()
        return nodes, self.weights[seen][order]


def spectral_measure(
    op: Operator,
    *,
    steps: int = 60,
    probes: int = 8,
    distribution: str = "rademacher",
    at_once: int | None = None,
    memory: int = 2**29,
    size: int | None = None,
    generator: Generator | None = None,
    callback: Callable[[int, int], None] | None = None,
) -> SpectralMeasure:
    """Stochastic Lanczos quadrature of the spectrum of a symmetric operator.

    Each probe costs `steps` products and 4 steps^2 p flops. Probes go through Lanczos together, which divides the fixed
    cost of a product among them; the bases of those under way are held in memory.

    Args:
        op: a symmetric matrix (p, p), or a function as for `lanczos`.
        steps: nodes a probe, >= 1.
        probes: independent starting vectors, >= 1.
        distribution: "rademacher" or "gaussian", both scaled to length 1.
        at_once: probes in one stack, >= 1; default as many as `memory` bytes allow. With 1 the operator sees vectors.
        size: p, for functions without `shape`; such run in single precision on the CPU.
        callback: called with (products done, products in all).

    Raises:
        ValueError, ArithmeticError: as `lanczos`.
    """
    check_count("steps", steps)
    check_count("probes", probes)
    check_count("memory", memory)
    check_choice("distribution", distribution, ("rademacher", "gaussian"))
    if size is None:
        p, dtype, device = describe(op)
    else:
        check_count("size", size)
        p, dtype, device = (
            size,
            getattr(op, "dtype", torch.get_default_dtype()),
            getattr(op, "device", torch.device("cpu")),
        )
    if at_once is None:
        at_once = max(1, memory // (min(steps, p) * p * dtype.itemsize))
    check_count("at_once", at_once)
    found = []
    for first in range(0, probes, at_once):
        k = min(at_once, probes - first)
        # one by one: the same seed gives the same probes, however many run together
        start = torch.stack([torch.randn(p, dtype=dtype, device=device, generator=generator) for _ in range(k)])
        if distribution == "rademacher":
            start = torch.where(start < 0, -1.0, 1.0).to(dtype)

        def tell(done: int, total: int, first: int = first, k: int = k) -> None:
            if callback is not None:
                callback(first * total + k * done, probes * total)

        found.append(lanczos(op, start, steps, callback=tell).quadrature())
    nodes, weights, taken = (torch.cat([getattr(f, name) for f in found]) for name in ("nodes", "weights", "steps"))
    return SpectralMeasure(nodes, weights, taken, p)


# Products and orthogonality -------------------------------------------------------------------------------------------


class Checked:
    """`op` as a function of a stack of row vectors, whose answers have been looked at."""

    def __init__(self, op: Operator, start: Float[Tensor, "k p"]) -> None:
        if isinstance(op, Tensor):
            check_square("op", op)
            check_finite("op", op)
        shape = getattr(op, "shape", None)
        if shape is not None and tuple(shape) != (start.shape[1],) * 2:
            raise ValueError(f"start has vectors of {start.shape[1]} entries, but op has shape {tuple(shape)}")
        self._op: Any = op

    def __call__(self, v: Float[Tensor, "k p"]) -> Float[Tensor, "k p"]:
        given = v[0] if len(v) == 1 else v
        w = given @ self._op if isinstance(self._op, Tensor) else self._op(given)
        if not isinstance(w, Tensor) or w.shape != given.shape:
            got = f"shape {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise ValueError(f"op must map a tensor of shape {tuple(given.shape)} to one like it, got {got}")
        if w.dtype != v.dtype:
            raise TypeError(f"op must keep the dtype {v.dtype}, got {w.dtype}")
        if not (w.sum().isfinite() or w.isfinite().all()):
            raise ArithmeticError("op returned NaN or infinity for a finite vector")
        return w.detach().view(v.shape)


def describe(op: Operator) -> tuple[int, torch.dtype, torch.device]:
    if any(not hasattr(op, name) for name in ("shape", "dtype", "device")):
        raise ValueError("op has no shape, dtype and device: say how large it is by a starting vector or size")
    op_: Any = op
    return int(op_.shape[-1]), op_.dtype, op_.device


def orthogonalise(
    w: Float[Tensor, "k p"], Q: Float[Tensor, "#k j p"]
) -> tuple[Float[Tensor, "k p"], Float[Tensor, "k j"]]:
    """w less its components along the rows of Q, and these components; the second pass removes what rounding left."""
    total = torch.zeros(Q.shape[:2], dtype=torch.float64, device=w.device)
    for _ in range(2):
        h = torch.einsum("kjp,kp->kj", Q, w)
        w = w - torch.einsum("kj,kjp->kp", h, Q)
        total += h
    return w, total


def rounding(eps: float, p: int) -> float:
    """What rounding leaves, relative to the matrix, of a vector that lies in the space: no direction."""
    return 10 * eps * p**0.5


def check_coefficients(
    h: Float[Tensor, "k j"], expected: Float[Tensor, "k j"], scale: Float[Tensor, " k"], eps: float
) -> None:
    """q_i^T A q_j must equal q_j^T A q_i, which an earlier step found: far beyond rounding A is not symmetric."""
    gap = (h[:, :-1] - expected[:, :-1]).abs().amax(1) if h.shape[1] > 1 else torch.zeros_like(scale)
    if (gap > eps**0.25 * scale).any():
        raise ValueError(
            f"op is not symmetric: products along two orthonormal vectors differ by {float(gap.max()):.3g}, "
            f"on a matrix of norm {float(scale.max()):.3g} or more"
        )


def fresh_direction(Q: Float[Tensor, "j p"], generator: Generator | None) -> Float[Tensor, " p"]:
    """A random unit vector orthogonal to the rows of Q; zero where they span the whole space."""
    if len(Q) >= Q.shape[1]:
        return Q.new_zeros(Q.shape[1])
    w = torch.randn(1, Q.shape[1], dtype=Q.dtype, device=Q.device, generator=generator)
    w, _ = orthogonalise(w, Q[None])
    return w[0] / w.norm()
