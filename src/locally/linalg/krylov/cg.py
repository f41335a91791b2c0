"""Conjugate gradients for batches of symmetric positive definite systems.

Source: Hestenes and Stiefel, J. Res. Nat. Bur. Standards 49 (1952), 409-436, preconditioned as in Saad, Iterative
Methods for Sparse Linear Systems (2003), Algorithm 9.1.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from locally.linalg.krylov import kernels
from locally.linalg.krylov.method import AIM, COMPILED_DEVICES, MOST, KrylovMethod, Recurrence
from locally.linalg.krylov.operators import Dense, Operator, Sparse
from locally.linalg.krylov.solution import Solution


@dataclass(frozen=True, kw_only=True)
class CG(KrylovMethod):
    """Conjugate gradients: x_k minimises the A-norm of the error over x_0 + span{M r_0, M A M r_0, ...}.

    The error falls at least like 2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k, c the condition number of M A. One product with A
    and one with the preconditioner M a step, plus one product at the end, which checks the residual; five vectors of
    memory a system. Systems that have converged stop, and leave the batch where the operator can do without them.

    A singular positive semidefinite A with b in its range gives the solution nearest to x0 (in the M^-1 norm). With b
    outside the range there is nothing for CG to converge to and it reports INCONSISTENT: use `MINRES`. An indefinite A
    shows as INDEFINITE once a direction of non-positive curvature p'Ap comes up; where none does, the answer is right
    all the same. A that is not symmetric is reported as such where the solve fails, or at once with `probe_symmetry`.

    Args:
        rtol, atol: stop when ||b - A x|| <= max(rtol ||b||, atol). Both non-negative, rtol at most 1, not both zero.
        max_steps: at least 1; default 10 n.
        probe_symmetry: spend two products on <A u, A u> = <u, A A u> for a random u before the first step.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> found = CG(rtol=1e-6).solve(A, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    >>> found.x
    tensor([[0.0909, 0.6364],
            [0.0000, 0.0000]])
    >>> str(found.status), found.iterations.tolist()
    ('converged', [2, 0])
    """

    def _recurrence(
        self, A: Operator, M: Operator | None, r: Tensor, targets: Tensor, codes: Tensor, patience: Tensor
    ) -> Recurrence:
        return ConjugateGradients(A, M, r, targets, codes)

    def _at_once(self, A: Operator, b: Tensor) -> Solution | None:
        if not isinstance(A, Dense) or len(b) != 1 or b.device.type not in COMPILED_DEVICES:
            return None
        n = b.shape[1]
        matrix = A.matrix.detach().reshape(n, n).contiguous().numpy()
        x, history = np.empty(n, matrix.dtype), np.empty(min(MOST, self.max_steps or 10 * n) + 1)
        tiny = 4 * torch.finfo(b.dtype).eps
        steps, norm = kernels.cg_at_once(matrix, b[0].numpy(), self.rtol, self.atol, AIM, tiny, x, history)
        if steps < 0:
            return None
        return Solution(
            torch.from_numpy(x)[None],
            torch.tensor([kernels.CONVERGED], dtype=torch.int8),
            torch.tensor([steps]),
            b.new_tensor([norm]),
            torch.from_numpy(history[: steps + 1]).to(b.dtype)[None],
        )


class ConjugateGradients(Recurrence):
    """The recurrences of Hestenes and Stiefel, with what it takes to notice that A is not positive definite."""

    def __init__(self, A: Operator, M: Operator | None, r: Tensor, targets: Tensor, codes: Tensor):
        super().__init__(A, M, r, targets, codes)
        self.z = r if M is None else M @ r
        self.p = self.z.clone()
        self.q = torch.empty_like(r)  # A p
        self.rz = rows_dot(r, self.z).to(self.scalar)
        self.pp = self.rz.clone()  # ||p||^2 in the M^-1 norm, from the orthogonality of z and the old p
        self.top = torch.zeros_like(self.rz)  # largest Rayleigh quotient so far: a lower bound of ||M A||
        self.tiny = 4 * torch.finfo(r.dtype).eps
        self.fail(~(self.rz > 0), kernels.BAD_PRECONDITIONER)
        self.fail(~self.rz.isfinite(), kernels.NOT_FINITE)
        self.bind()

    def step(self) -> int | None:
        self.A.product(self.p, self.q)
        running = None
        if self.compiled:
            running = kernels.cg_advance(*self.advance_arrays, self.tiny)
        else:
            self.advance()
        if self.M is not None:
            self.M.product(self.r, self.z)
        if self.compiled:
            return running and kernels.cg_turn(*self.turn_arrays)
        self.turn()
        return None

    def steps(self, most: int) -> tuple[list[Tensor], int | None]:
        if self.many is None or most == 1:
            return super().steps(most)
        before = self.iterations.clone()
        history = self.norms.new_empty(most, len(self.norms))
        running = self.many(history.numpy(), *self.advance_arrays, self.tiny)
        return list(history[: int((self.iterations - before).max())]), running

    def advance(self) -> None:
        """x += alpha p, r -= alpha A p, unless p'Ap says that A is not positive definite."""
        curvature = rows_dot(self.p, self.q)
        self.top = torch.maximum(self.top, curvature.abs() / self.pp)
        self.fail(~curvature.isfinite(), kernels.NOT_FINITE)
        self.fail(curvature <= self.tiny * self.top * self.pp, kernels.NO_CURVATURE)
        running = self.codes == kernels.RUNNING
        alpha = torch.where(running, self.rz / curvature, 0.0)
        self.y.addcmul_(alpha[:, None], self.p)
        self.r.addcmul_(alpha[:, None], self.q, value=-1)
        self.norms = torch.where(running, torch.linalg.vector_norm(self.r, dim=1), self.norms)
        self.iterations += running
        self.fail(~self.norms.isfinite(), kernels.NOT_FINITE)
        self.fail(self.norms <= self.targets, kernels.CONVERGED)

    def turn(self) -> None:
        """p = z + beta p."""
        z = self.r if self.M is None else self.z
        rz = rows_dot(self.r, z)
        self.fail(~rz.isfinite(), kernels.NOT_FINITE)
        self.fail(~(rz > 0), kernels.BAD_PRECONDITIONER)
        running = self.codes == kernels.RUNNING
        beta = rz / self.rz
        # not a product with zero: p of a system that has met NaN must stay what it was
        self.p = torch.where(running[:, None], torch.addcmul(z, beta[:, None], self.p), self.p)
        self.pp = torch.where(running, rz + beta.square() * self.pp, self.pp)
        self.rz = torch.where(running, rz, self.rz)

    def stretch(self) -> Tensor:
        return torch.linalg.vector_norm(self.q, dim=1) / torch.linalg.vector_norm(self.p, dim=1)

    def bind(self) -> None:
        self.many = None
        if not self.compiled:
            return
        if self.M is None:
            self.z = self.r
            batch, n = self.r.shape
            if isinstance(self.A, Sparse):
                self.many = partial(kernels.cg_sparse, *self.A.arrays)
            elif isinstance(self.A, Dense) and (self.A.matrix.ndim == 3 or batch == 1):
                matrices = self.A.matrix.detach().reshape(batch, n, n).contiguous().numpy()
                self.many = partial(kernels.cg_dense, matrices)
        array = self.arrays()
        advance = ("codes", "iterations", "p", "q", "y", "r", "rz", "pp", "top", "norms", "targets")
        self.advance_arrays = [array[name] for name in advance]
        self.turn_arrays = [array[name] for name in ("codes", "r", "z", "p", "rz", "pp")]


def rows_dot(u: Tensor, v: Tensor) -> Tensor:
    return torch.linalg.vecdot(u, v, dim=1)
