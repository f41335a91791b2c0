"""The triton kernels behind the same two calls as `passes`: checks, buffers, grids."""

import importlib.util
import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from locally.errors import MissingExtra
from locally.sequence.local_linear_attention.layout import Problem
from locally.sequence.local_linear_attention.passes import Fit, Gradients
from locally.sequence.local_linear_attention.reference import EPSILON
from locally.sequence.local_linear_attention.solvers import Options, Report

LARGEST = 128  # head dimension: a block of queries lives in registers


def interpreting() -> bool:
    """Whether triton runs kernels on CPU tensors, decided by its variable when it is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def suits(q: Tensor, v: Tensor, solver: str) -> bool:
    """Whether the kernels can take this call, for backend="auto"."""
    installed = importlib.util.find_spec("triton") is not None
    return installed and solver != "cholesky" and q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= LARGEST


def demand(q: Tensor, v: Tensor, solver: str) -> None:
    """Refuse what the kernels cannot take, in words."""
    if importlib.util.find_spec("triton") is None:
        raise MissingExtra('backend="triton" needs triton, which is not installed: pip install triton brings it')
    if not q.is_cuda and not interpreting():
        raise ValueError(f'backend="triton" needs tensors on a GPU (or TRITON_INTERPRET=1), got {q.device}')
    if solver == "cholesky":
        raise ValueError('solver must be "cg" or "auto" with backend="triton", got "cholesky"')
    if q.dtype == torch.float64:
        raise TypeError('backend="triton" computes in float32, got q of float64: take backend="torch"')
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > LARGEST:
            raise ValueError(
                f'{name} must have a last dimension up to {LARGEST} with backend="triton", got {x.shape[-1]}'
            )


class Launch:
    """What all three kernels are told about one problem."""

    def __init__(self, problem: Problem, options: Options) -> None:
        heads, self.group, self.L, self.d = problem.q.shape
        self.S, self.dv = problem.values.shape[1:]
        self.kv_heads, self.heads = heads, heads * self.group
        self.q = problem.q.contiguous()
        self.offset = (problem.q - problem.centre[:, None, None]).contiguous()
        self.keys, self.values = problem.keys.contiguous(), problem.values.contiguous()
        self.scale, self.ridge = problem.scale.contiguous(), problem.ridge.contiguous()
        masked = problem.hidden is not None
        self.hidden = problem.hidden.to(torch.int8).contiguous() if problem.hidden is not None else self.q
        wide = max(self.d, self.dv) > 64
        # with 64 rows the backward pass takes 144 KiB of shared memory: a device with less needs block_size=32
        rows = options.block_size or (32 if wide else 64)
        self.rows = max(16, 1 << (rows - 1).bit_length())  # matrix products on the device take powers of two from 16
        self.columns = min(self.rows, 32)
        self.sizes = (self.L, self.S, problem.first_reach, self.group, self.d, self.dv)
        self.limits = (options.tol**2, options.max_iter)
        self.constants: dict[str, Any] = {
            "CAUSAL": problem.causal,
            "MASKED": masked,
            "BR": self.rows,
            "BC": self.columns,
            "D": max(16, 1 << (self.d - 1).bit_length()),
            "DV": max(16, 1 << (self.dv - 1).bit_length()),
            "IN": "tf32" if options.half or torch.backends.cuda.matmul.allow_tf32 else "tf32x3",
            "num_warps": 4,
            "num_stages": 1 if wide else 2,
        }
        self.blocks = -(-self.L // self.rows)
        self.steps = self.q.new_empty(self.heads, self.blocks, dtype=torch.int32)
        self.unconverged = self.q.new_empty(self.heads, self.L, dtype=torch.int32)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.q, self.offset, self.keys, self.values, self.scale, self.ridge, self.hidden

    def tell(self, report: Report) -> None:
        report.iterations += self.steps.flatten().tolist()
        report.unconverged += int(self.unconverged.sum())


def forward(problem: Problem, options: Options, report: Report, *, measure: bool = False) -> Fit:
    """As `passes.forward`; the true residual is not measured here."""
    from locally.sequence.local_linear_attention.kernels import forward_kernel

    launch = Launch(problem, options)
    rows = problem.q.shape[:3]
    new = problem.q.new_empty
    fit = Fit(new(*rows, launch.dv), new(*rows, launch.d), new(rows), new(rows), new(rows))
    if launch.heads and launch.L:
        forward_kernel[launch.blocks, launch.heads](
            *launch.inputs, fit.output, fit.rho, fit.delta, fit.omega, fit.shift, launch.steps, launch.unconverged,
            *launch.sizes, *launch.limits, EPSILON, JACOBI=options.preconditioner == "jacobi", **launch.constants,
        )  # fmt: skip
    launch.tell(report)
    report.residual = float("nan") if measure else report.residual
    return fit


def backward(
    problem: Problem, fit: Fit, grad: Float[Tensor, "heads group L dv"], options: Options, report: Report
) -> Gradients:
    """As `passes.backward`."""
    from locally.sequence.local_linear_attention.kernels import key_kernel, query_kernel

    launch = Launch(problem, options)
    rows = problem.q.shape[:3]
    new = problem.q.new_empty
    found = Gradients(
        new(*rows, launch.d), new(problem.keys.shape), new(problem.values.shape), new(rows), new(rows)
    )  # fmt: skip
    a, rowsum, beta = new(*rows, launch.d), new(rows), new(rows)
    exact = options.ridge_grad == "exact"
    if launch.heads and launch.L:
        query_kernel[launch.blocks, launch.heads](
            *launch.inputs, fit.rho, fit.delta, fit.omega, fit.shift, grad,
            found.q, found.scale, found.ridge, rowsum, a, beta, launch.steps, launch.unconverged,
            *launch.sizes, *launch.limits, JACOBI=options.preconditioner == "jacobi", EXACT=exact, **launch.constants,
        )  # fmt: skip
    if launch.kv_heads and launch.S:
        key_kernel[-(-launch.S // launch.columns), launch.kv_heads](
            *launch.inputs, fit.rho, a, fit.delta, beta, fit.shift, grad, found.k, found.v,
            *launch.sizes, EXACT=exact, **launch.constants,
        )  # fmt: skip
    if not exact:  # logits lack q . centre, which only the exact gradient is blind to
        centre = problem.centre[:, None, None]
        found.q += (problem.scale * rowsum).unsqueeze(-1) * centre
        found.scale += rowsum * (problem.q * centre).sum(-1)
    launch.tell(report)
    return found
