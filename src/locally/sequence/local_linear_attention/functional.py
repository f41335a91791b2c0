"""`local_linear_attention`: the call that stands where `scaled_dot_product_attention` stood."""

import warnings
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, overload

import torch
from jaxtyping import Bool, Float
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.autograd.function import once_differentiable

from locally.checks import check_choice, check_count, check_positive
from locally.sequence.local_linear_attention import passes
from locally.sequence.local_linear_attention.layout import arrange, pose
from locally.sequence.local_linear_attention.passes import Fit
from locally.sequence.local_linear_attention.solvers import Options, Report


class Status(StrEnum):
    """Whether the solves behind an output met the tolerance; read from `LLAInfo.status`."""

    CONVERGED = "converged"
    ITERATION_LIMIT = "iteration limit: some rows of the solver did not reach the tolerance"


@dataclass(frozen=True)
class LLAInfo:
    """How a call went, and the local fits behind its output; everything detached from the graph."""

    status: Status
    omega: Float[Tensor, "*batch H L"]  # sum of a query's weights, the largest of which is 1
    delta: Float[Tensor, "*batch H L"]  # what is left of omega once the slope is fitted
    rho: Float[Tensor, "*batch H L E"]  # A_i^-1 mu_i
    iterations: tuple[int, ...]  # of each strip of queries; 0 where it was factorised
    residual: float  # largest ||A_i rho_i - mu_i|| / ||mu_i||; nan from the triton kernels

    @property
    def converged(self) -> bool:
        """Whether the status is CONVERGED."""
        return self.status is Status.CONVERGED


@overload
def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def local_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_info: Literal[True], **options: Any
) -> tuple[Tensor, LLAInfo]: ...
def local_linear_attention(  # type: ignore[misc]  # the overloads leave the other options to it
    q: Float[Tensor, "*batch H L E"],
    k: Float[Tensor, "*batch Hkv S E"],
    v: Float[Tensor, "*batch Hkv S Ev"],
    *,
    ridge: float | Float[Tensor, "..."] = 1.0,
    scale: float | Float[Tensor, "..."] | None = None,
    is_causal: bool = True,
    key_padding_mask: Bool[Tensor, "*batch S"] | None = None,
    solver: str = "auto",
    preconditioner: str | None = None,
    tol: float = 1e-6,
    max_iter: int = 32,
    block_size: int | None = None,
    ridge_grad: str = "exact",
    backend: str = "auto",
    return_info: bool = False,
) -> Float[Tensor, "*batch H L Ev"] | tuple[Float[Tensor, "*batch H L Ev"], LLAInfo]:
    """At every query, a weighted linear model of values over keys is fitted and read at the query.

    The output is the intercept b of min over (b, M) of sum_j w_ij ||v_j - b - M (k_j - q_i)||^2 + ridge omega_i ||M||^2
    with w_ij = exp(scale q_i.k_j) and omega_i = sum_j w_ij. Softmax attention is the same fit without M. Attention
    weights sum to one but about half of them may be negative: they are no probabilities.

    Args:
        q, k, v: as for `scaled_dot_product_attention`; the number of key heads divides that of the query heads.
        ridge: positive; a number or a tensor that broadcasts to (..., H, L). To infinity: softmax attention. Below
            1e-3, float32 loses the fits of rows that see fewer than E keys.
        scale: positive, as `ridge`; default E^-0.5. With queries and keys of unit norm an inverse squared bandwidth.
        is_causal: query i sees keys up to i + S - L (aligned at the end). A query that sees no key gets zero.
        key_padding_mask: True hides a key.
        solver: "cg" forms no E x E matrix, "cholesky" forms one a query of a block, "auto" takes the cheaper: the
            latter up to E = 32, for a few queries up to E = 128. Rows whose factorisation breaks down go to "cg".
        preconditioner: None or "jacobi" (helps keys with coordinates of unequal scale); conjugate gradients only.
        tol: of conjugate gradients, on the norm of the residual relative to that of the right-hand side.
        max_iter: of conjugate gradients; a solve that needs more warns with `ConvergenceWarning` and says so in `info`.
        block_size: queries to a strip; by default as many as suit a core's cache.
        ridge_grad: "exact" differentiates this function; "detached" holds ridge omega_i constant as the published
            kernels do, which changes gradients to queries and keys by several per cent.
        backend: "torch", "triton" (a GPU, or triton's interpreter; conjugate gradients in float32, E and Ev up to 128),
            or "auto": triton on a GPU where it is installed and can take the call.
        return_info: also return an `LLAInfo`.

    Returns:
        Output of the dtype of `v`. Half precision is computed in float32.

    Raises:
        TypeError, ValueError: an argument of a wrong type, shape or range, NaN or infinity among the inputs.

    Differentiable once, in q, k, v, ridge and scale. Memory Theta((L + S) E) beside the inputs. Time of a head, causal:
    about (4 T + 8) L S E / 2 with T iterations, or (E + 8) L S E / 2 + L E^3 / 3 by Cholesky.
    Source: arXiv 2510.01450.

    >>> k = torch.nn.functional.normalize(torch.randn(1, 1, 200, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    >>> v = k @ torch.ones(4, 2) + 3  # values are affine in the keys
    >>> o = local_linear_attention(k, k, v, ridge=1e-4)
    >>> bool((o - v)[..., 20:, :].abs().max() < 0.01)
    True
    """
    check_choice("solver", solver, ("auto", "cg", "cholesky"))
    check_choice("preconditioner", preconditioner, (None, "jacobi"))
    check_choice("ridge_grad", ridge_grad, ("exact", "detached"))
    check_choice("backend", backend, ("auto", "torch", "triton"))
    check_positive("tol", tol, below=1)
    check_count("max_iter", max_iter)
    if block_size is not None:
        check_count("block_size", block_size)
    a = arrange(q, k, v, ridge, scale, is_causal, key_padding_mask)
    options = Options(solver, preconditioner, tol, max_iter, block_size, ridge_grad, half=q.element_size() < 4)
    engine = kernels_for(backend, q, v, solver)
    report = Report()
    output, *fitted = _Attention.apply(
        a.q, a.k, a.v, a.ridge, a.scale, a.hidden, a.causal, options, engine, report, return_info
    )
    if report.unconverged:
        warnings.warn(
            f"{report.unconverged} rows did not reach tol={tol:g} in {max_iter} iterations: raise ridge or max_iter,"
            ' or take solver="cholesky"',
            ConvergenceWarning,
            stacklevel=2,
        )
    output = a.restore(output).to(v.dtype)
    if not return_info:
        return output
    omega, delta, rho = (a.restore(x) for x in fitted)
    status = Status.ITERATION_LIMIT if report.unconverged else Status.CONVERGED
    return output, LLAInfo(status, omega, delta, rho, tuple(report.iterations), report.residual)


