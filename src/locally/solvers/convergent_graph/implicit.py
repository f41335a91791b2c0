"""Gradients of a fixed point by the implicit function theorem: one more fixed point, whatever the number of sweeps was.

With D = diag(phi'(gamma A x + b)) and a cotangent g the gradients are D u for b and gamma (D u)_i x_j for A_ij, where
u = g + gamma A^T D u. That map contracts in the sum norm as the forward map does in the maximum norm. Memory is that of
the weights and of x. Source: arXiv 2106.01680, section on training by implicit differentiation.
"""

import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locally.solvers.convergent_graph.fixed_points import FixedPoint, FixedPointSolver, Status
from locally.solvers.convergent_graph.maps import Activation, ContractingMaps, affine


class ConvergenceWarning(RuntimeWarning):
    """A fixed point was not reached within the given number of iterations."""


def attach(found: FixedPoint, maps: ContractingMaps, solver: FixedPointSolver) -> Float[Tensor, "nodes heads"]:
    """`found.x` as a differentiable function of `maps.weights` and `maps.bias`, as often as wanted.

    Warns (ConvergenceWarning) in the backward pass where `solver.max_iter` ends it early.
    """
    return _ImplicitFixedPoint.apply(found, maps, solver, maps.weights, maps.bias)


class _ImplicitFixedPoint(torch.autograd.Function):
    """Keeps x, the weights and the bias. `backward` is made of differentiable parts, so it can be differentiated."""

    @staticmethod
    def forward(
        ctx: Any, found: FixedPoint, maps: ContractingMaps, solver: FixedPointSolver, weights: Tensor, bias: Tensor
    ) -> Tensor:
        ctx.solver = solver
        ctx.sparsity, ctx.gamma, ctx.activation, ctx.adjoint = maps.sparsity, maps.gamma, maps.activation, maps.adjoint
        x = found.x.clone()  # the caller keeps `found`, which shall not keep the graph
        # for the identity the slope is 1 and b is not needed
        ctx.save_for_backward(x, weights, *(() if maps.activation is Activation.IDENTITY else (bias,)))
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *bias = ctx.saved_tensors
        s, gamma, slope = ctx.sparsity, ctx.gamma, None
        if bias:
            slope = ctx.activation.slope(affine(s, gamma, weights, bias[0], x))
        scaled = weights if slope is None else weights * slope.index_select(0, s.rows)
        adjoint = ContractingMaps(s.transposed, scaled, g, gamma, adjoint=not ctx.adjoint)
        found = ctx.solver.solve(adjoint)
        warn_unless_reached(found, "backward")
        u = attach(found, adjoint, ctx.solver)
        u = u if slope is None else slope * u
        grad_weights = (
            gamma * u.index_select(0, s.rows) * x.index_select(0, s.columns) if ctx.needs_input_grad[3] else None
        )
        return None, None, None, grad_weights, u if ctx.needs_input_grad[4] else None


def warn_unless_reached(found: FixedPoint, name: str) -> None:
    missed = sum(status is Status.ITERATION_LIMIT for status in found.statuses)
    if missed:
        worst = float(found.error_bounds.max())
        warnings.warn(
            f"the {name} fixed point was not reached for {missed} of {len(found.statuses)} graphs: the error is only"
            f" known to be at most {worst:.3g}; raise max_iter",
            ConvergenceWarning,
            stacklevel=3,
        )
