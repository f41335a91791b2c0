"""Gradients of x = A^-1 b by the implicit function theorem: one more solve, whatever the number of steps was.

With u = A^-T dL/dx the gradients are u for b and -d<u, A x>/dA, x and u held fixed, for whatever A depends on
(Christianson, Optimization Methods and Software 3, 1994). Krylov methods for symmetric A need no transpose.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locally.linalg.krylov.operators import Operator
from locally.linalg.krylov.solution import Solution, Status, flat_norm

Solve = Callable[[Tensor], Solution]

UNSYMMETRIC = "A is not symmetric: the backward solve needs its transpose, so gradients would be wrong"


def attach(found: Solution, b: Float[Tensor, "batch n"], A: Operator, solve: Solve) -> Float[Tensor, "batch n"]:
    """`found.x` as a differentiable function of b and of `A.tensors`; `solve` solves with A for another b."""
    return _ImplicitSolve.apply(found, A, solve, b, *A.tensors)


class _ImplicitSolve(torch.autograd.Function):
    """Keeps x, b and the operator's tensors; `backward`, made of differentiable parts, can be differentiated."""

    @staticmethod
    def forward(ctx: Any, found: Solution, A: Operator, solve: Solve, b: Tensor, *tensors: Tensor) -> Tensor:
        ctx.A, ctx.solve, ctx.residual_norms = A, solve, found.residual_norms
        ctx.save_for_backward(found.x, b, *tensors)
        return found.x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, b, *tensors = ctx.saved_tensors
        found = ctx.solve(gradient)
        _check_adjoint(found, gradient.detach(), x.detach(), b.detach(), ctx.residual_norms)
        u = found.x
        needs_b, *needs_tensors = ctx.needs_input_grad[3:]
        gradients: list[Tensor | None] = [None] * len(tensors)
        wanted = [i for i, needed in enumerate(needs_tensors) if needed]
        if wanted:
            differentiable = torch.is_grad_enabled()
            with torch.enable_grad():
                # through aliases the derivative is taken at fixed x, although x depends on the same tensors
                aliases = [t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in tensors]
                product = ctx.A.apply(x, *aliases)
            parts = torch.autograd.grad(
                product, [aliases[i] for i in wanted], -u, create_graph=differentiable, allow_unused=True
            )
            for i, part in zip(wanted, parts, strict=True):
                gradients[i] = part
        return None, None, None, u if needs_b else None, *gradients


def _check_adjoint(found: Solution, gradient: Tensor, x: Tensor, b: Tensor, residual_norms: Tensor) -> None:
    failed = [status for status in found.statuses if status is not Status.CONVERGED]
    if Status.NOT_SYMMETRIC in failed:
        raise RuntimeError(UNSYMMETRIC)
    if failed:
        warnings.warn(
            f"the backward solve failed for {len(failed)} of {len(found.statuses)} systems ({failed[0]}): "
            "their gradients are inexact",
            RuntimeWarning,
            stacklevel=2,
        )
        return
    # <u, A x> = <A u, x> for all u and x if and only if A is symmetric; both sides are at hand
    u = found.x.detach()
    slack = math.sqrt(torch.finfo(b.dtype).eps)
    gap = ((u * b).sum(1) - (gradient * x).sum(1)).abs()
    bound = flat_norm(u) * (residual_norms + slack * flat_norm(b)) + flat_norm(x) * (
        found.residual_norms + slack * flat_norm(gradient)
    )
    if (gap > bound).any():
        raise RuntimeError(UNSYMMETRIC)
