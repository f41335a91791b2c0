"""Forward and backward over strips. Neither holds more than the inputs, the results and one strip."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locally.sequence.local_linear_attention.layout import Problem
from locally.sequence.local_linear_attention.reference import EPSILON
from locally.sequence.local_linear_attention.solvers import Options, Report, largest_residual, solve
from locally.sequence.local_linear_attention.strips import Strip, rowdot, tiles, weigh


@dataclass
class Fit:
    """What the forward pass leaves for the backward one: O(n d) numbers."""

    output: Float[Tensor, "heads group L dv"]
    rho: Float[Tensor, "heads group L d"]
    delta: Float[Tensor, "heads group L"]
    omega: Float[Tensor, "heads group L"]
    shift: Float[Tensor, "heads group L"]


@dataclass
class Gradients:
    q: Float[Tensor, "heads group L d"]
    k: Float[Tensor, "heads S d"]
    v: Float[Tensor, "heads S dv"]
    ridge: Float[Tensor, "heads group L"]
    scale: Float[Tensor, "heads group L"]


def forward(problem: Problem, options: Options, report: Report, *, measure: bool = False) -> Fit:
    """`measure`: find the true residual of every solve, at the price of half an iteration."""
    q = problem.q
    heads, group, L = q.shape[:3]
    fit = Fit(
        q.new_empty(heads, group, L, problem.values.shape[-1]),
        torch.empty_like(q, memory_format=torch.contiguous_format),
        *(q.new_empty(heads, group, L) for _ in range(3)),
    )
    for head, rows in tiles(problem, options.block_size):
        strip = weigh(problem, head, rows)
        rho = solve(strip, strip.mu, options, report)
        if measure:
            report.residual = max(report.residual, largest_residual(strip, rho, strip.mu))
        # p_ij = w_ij (1 - z_ij . rho_i) / delta_i; the sum of numerators is omega - mu . rho
        numerators = torch.mul(strip.weights, strip.project(rho, out=strip.scratch).neg_().add_(1), out=strip.scratch)
        delta = guard(torch.where(strip.omega > 0, numerators.sum(-1), 1.0))
        output = (numerators @ problem.values[head, : numerators.shape[-1]]) / delta.unsqueeze(-1)
        for name, x in (("output", output), ("rho", rho), ("delta", delta), ("omega", strip.omega)):
            getattr(fit, name)[head, :, rows] = x.unflatten(1, (group, -1))
        fit.shift[head, :, rows] = strip.shift.unflatten(1, (group, -1))
    return fit


def guard(delta: Tensor) -> Tensor:
    """Away from zero, whatever its sign; zero counts as positive."""
    return delta + EPSILON * torch.where(delta < 0, -1.0, 1.0).to(delta.dtype)


def backward(
    problem: Problem, fit: Fit, grad: Float[Tensor, "heads group L dv"], options: Options, report: Report
) -> Gradients:
    """One more solve with the same A_i, then one sweep. With ridge_grad="exact" the gradient of `forward` itself.

    The published backward pass treats the loading ridge * omega_i as a constant ("detached"): its gradients to queries
    and keys miss the last term of `logit_gradient`.
    """
    group = problem.q.shape[1]
    found = Gradients(
        torch.empty_like(problem.q, memory_format=torch.contiguous_format),
        torch.zeros_like(problem.keys),
        torch.zeros_like(problem.values),
        torch.empty_like(fit.omega),
        torch.empty_like(fit.omega),
    )
    for head, rows in tiles(problem, options.block_size):
        flat = lambda x, head=head, rows=rows: x[head, :, rows].flatten(1, 2)
        strip = weigh(problem, head, rows, flat(fit.shift))
        n = strip.keys.shape[1]
        rho, delta, g = flat(fit.rho), flat(fit.delta).unsqueeze(-1), flat(grad)
        G = (g @ problem.values[head, :n].mT).div_(delta)  # dO_i . v_j / delta_i
        rho_z = strip.project(rho)
        residual = 1 - rho_z
        attention = strip.weights * residual  # times delta
        found.v[head, :n].baddbmm_(attention.mT, g / delta)
        beta = torch.linalg.vecdot(G, attention).div_(delta.squeeze(-1)).unsqueeze(-1)
        C = G * strip.weights
        tau = C.sum(-1, keepdim=True)
        U = solve(strip, torch.baddbmm(-tau * strip.offset, C, strip.keys), options, report)
        a = beta * rho - U
        to_mu = a + beta * rho
        a_z = strip.project(a, out=strip.scratch)
        logit = logit_gradient(strip, G, residual, a, a_z, beta, rho, options.ridge_grad == "exact")

        through_rho = C.addcmul_(strip.weights, a_z)
        through_a = strip.weights * rho_z
        keys = found.k[head, :n]
        keys.baddbmm_(logit.mT, strip.scale.unsqueeze(-1) * strip.query)
        keys.baddbmm_(through_rho.mT, rho, alpha=-1)
        keys.baddbmm_(strip.weights.mT, to_mu)
        keys.baddbmm_(through_a.mT, a, alpha=-1)

        along = logit @ strip.keys
        if options.ridge_grad == "detached":  # the exact gradient is blind to what all logits of a row share
            along += logit.sum(-1, keepdim=True) * problem.centre[head].unsqueeze(1)
        dq = strip.scale.unsqueeze(-1) * along + through_rho.sum(-1, keepdim=True) * rho
        dq += through_a.sum(-1, keepdim=True) * a - strip.omega.unsqueeze(-1) * to_mu
        along_query = rowdot(strip.query, along)
        lands = lambda x: x.unflatten(1, (group, -1))
        found.q[head, :, rows] = lands(dq)
        found.scale[head, :, rows] = lands(along_query)
        found.ridge[head, :, rows] = lands(-strip.omega * rowdot(a, rho))
    return found


def logit_gradient(
    strip: Strip,
    G: Float[Tensor, "h R n"],
    residual: Float[Tensor, "h R n"],
    a: Float[Tensor, "h R d"],
    a_z: Float[Tensor, "h R n"],
    beta: Float[Tensor, "h R 1"],
    rho: Float[Tensor, "h R d"],
    exact: bool,
) -> Float[Tensor, "h R n"]:
    """w_ij (G_ij (1 - rho.z) - beta + (a + beta rho).z - (a.z)(rho.z) - ridge a.rho), and without its end if detached.

    Collected: (G - beta + a.z)(1 - rho.z), less the row's constant.
    """
    inner = G.sub_(beta).add_(a_z).mul_(residual)
    if exact:
        inner.sub_((strip.ridge * rowdot(a, rho)).unsqueeze(-1))
    return inner.mul_(strip.weights)
