"""The deep conjugate direction method: search directions from any map of the residual, made A-orthogonal.

For whoever solves A x = b with symmetric positive definite A and has something better than the residual to search
along, such as a trained network; whatever the directions, each step shrinks the A-norm of the error, and the answer is
checked against the true residual. Source: arXiv 2205.10763, Algorithm 1.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_between, check_count, check_finite, check_nonnegative, check_square
from locally.linalg.krylov import MINRES, Operator
from locally.linalg.krylov import Status as KrylovStatus
from locally.linalg.krylov.method import check_vectors, probe
from locally.linalg.krylov.operators import as_operator

Direction = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor], object]

PROGRESS = 0.99  # a residual norm below this times the least so far is progress


class Status(StrEnum):
    """How the solve of one system ended; set by the solver, read from `Solution.statuses`."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit"
    STAGNATED = "stagnated: the directions no longer reduce the residual"
    INDEFINITE = "breakdown: A is not positive definite"
    NOT_SYMMETRIC = "breakdown: A is not symmetric"
    INCONSISTENT = "breakdown: A is singular and b is not in its range"
    NOT_FINITE = "breakdown: A returned NaN or infinity"


@dataclass(frozen=True, eq=False)
class Solution:
    """Answers of a batch of systems with one matrix, and how each was reached.

    Attributes:
        x: the last iterates, in the shape of b: the best in A-norm, unless the solve broke down. No gradient.
        statuses: one per system, in the order of the flattened batch.
        iterations: steps taken.
        fallbacks: steps along the residual because the direction was not finite or had no curvature.
        residual_norms: ||b - A x||_2, computed from x.
        history: ||b - A x_k||_2 for k = 0, 1, ..., NaN after a system's last step.
    """

    x: Float[Tensor, "..."]
    statuses: tuple[Status, ...]
    iterations: Int[Tensor, "*batch"]
    fallbacks: Int[Tensor, "*batch"]
    residual_norms: Float[Tensor, "*batch"]
    history: Float[Tensor, "*batch steps"]

    @property
    def status(self) -> Status:
        """CONVERGED if every system is, else the status of the first that is not."""
        return next((s for s in self.statuses if s is not Status.CONVERGED), Status.CONVERGED)

    @property
    def converged(self) -> bool:
        """Whether every system has the status CONVERGED."""
        return self.status is Status.CONVERGED


