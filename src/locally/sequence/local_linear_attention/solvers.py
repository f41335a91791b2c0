"""A_i x_i = b_i for all rows of a strip: conjugate gradients without the matrices, or Cholesky factors of them."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locally.sequence.local_linear_attention.strips import FEW_ROWS, Strip, rowdot

# Key dimensions up to which A_i is formed. A block of queries needs d + 1 operations a pair for it, T iterations of CG
# need 4 T; one query reads the keys once for it, and 2 T times for CG, which matters more.
DENSE_UP_TO = 32
DENSE_UP_TO_ALONE = 128


@dataclass(frozen=True)
class Options:
    """How to solve, and how to differentiate. `tol` bounds the residual's norm relative to the right-hand side's."""

    solver: str = "auto"
    preconditioner: str | None = None
    tol: float = 1e-6
    max_iter: int = 32
    block_size: int | None = None
    ridge_grad: str = "exact"
    half: bool = False  # the caller's tensors are in half precision: TF32 products lose nothing

    def dense(self, rows: int, d: int) -> bool:
        limit = DENSE_UP_TO if rows > FEW_ROWS else DENSE_UP_TO_ALONE
        return self.solver == "cholesky" or (self.solver == "auto" and d <= limit)


@dataclass
class Report:
    """How the solves went: iterations of each strip, rows that did not converge, largest relative residual."""

    iterations: list[int] = field(default_factory=list)
    unconverged: int = 0
    residual: float = 0.0


def solve(strip: Strip, b: Float[Tensor, "h R d"], options: Options, report: Report) -> Float[Tensor, "h R d"]:
    """x_i = A_i^-1 b_i. A factorisation that breaks down in this precision hands its rows to conjugate gradients."""
    if not options.dense(b.shape[1], b.shape[2]):
        return conjugate_gradients(strip, b, options, report)
    x, sound = cholesky(strip, b)
    if bool(sound.all()):
        report.iterations.append(0)
        return x
    rescued = conjugate_gradients(strip, torch.where(sound.unsqueeze(-1), 0.0, b), options, report)
    return torch.where(sound.unsqueeze(-1), x, rescued)


def cholesky(strip: Strip, b: Float[Tensor, "h R d"]) -> tuple[Float[Tensor, "h R d"], Bool[Tensor, "h R"]]:
    """Solutions, and whether each row's matrix was positive definite in this precision."""
    factors, info = torch.linalg.cholesky_ex(strip.matrices())
    sound = info == 0
    return torch.cholesky_solve(b.unsqueeze(-1), factors).squeeze(-1), sound


def conjugate_gradients(
    strip: Strip, b: Float[Tensor, "h R d"], options: Options, report: Report
) -> Float[Tensor, "h R d"]:
    """All rows side by side; a row that has converged stands still, and the strip is done when all do."""
    inverse = 1 / strip.diagonal() if options.preconditioner == "jacobi" else None
    x = torch.zeros_like(b)
    r = b.clone()
    preconditioned = r if inverse is None else inverse * r
    p = preconditioned.clone()
    g = rowdot(r, preconditioned)
    target = options.tol**2 * g
    active = g > 0
    steps = 0
    while steps < options.max_iter and bool(active.any()):
        y = strip.apply(p)
        curvature = rowdot(p, y)
        alpha = torch.where(active & (curvature > 0), g / curvature, 0.0).unsqueeze(-1)
        x.addcmul_(alpha, p)
        r.addcmul_(alpha, y, value=-1)
        preconditioned = r if inverse is None else inverse * r
        previous, g = g, rowdot(r, preconditioned)
        active = active & (g > target) & g.isfinite() & (curvature > 0)
        beta = torch.where(active, g / previous, 0.0).unsqueeze(-1)
        p = torch.addcmul(preconditioned, beta, p)
        steps += 1
    report.iterations.append(steps)
    report.unconverged += int((~(g <= target)).sum())
    return x


def largest_residual(strip: Strip, x: Float[Tensor, "h R d"], b: Float[Tensor, "h R d"]) -> float:
    """Of ||A_i x_i - b_i|| / ||b_i|| over the rows of a strip."""
    norm = b.norm(dim=-1)
    gap = (strip.apply(x) - b).norm(dim=-1)
    return float(torch.where(norm > 0, gap / norm, 0.0).max()) if norm.numel() else 0.0
