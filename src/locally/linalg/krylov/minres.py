"""MINRES for batches of symmetric, possibly indefinite or singular systems.

Source: Paige and Saunders, SIAM J. Numer. Anal. 12 (1975), 617-629; the shortest least-squares solution of a singular
system as in Liu, Milzarek and Roosta (arXiv 2309.17096).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from locally.linalg.krylov import kernels
from locally.linalg.krylov.cg import rows_dot
from locally.linalg.krylov.method import KrylovMethod, Recurrence
from locally.linalg.krylov.operators import Operator, Shifted


@dataclass(frozen=True, kw_only=True)
class MINRES(KrylovMethod):
    """Minimum residuals: x_k minimises ||b - (A - shift I) x|| over x_0 + span{r_0, A r_0, ..., A^(k-1) r_0}.

    Without a preconditioner the residual norm never grows; with one, M, it is ||M^(1/2) r|| that is minimised. One
    product with A and one with M a step plus one at the end; ten vectors of memory a system.

    A singular A with b in its range gives the solution nearest to x0. With b outside the range the status is
    INCONSISTENT, and x is the least-squares solution nearest to x0: the pseudo-inverse solution for x0 = 0 (norms of x
    and r are those of M^-1 and M where there is a preconditioner). To find out takes more steps than to converge, since
    ||A r|| must fall to rounding. Where A is not symmetric the recurrence breaks down, and the true residual says so.

    Args:
        shift: solve with A - shift I.
        rtol, atol, max_steps, probe_symmetry: as in `CG`.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> A = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> MINRES().solve(A, torch.tensor([1.0, 2.0])).x
    tensor([2., 1.])
    >>> found = MINRES().solve(torch.diag(torch.tensor([1.0, 0.0])), torch.tensor([3.0, 4.0]))
    >>> found.x, str(found.status)
    (tensor([3., 0.]), 'breakdown: A is singular and b is not in its range')
    """

    shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.shift, bool) or not isinstance(self.shift, int | float) or not math.isfinite(self.shift):
            raise ValueError(f"shift must be a finite number, got {self.shift!r}")

    def _operator(self, A: Operator) -> Operator:
        return Shifted(A, self.shift) if self.shift else A

    def _recurrence(
        self, A: Operator, M: Operator | None, r: Tensor, targets: Tensor, codes: Tensor, patience: Tensor
    ) -> Recurrence:
        return MinimumResiduals(A, M, r, targets, codes, patience)

    def _inconsistent(self, step: Tensor, r: Tensor, M: Operator | None) -> Tensor:
        # r lies in the null space of A, and is the only part of it that the Krylov space holds
        z = r if M is None else M @ r
        return step - (rows_dot(r, step) / rows_dot(r, z))[:, None] * z


class MinimumResiduals(Recurrence):
    """Lanczos vectors, a QR factorisation of the tridiagonal matrix by rotations, and the update of x.

    u are the Lanczos vectors in the space of residuals and v = M u, orthonormal in <u, v>. A system with `patience`
    is on trial: it was stopped for a residual that looks like a null vector of A, and has that many steps from there to
    halve it, which bad conditioning alone allows.
    """

    def __init__(self, A: Operator, M: Operator | None, r: Tensor, targets: Tensor, codes: Tensor, patience: Tensor):
        super().__init__(A, M, r, targets, codes)
        self.patience = patience
        zero = torch.zeros_like(r)
        z = r if M is None else M @ r
        rz = rows_dot(r, z).to(self.scalar)
        self.fail(~(rz > 0), kernels.BAD_PRECONDITIONER)
        self.fail(~rz.isfinite(), kernels.NOT_FINITE)
        size = rz.sqrt()
        per_row = size.to(r.dtype)[:, None]
        self.u, self.u_old = r / per_row, zero.clone()
        self.v = self.u if M is None else z / per_row
        self.q = zero.clone()
        self.z = self.q if M is None else zero.clone()
        self.w, self.w_old = zero.clone(), zero.clone()
        self.alpha, self.beta, self.anorm = (torch.zeros_like(rz) for _ in range(3))
        # cs, sn, dbar, epsln, phibar of Paige and Saunders
        self.rotation = torch.zeros(len(r), 5, dtype=self.scalar, device=r.device)
        self.rotation[:, 0], self.rotation[:, 4] = -1, size
        # where ||A r|| / ||r|| was smallest, and phibar there
        self.best_y, self.best = zero.clone(), torch.full_like(self.rotation[:, :2], torch.inf)
        self.eps = torch.finfo(r.dtype).eps
        self.bind()

    def step(self) -> int | None:
        self.A.product(self.v, self.q)
        if self.compiled:
            kernels.lanczos_step(*self.lanczos_arrays)
        else:
            self.lanczos_step()
        if self.M is not None:
            self.M.product(self.q, self.z)
        if self.compiled:
            return kernels.minres_advance(*self.advance_arrays, self.eps, self.M is None)
        self.advance()
        return None

    def lanczos_step(self) -> None:
        """q = A v - beta u_old - alpha u."""
        self.q.addcmul_(self.beta[:, None], self.u_old, value=-1)
        self.alpha = rows_dot(self.v, self.q)
        self.q.addcmul_(self.alpha[:, None], self.u, value=-1)

    def advance(self) -> None:
        """Rotate, x += phi w, and move on to the next Lanczos vectors."""
        q, z = self.q, self.q if self.M is None else self.z
        qz = rows_dot(q, z)
        self.fail(~(qz + self.alpha).isfinite(), kernels.NOT_FINITE)
        self.fail((qz < 0) | ((qz == 0) & (q != 0).any(1)), kernels.BAD_PRECONDITIONER)
        beta = qz.sqrt()
        cs, sn, dbar, epsln, phibar = self.rotation.unbind(1)
        anorm = torch.maximum(self.anorm, (self.alpha.square() + self.beta.square() + qz).sqrt())
        delta, gbar = cs * dbar + sn * self.alpha, sn * dbar - cs * self.alpha
        dbar = -cs * beta
        self.watch(torch.hypot(gbar, dbar), phibar, anorm)
        running = self.codes == kernels.RUNNING
        rows = running[:, None]

        gamma = torch.where(running, torch.hypot(gbar, beta), 1.0)
        oldeps, epsln = epsln, sn * beta
        cs, sn = gbar / gamma, beta / gamma
        phi, phibar = cs * phibar, sn * phibar
        self.rotation = torch.where(rows, torch.stack([cs, sn, dbar, epsln, phibar], 1), self.rotation)
        w = (self.v - oldeps[:, None] * self.w_old - delta[:, None] * self.w) / gamma[:, None]
        self.w, self.w_old = torch.where(rows, w, self.w), torch.where(rows, self.w, self.w_old)
        self.y.addcmul_(torch.where(running, phi, 0.0)[:, None], self.w)

        ended = beta <= self.eps * anorm
        inverse = torch.where(ended, 0.0, 1 / beta)[:, None]
        self.u, self.u_old = torch.where(rows, q * inverse, self.u), torch.where(rows, self.u, self.u_old)
        if self.M is None:
            self.v, norms = self.u, phibar.abs()
        else:
            self.v = torch.where(rows, z * inverse, self.v)
            r = sn.square()[:, None] * self.r - (cs * phibar)[:, None] * self.u
            self.r = torch.where(rows, r, self.r)
            norms = torch.linalg.vector_norm(self.r, dim=1)
        self.norms = torch.where(running, norms, self.norms)
        self.anorm, self.beta = torch.where(running, anorm, self.anorm), torch.where(running, beta, self.beta)
        self.iterations += running
        self.fail(self.norms <= self.targets, kernels.CONVERGED)
        self.fail(ended | (self.patience > 0) & (self.iterations >= self.patience), kernels.INCONSISTENT)

    def watch(self, gradient: Tensor, phibar: Tensor, anorm: Tensor) -> None:
        """Stop where x is about to get worse: the residual is all but a null vector, gradient = ||A r|| / ||r||.

        In exact arithmetic the gradient vanishes when a least-squares solution is reached. Rounding halts it on the
        way, near half the digits, and from there on errors pile up in x while the residual stays.
        """
        hasty = (self.codes == kernels.RUNNING) & (self.patience == 0)
        smallest, at = self.best.unbind(1)
        better = hasty & (gradient < torch.minimum(smallest, self.eps**0.25 * anorm))
        worse = hasty & ~better & (gradient > 100 * smallest) & (phibar.abs() > 0.99 * at.abs())
        self.y = torch.where(worse[:, None], self.best_y, self.y)
        self.best_y = torch.where(better[:, None], self.y, self.best_y)
        self.best = torch.where(better[:, None], torch.stack([gradient, phibar], 1), self.best)
        floor = torch.where(hasty, self.eps**0.5, self.eps**0.75) * anorm
        self.fail(worse | (gradient <= floor), kernels.INCONSISTENT)

    def bind(self) -> None:
        if self.M is None:
            self.v, self.z = self.u, self.q
        if not self.compiled:
            return
        array = self.arrays()
        lanczos = ("codes", "q", "v", "u", "u_old", "alpha", "beta")
        vectors = ("q", "z", "v", "u", "u_old", "w", "w_old", "y", "r", "best_y")
        scalars = ("rotation", "alpha", "beta", "norms", "targets", "anorm", "best", "patience")
        self.lanczos_arrays = [array[name] for name in lanczos]
        self.advance_arrays = [array[name] for name in ("codes", "iterations", *vectors, *scalars)]