@dataclass(frozen=True, kw_only=True)
class ConjugateDirection:
    """Solve A x = b along directions f(r / ||r||), A-orthogonalised against the last few.

    The step along p minimises the A-norm of the error, so the error never grows, while the residual norm may. It is
    flexible conjugate gradients truncated to `window` (Notay, 2000) with a nonlinear f: f = identity gives conjugate
    gradients, f = M^-1 preconditioned ones, f = c A^-1 the answer in one step. Nothing promises convergence for an
    arbitrary f: a solve that gets nowhere says so. An iteration costs one f, two products with A, 2 `window` vectors.

    Singular positive semidefinite A: with b in the range, x is a solution; with b outside it there is none, and the
    status is INCONSISTENT. Given the `null_space`, directions stay orthogonal to it and x - x0 with them: for x0 = 0
    x is the shortest solution, or the shortest least-squares solution, to the tolerance, where INCONSISTENT. Without,
    inconsistency is found out only where the solve fails, by at most ten MINRES steps for each step made, which also
    give the least-squares solution.

    Args:
        direction: maps unit residuals (batch, n) to directions (batch, n), row by row, of any scale; may be nonlinear.
            A zero direction, or one with NaN, is replaced by the residual and counted.
        window: how many of the last directions a new one is made A-orthogonal to; 2 in the paper, 0 for none, None
            for all (memory grows with the iterations).
        rtol, atol: stop when ||b - A x|| <= max(rtol ||b||, atol). Non-negative, rtol at most 1, not both zero.
        max_iter: at least 1.
        patience: iterations without a new least residual (by 1 %) before the solve counts as stagnated.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> A = torch.diag(torch.arange(1.0, 6.0, dtype=torch.float64))
    >>> found = ConjugateDirection(direction=lambda r: r / A.diagonal()).solve(A, torch.ones(5, dtype=torch.float64))
    >>> found.iterations.item(), str(found.status)
    (1, 'converged')
    >>> torch.allclose(found.x * A.diagonal(), torch.ones(5, dtype=torch.float64))
    True
    """

    direction: Direction
    window: int | None = 2
    rtol: float = 1e-4
    atol: float = 0.0
    max_iter: int = 200
    patience: int = 50

    def __post_init__(self) -> None:
        if not callable(self.direction):
            raise TypeError(f"direction must be callable, got {type(self.direction).__name__}")
        if self.window is not None:
            check_count("window", self.window, at_least=0)
        check_between("rtol", self.rtol, 0.0, 1.0)
        check_nonnegative("atol", self.atol)
        if self.rtol == self.atol == 0:
            raise ValueError("rtol and atol must not both be zero: rounding would never let a solve end")
        check_count("max_iter", self.max_iter)
        check_count("patience", self.patience)

    @torch.no_grad()
    def solve(
        self,
        A: Any,
        b: Float[Tensor, "*batch n"],
        x0: Float[Tensor, "*batch n"] | None = None,
        *,
        null_space: Float[Tensor, "k n"] | None = None,
        callback: Callback | None = None,
    ) -> Solution:
        """Solve A x = b for every row of b.

        Args:
            A: one symmetric positive (semi)definite matrix for all rows: a tensor (n, n), dense or sparse, a SciPy
                sparse matrix, a `locally.linalg.krylov.Operator`, or a callable that maps (batch, n) to (batch, n)
                row by row.
            b: float32 or float64; all vectors of the iteration have its dtype, whatever f computes in.
            x0: where to start; zero by default.
            null_space: orthonormal rows that span the null space of A, where it is known.
            callback: sees every step, `callback(step, residual_norms)`, the norms one per system.

        Raises:
            ValueError, TypeError: an argument is not as above, or a direction has the wrong shape.
        """
        check_vectors(b, x0)
        operator = matrix_operator(A, b)
        Z = check_null_space(null_space, operator, b)
        n = b.shape[-1]
        start = None if x0 is None else x0.reshape(-1, n)
        run = _Run(self, operator, b.reshape(-1, n), start, Z)
        while run.members.numel() and run.step < self.max_iter:
            run.advance()
            if callback is not None:
                callback(run.step, run.norms.reshape(b.shape[:-1]).clone())
        run.conclude()
        shape = b.shape[:-1]
        return Solution(
            x=run.x.reshape(b.shape),
            statuses=tuple(run.statuses),
            iterations=run.iterations.reshape(shape),
            fallbacks=run.fallbacks.reshape(shape),
            residual_norms=run.norms.reshape(shape),
            history=torch.stack(run.history, dim=1).reshape(*shape, -1),
        )


@dataclass(frozen=True, eq=False)
class _Step:
    """A direction p, A p and p'Ap of every running system, and where A is flat along p."""

    p: Tensor
    Ap: Tensor
    curvature: Tensor
    flat: Tensor

    def rows(self, index: Tensor) -> "_Step":
        return _Step(self.p[index], self.Ap[index], self.curvature[index], self.flat[index])

    def replaced(self, rows: Tensor, other: "_Step") -> "_Step":
        """The other's rows where `rows` is true."""
        p, Ap = (torch.where(rows[:, None], new, old) for new, old in ((other.p, self.p), (other.Ap, self.Ap)))
        curvature = torch.where(rows, other.curvature, self.curvature)
        return _Step(p, Ap, curvature, torch.where(rows, other.flat, self.flat))