def kernels_for(backend: str, q: Tensor, v: Tensor, solver: str) -> Any:
    """The module whose `forward` and `backward` do the work."""
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return passes
    from locally.sequence.local_linear_attention import launch

    if backend == "triton":
        launch.demand(q, v, solver)
        return launch
    return launch if launch.suits(q, v, solver) else passes


class _Attention(torch.autograd.Function):
    """Keeps O(n d) numbers between the passes: the inputs, the slopes rho, and three numbers a query."""

    @staticmethod
    def forward(ctx, q, k, v, ridge, scale, hidden, causal, options, engine, report, measure):
        fit = engine.forward(pose(q, k, v, ridge, scale, hidden, causal), options, report, measure=measure)
        ctx.save_for_backward(q, k, v, ridge, scale, hidden, fit.output, fit.rho, fit.delta, fit.omega, fit.shift)
        ctx.rest = causal, options, engine
        ctx.mark_non_differentiable(fit.omega, fit.delta, fit.rho)
        return fit.output, fit.omega, fit.delta, fit.rho

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        q, k, v, ridge, scale, hidden, *fitted = ctx.saved_tensors
        causal, options, engine = ctx.rest
        report = Report()
        problem = pose(q, k, v, ridge, scale, hidden, causal)
        found = engine.backward(problem, Fit(*fitted), grad.contiguous(), options, report)
        if report.unconverged:
            warnings.warn(
                f"backward: {report.unconverged} rows did not reach tol={options.tol:g} in {options.max_iter}"
                " iterations, their gradients are approximate",
                ConvergenceWarning,
                stacklevel=2,
            )
        return found.q, found.k, found.v, found.ridge, found.scale, *(None,) * 6
