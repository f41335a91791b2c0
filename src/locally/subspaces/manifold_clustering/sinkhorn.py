"""Projection onto doubly stochastic matrices: entropic by Sinkhorn's iteration, and Euclidean.

The entropic projection of S at weight eta is the G >= 0 with unit row and column sums that maximises
<S, G> - eta sum_ij G_ij log G_ij; it is G = Diag(e^u) e^(S / eta) Diag(e^v). Half-steps alternate between making row
sums and column sums one. Source: arXiv 2301.01805, the parameterisation of the membership.

A half-step in the log domain costs n^2 exponentials. Where the spread of S / eta leaves no entry of the kernel to
underflow, the same half-step is a product of the kernel with a vector, and its exact gradient another: `_Scaling`.
The log domain takes over otherwise, so both are safe and agree to rounding.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locally.checks import check_choice, check_count, check_finite, check_nonnegative, check_positive
from locally.linalg.krylov import CG

# scalings of a kernel with entries in [e^-s, 1] stay within e^(2 s): half of what the exponent holds
SPREAD = {torch.float32: 40.0, torch.float64: 300.0}


class Status(StrEnum):
    """Whether row and column sums came within the tolerance of one; read from `Projection.status`."""

    CONVERGED = "converged"
    STEP_LIMIT = "step limit"


@dataclass(frozen=True)
class Projection:
    """A membership and how it was reached.

    Attributes:
        membership: doubly stochastic up to `error`.
        status: whether the sums came within the tolerance of one.
        steps: half-steps of Sinkhorn, or rounds of Dykstra.
        error: largest distance of a row or column sum from one, measured at the end: rounding included.
    """

    membership: Float[Tensor, "n n"]
    status: Status
    steps: int
    error: float


def sinkhorn_projection(
    S: Float[Tensor, "*batch n n"],
    eta: float,
    half_steps: int = 5,
    *,
    detach_v: bool = False,
    spread: float | None = None,
) -> Float[Tensor, "*batch n n"]:
    """The first `half_steps` of Sinkhorn's iteration, rows first, with the exact gradient through all of them.

    An odd number leaves row sums exact, an even one column sums; five leave the others at about 1e-2.

    Args:
        S: affinities, larger for samples that belong together. Half precision is worked on in float32.
        eta: weight of the entropy, positive: small towards a permutation, large towards 1/n everywhere.
        half_steps: at least 1.
        detach_v: let no gradient through the updates of the column potentials, as the successor's code does.
        spread: a bound on max(S) - min(S) where one is known (2 for cosines); spares looking, which on a GPU means
            waiting for it.

    Returns:
        Non-negative, differentiable once; O(n^2) a half-step and one kernel of memory.

    Raises:
        ValueError: S is not square, eta or half_steps is out of range.

    >>> G = sinkhorn_projection(torch.eye(3), eta=0.5, half_steps=20)
    >>> G.sum(0).round(decimals=4), G[0, 0] / G[0, 1]  # e^(1 / eta)
    (tensor([1., 1., 1.]), tensor(7.3891))
    """
    S = _check(S, eta, half_steps)
    if _spread(S, spread) / eta <= SPREAD[S.dtype]:
        return _Scaling.apply(S, eta, half_steps, detach_v)
    return _log_domain(S / eta, half_steps, detach_v)


def sinkhorn_projection_(
    S: Float[Tensor, "*batch n n"],
    eta: float,
    half_steps: int = 5,
    workspace: Float[Tensor, "two *batch n"] | None = None,
) -> Float[Tensor, "*batch n n"]:
    """`sinkhorn_projection` in place, without gradient: S becomes the membership and nothing of its size is allocated.

    Args:
        S: affinities with (max - min) / eta at most 40 in float32, 300 in float64; cosines with eta >= 0.05 always
            fit. Not looked at, so nothing waits for the device.
        eta: positive.
        half_steps: at least 1.
        workspace: two vectors to each matrix; allocated where none is given.

    >>> S = torch.eye(2)
    >>> sinkhorn_projection_(S, eta=1.0) is S
    True
    """
    check_positive("eta", eta)
    check_count("half_steps", half_steps)
    if S.requires_grad:
        raise ValueError("S requires gradients, which the projection in place cannot give: use sinkhorn_projection")
    if workspace is None:
        workspace = S.new_empty(2, *S.shape[:-1])
    if workspace.shape != (2, *S.shape[:-1]):
        raise ValueError(f"workspace must have shape {(2, *S.shape[:-1])}, got {tuple(workspace.shape)}")
    a, b = workspace[0].unsqueeze(-1), workspace[1].unsqueeze(-1)
    torch.amax(S, -1, keepdim=True, out=a)
    S.sub_(a).mul_(1 / eta).exp_()
    b.fill_(1)
    transposed = S.mT
    for step in range(half_steps):
        if step % 2 == 0:
            torch.matmul(S, b, out=a).reciprocal_()
        else:
            torch.matmul(transposed, a, out=b).reciprocal_()
    return S.mul_(a).mul_(b.mT)


def balance(
    S: Float[Tensor, "n n"],
    eta: float,
    *,
    tol: float = 1e-6,
    max_half_steps: int = 10_000,
    symmetric: bool = False,
    gradient: str = "implicit",
) -> Projection:
    """Sinkhorn's iteration until row and column sums are one to `tol`.

    Args:
        S: finite affinities.
        eta: weight of the entropy, positive.
        tol: on the largest distance of a sum from one, non-negative.
        max_half_steps: at least 2.
        symmetric: S is symmetric: one scaling for rows and columns, steps averaged geometrically. The membership is
            symmetric at every step, and where S is positive semidefinite, as cosines are, the error in the end at least
            halves with each step, whatever eta is: steps contract by (1 - l) / 2, l the eigenvalues of G in [0, 1].
        gradient: "implicit" differentiates the fixed point: memory and time do not depend on the number of half-steps.
            "none" detaches.

    Returns:
        A `Projection`; its status says whether `tol` was reached. Without symmetry convergence is linear at the
        squared second singular value of G, so slow for small eta.

    Raises:
        ValueError: S holds NaN or infinity or is not square; a parameter is out of range.

    >>> found = balance(torch.eye(3, dtype=torch.float64), eta=0.5)
    >>> str(found.status), found.error <= 1e-6
    ('converged', True)
    """
    check_nonnegative("tol", tol)
    check_choice("gradient", gradient, ("implicit", "none"))
    S = _check(S, eta, max_half_steps)
    if S.ndim != 2:
        raise ValueError(f"S must be one square matrix, got shape {tuple(S.shape)}")
    if max_half_steps < 2:
        raise ValueError(f"max_half_steps must be at least 2, got {max_half_steps}")
    check_finite("S", S)
    with torch.no_grad():
        converge = _converge_symmetric if symmetric else _converge
        G, steps, status = converge(S.detach(), eta, tol, max_half_steps)
    if gradient == "implicit" and torch.is_grad_enabled() and S.requires_grad:
        G = _FixedPoint.apply(S, G, eta)
    return Projection(G, status, steps, _sum_error(G.detach()))


def euclidean_projection(
    S: Float[Tensor, "n n"], eta: float, *, tol: float = 1e-6, max_rounds: int = 10_000
) -> Projection:
    """The doubly stochastic G nearest to S / eta: maximises <S, G> - eta / 2 |G|_F^2. Most entries come out as zeros.

    Dykstra's alternating projections between unit sums, which has a closed form, and non-negative entries.

    Args:
        S: finite affinities.
        eta: weight of the square, positive.
        tol: on the largest distance of a sum from one.
        max_rounds: at least 1.

    Returns:
        A `Projection` whose entries are non-negative and whose sums are one up to its error. O(n^2) a round.

    Raises:
        ValueError: S holds NaN or infinity or is not square; a parameter is out of range.

    >>> euclidean_projection(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), eta=1.0).membership.round(decimals=4)
    tensor([[1., 0.],
            [0., 1.]])
    """
    check_nonnegative("tol", tol)
    S = _check(S, eta, max_rounds)
    if S.ndim != 2:
        raise ValueError(f"S must be one square matrix, got shape {tuple(S.shape)}")
    check_finite("S", S)
    n = len(S)
    G = S.detach() / eta
    correction = torch.zeros_like(G)  # of the half-space of non-negative entries; the affine one needs none
    error = math.inf
    rounds = 0
    while rounds < max_rounds and error > tol:
        rounds += 1
        rows, columns = 1 - G.sum(1, keepdim=True), 1 - G.sum(0, keepdim=True)
        G = G + (rows + columns) / n - rows.sum() / n**2
        shifted = G + correction
        G = shifted.clamp(min=0)
        correction = shifted - G
        error = _sum_error(G)
    return Projection(G, Status.CONVERGED if error <= tol else Status.STEP_LIMIT, rounds, error)


class _Scaling(torch.autograd.Function):
    """G = Diag(a) A Diag(b) with A = e^(S / eta - row maximum); each half-step is one matrix-vector product.

    Backwards, a row step u = -log(A b) sends the cotangent g of u to -A'(a g) b for v and to -(a g) b' * A for S / eta:
    terms of rank one, gathered into one product.
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, eta: float, half_steps: int, detach_v: bool) -> Tensor:
        A = S - S.amax(-1, keepdim=True)
        A.div_(eta).exp_()
        b = torch.ones_like(A[..., :1])
        a = b
        scalings = [b]  # b_0, a_1, b_1, a_2, ...
        for step in range(half_steps):
            if step % 2 == 0:
                a = (A @ b).reciprocal_()
                scalings.append(a)
            else:
                b = (A.mT @ a).reciprocal_()
                scalings.append(b)
        ctx.save_for_backward(A, *scalings)
        ctx.eta, ctx.detach_v = eta, detach_v
        return (a * A).mul_(b.mT)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, H: Tensor) -> tuple[Tensor, None, None, None]:
        A, *scalings = ctx.saved_tensors
        a, b = (scalings[-1], scalings[-2]) if len(scalings) % 2 == 0 else (scalings[-2], scalings[-1])
        HA = H * A
        grad_u = a * (HA @ b)
        grad_v = b * (HA.mT @ a)
        left, right = [], []
        for step in range(len(scalings) - 1, 0, -1):
            new, old = scalings[step], scalings[step - 1]
            if step % 2 == 1:  # rows: u from v
                x = new * grad_u
                left.append(x)
                right.append(old)
                grad_v = grad_v - old * (A.mT @ x)
                grad_u = torch.zeros_like(grad_u)
            else:
                y = new * (torch.zeros_like(grad_v) if ctx.detach_v else grad_v)
                left.append(old)
                right.append(y)
                grad_u = grad_u - old * (A @ y)
                grad_v = torch.zeros_like(grad_v)
        ranks = torch.cat(left, -1) @ torch.cat(right, -1).mT
        grad = HA.mul_(a).mul_(b.mT).sub_(ranks.mul_(A))
        return grad.div_(ctx.eta), None, None, None