class _Run:
    """One call: `members` are the systems that still run, and r and the stored steps have a row for each of them."""

    def __init__(self, method: ConjugateDirection, A: Operator, b: Tensor, x0: Tensor | None, Z: Tensor | None):
        self.method, self.A, self.b, self.Z = method, A, b, Z
        self.eps = torch.finfo(b.dtype).eps
        b_norms = norms(b)
        self.x = torch.zeros_like(b) if x0 is None else x0.clone()
        self.x[b_norms == 0] = 0  # no residual is small beside nothing; the solution is known
        self.start = self.x.clone()

        tolerance = (method.rtol * b_norms).clamp(min=method.atol)
        # what b has outside the range of A stays in every residual; the rest of the tolerance is for the rest
        outside = torch.zeros_like(b_norms) if Z is None else norms(b @ Z.mT)
        self.hopeless = outside > tolerance
        within = (tolerance.square() - outside.square()).clamp(min=0).sqrt()
        self.targets = torch.where(self.hopeless, tolerance, within)

        self.step = 0
        self.stored: deque[_Step] = deque(maxlen=method.window)
        self.statuses = [Status.ITERATION_LIMIT] * len(b)  # until something else comes up
        self.iterations = torch.zeros_like(b_norms, dtype=torch.int64)
        self.fallbacks = torch.zeros_like(self.iterations)
        self.least = torch.full_like(b_norms, math.inf)  # residual norm so far, and the step that reached it
        self.least_at = torch.zeros_like(self.iterations)
        self.members = torch.arange(len(b), device=b.device)
        residual = b - A @ self.x
        self.norms = norms(residual)
        self.history = [self.norms.clone()]
        self.r = self.project(residual)

        seen = probe(A, b[:1])  # two products, little beside one call of a network
        self.scale = seen.norm  # of A: no curvature is relative to it
        everyone = torch.ones_like(self.hopeless)
        finite = everyone & seen.norm.isfinite()
        self.end({Status.NOT_FINITE: ~finite, Status.NOT_SYMMETRIC: everyone & ~seen.symmetric})
        self.judge()

    def advance(self) -> None:
        """One iteration of Algorithm 1 for the systems that run."""
        m, unit = self.members, self.r / norms(self.r)[:, None]
        q = self.method.direction(unit)
        if not isinstance(q, Tensor) or (q.shape, q.dtype, q.device) != (unit.shape, unit.dtype, unit.device):
            expected = f"a {unit.dtype} tensor of shape {tuple(unit.shape)} on {unit.device}"
            got = f"{q.dtype}, {tuple(q.shape)} on {q.device}" if isinstance(q, Tensor) else type(q).__name__
            raise ValueError(f"direction must return {expected}, got {got}")
        useless = ~q.isfinite().all(1)
        step = self.conjugate(torch.where(useless[:, None], unit, q))
        retry = step.flat & ~useless
        if retry.any():
            step = step.replaced(retry, self.conjugate(unit))
            useless |= retry
        self.step += 1
        self.fallbacks[m] += useless

        finite = step.curvature.isfinite()
        go = finite & ~step.flat & (step.curvature > 0)
        alpha = torch.where(go, (step.p * self.r).sum(1) / torch.where(go, step.curvature, 1.0), 0.0)
        self.x[m] += torch.where(go[:, None], alpha[:, None] * step.p, 0.0)
        self.iterations[m] += go
        self.stored.append(step)

        # along the residual a semidefinite A is flat only where it maps it to zero, which no b in its range meets
        null = norms(step.Ap) <= math.sqrt(self.eps) * self.scale * norms(step.p)
        reason = {
            Status.NOT_FINITE: ~finite,
            Status.INCONSISTENT: finite & step.flat & null,
            Status.INDEFINITE: finite & ~go & ~(step.flat & null),
        }
        residual = self.b[m] - self.A @ self.x[m]
        self.norms[m] = norms(residual)
        self.history.append(torch.full_like(self.norms, math.nan).index_copy(0, m, self.norms[m]))
        self.r = self.project(residual)
        self.end(reason)
        self.judge()

    def conjugate(self, q: Tensor) -> _Step:
        """q less its parts along the stored directions in the inner product of A."""
        q = self.project(q)
        q = q / norms(q).clamp(min=torch.finfo(q.dtype).tiny)[:, None]
        # classical Gram-Schmidt; against many directions once is not enough
        for _ in range(1 if self.method.window is not None and self.method.window <= 5 else 2):
            parts = [((q * old.Ap).sum(1) / old.curvature, old.p) for old in self.stored]
            for coefficient, p in parts:
                q = q - coefficient[:, None] * p
        q = self.project(q)
        Aq = self.A @ q
        curvature, size = (q * Aq).sum(1), norms(q)
        nothing_new = size <= 64 * self.eps  # of a vector of norm 1: it was inside the span of the stored ones
        flat = nothing_new | (curvature.abs() <= 64 * self.eps * self.scale * size.square())
        return _Step(q, Aq, curvature, flat)

    def project(self, v: Tensor) -> Tensor:
        return v if self.Z is None else v - (v @ self.Z.mT) @ self.Z

    def judge(self) -> None:
        """End the systems whose residual is small enough or has long been no smaller."""
        m, inside = self.members, norms(self.r)
        less = inside < PROGRESS * self.least[m]
        self.least[m] = torch.where(less, inside, self.least[m])
        self.least_at[m] = torch.where(less, self.step, self.least_at[m])
        done = inside <= self.targets[m]
        self.end(
            {
                Status.INCONSISTENT: done & self.hopeless[m],
                Status.CONVERGED: done & ~self.hopeless[m],
                Status.STAGNATED: ~done & (self.step - self.least_at[m] >= self.method.patience),
            }
        )

    def end(self, reasons: dict[Status, Tensor]) -> None:
        """Give the marked members their status, the first that applies, and go on without them."""
        ended = torch.zeros_like(self.members, dtype=torch.bool)
        for status, rows in reasons.items():
            for system in self.members[rows & ~ended].tolist():
                self.statuses[system] = status
            ended |= rows
        if ended.any():
            keep = torch.nonzero(~ended)[:, 0]
            self.members, self.r = self.members[keep], self.r[keep]
            self.stored = deque((step.rows(keep) for step in self.stored), maxlen=self.method.window)

    def conclude(self) -> None:
        """Tell systems without a solution from those that the directions failed, where the null space is unknown."""
        unsettled = (Status.STAGNATED, Status.ITERATION_LIMIT, Status.INDEFINITE)
        for system, status in enumerate(self.statuses):
            if status not in unsettled:
                continue
            if self.hopeless[system]:
                self.statuses[system] = Status.INCONSISTENT
            elif self.Z is None and (self.step >= self.method.patience or status is Status.INDEFINITE):
                self.seek_least_squares(system)

    def seek_least_squares(self, system: int) -> None:
        """Start again with MINRES, and keep its answer if that is where the residual cannot be made small."""
        start, row = self.start[system : system + 1], slice(system, system + 1)
        r = self.b[row] - self.A @ start
        # below half the digits rounding looks like inconsistency
        rtol = min(max(float(self.targets[system] / norms(r)), math.sqrt(self.eps)), 1.0)
        trial = MINRES(rtol=rtol, atol=torch.finfo(r.dtype).tiny, max_steps=10 * self.step).solve(self.A, r)
        if trial.status is KrylovStatus.INCONSISTENT:
            self.statuses[system] = Status.INCONSISTENT
            self.x[row] = start + trial.x
            self.norms[row] = trial.residual_norms