def _log_domain(K: Tensor, half_steps: int, detach_v: bool = False) -> Tensor:
    """The textbook iteration; autograd unrolls it."""
    v = torch.zeros_like(K[..., :1, :])
    u = torch.zeros_like(K[..., :1])
    for step in range(half_steps):
        if step % 2 == 0:
            u = -torch.logsumexp(K + v, -1, keepdim=True)
        else:
            v = -torch.logsumexp(K + u, -2, keepdim=True)
            v = v.detach() if detach_v else v
    return (K + u + v).exp()


def _converge(S: Tensor, eta: float, tol: float, limit: int) -> tuple[Tensor, int, Status]:
    """(membership, half-steps, status); after a row step only column sums can be off."""
    error = math.inf
    steps = 0
    reached = lambda: Status.CONVERGED if error <= tol else Status.STEP_LIMIT
    if _spread(S, None) / eta <= SPREAD[S.dtype]:
        A = (S - S.amax(1, keepdim=True)).div_(eta).exp_()
        a, b = torch.ones_like(S[0]), torch.ones_like(S[0])
        while steps + 2 <= limit and error > tol:
            torch.mv(A, b, out=a).reciprocal_()
            sums = torch.mv(A.T, a)
            error = float((sums * b - 1).abs().max())
            steps += 2
            if error > tol:
                b = sums.reciprocal_()
        if error > tol:
            a = torch.mv(A, b).reciprocal_()
        return A.mul_(a[:, None]).mul_(b), steps, reached()
    K = S / eta
    u, v = torch.zeros_like(K[:, :1]), torch.zeros_like(K[:1])
    while steps + 2 <= limit and error > tol:
        u = -torch.logsumexp(K + v, 1, keepdim=True)
        sums = torch.logsumexp(K + u, 0, keepdim=True)
        error = float((sums + v).expm1().abs().max())
        steps += 2
        if error > tol:
            v = -sums
    if error > tol:
        u = -torch.logsumexp(K + v, 1, keepdim=True)
    return (K + u + v).exp_(), steps, reached()


def _converge_symmetric(S: Tensor, eta: float, tol: float, limit: int) -> tuple[Tensor, int, Status]:
    """(membership, steps, status) with one scaling: w <- (w - log sums) / 2."""
    error = math.inf
    steps = 0
    scaled = _spread(S, None) / eta <= SPREAD[S.dtype]
    K = (S - S.max()).div_(eta)
    A = K.exp_() if scaled else K
    w = torch.zeros_like(S[0])  # scalings themselves, or their logarithms
    w = w.add_(1) if scaled else w
    while True:
        sums = torch.mv(A, w) if scaled else torch.logsumexp(A + w, 1)
        error = float((w * sums - 1).abs().max() if scaled else (w + sums).expm1().abs().max())
        if error <= tol or steps == limit:
            break
        w = (w / sums).sqrt_() if scaled else (w - sums) / 2
        steps += 1
    G = A.mul_(w[:, None]).mul_(w) if scaled else A.add_(w[:, None]).add_(w).exp_()
    return G, steps, Status.CONVERGED if error <= tol else Status.STEP_LIMIT


class _FixedPoint(torch.autograd.Function):
    """Gradient of the converged membership: dG = G * (dS / eta + du 1' + 1 dv') with zero row and column sums.

    Eliminating v, its adjoint asks for (I - G G') p = G W'1 - W 1 with W = G * dL/dG, positive semidefinite and
    consistent, and then q = -(W'1 + G'p).
    """

    @staticmethod
    def forward(ctx: Any, S: Tensor, G: Tensor, eta: float) -> Tensor:
        ctx.save_for_backward(G)
        ctx.eta = eta
        return G.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, H: Tensor) -> tuple[Tensor, None, None]:
        (G,) = ctx.saved_tensors
        W = G * H
        rows, columns = W.sum(1), W.sum(0)
        right = G @ columns - rows
        rtol = 1e-10 if G.dtype == torch.float64 else 1e-5
        solver = CG(rtol=rtol, atol=rtol * float(rows.norm()) + torch.finfo(G.dtype).tiny)
        p = solver.solve(lambda x: x - (x @ G) @ G.T, right - right.mean()).x
        q = -(columns + p @ G)
        return (W + G * (p[:, None] + q)) / ctx.eta, None, None


def _check(S: Tensor, eta: float, steps: int) -> Tensor:
    check_positive("eta", eta)
    check_count("half_steps", steps)
    if S.ndim < 2 or S.shape[-1] != S.shape[-2] or S.shape[-1] == 0:
        raise ValueError(f"S must hold square matrices, got shape {tuple(S.shape)}")
    return S.float() if S.dtype in (torch.float16, torch.bfloat16) else S


def _spread(S: Tensor, known: float | None) -> float:
    return float(S.detach().amax() - S.detach().amin()) if known is None else known


def _sum_error(G: Tensor) -> float:
    return float(torch.maximum((G.sum(0) - 1).abs().max(), (G.sum(1) - 1).abs().max()))