def norms(v: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
    return torch.linalg.vector_norm(v, dim=1)


def matrix_operator(A: Any, b: Float[Tensor, "*batch n"]) -> Operator:
    """A as an operator on rows like those of b."""
    if sp.issparse(A):
        check_square("A", A)
        csr = sp.csr_array(A)
        limits, columns, values = (torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data))
        A = torch.sparse_csr_tensor(
            limits, columns, values, csr.shape, dtype=b.dtype, device=b.device, check_invariants=False
        )
    elif isinstance(A, Tensor) and A.ndim != 2:
        raise ValueError(f"A must be one matrix (n, n) for all right-hand sides, got shape {tuple(A.shape)}")
    return as_operator("A", A, b)


def check_null_space(Z: Tensor | None, A: Operator, b: Tensor) -> Tensor | None:
    """Z as rows in the dtype of b: orthonormal, and mapped to zero by A."""
    if Z is None or not len(Z):
        return None
    check_finite("null_space", Z)
    if Z.ndim != 2 or Z.shape[1] != b.shape[-1] or Z.dtype != b.dtype or Z.device != b.device:
        raise ValueError(
            f"null_space must be {b.dtype} rows of {b.shape[-1]} entries on {b.device}, got {tuple(Z.shape)} {Z.dtype}"
        )
    slack = math.sqrt(torch.finfo(Z.dtype).eps)
    if (Z @ Z.mT - torch.eye(len(Z), dtype=Z.dtype, device=Z.device)).abs().max() > slack:
        raise ValueError("null_space must have orthonormal rows")
    if (norms(A @ Z) > slack * probe(A, b.reshape(-1, b.shape[-1])[:1]).norm).any():
        raise ValueError("null_space must hold null vectors of A, but A maps a row of it away from zero")
    return Z
