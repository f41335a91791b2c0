"""Krylov methods for linear maps, (I - gamma A) x = b: BiCGSTAB for any, conjugate gradients for reversible ones.

Sources: van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992), 631-644; for reversible maps `locally.linalg.krylov`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from locally.linalg.krylov import CG, Diagonal, Operator
from locally.solvers.convergent_graph.maps import ContractingMaps


def bicgstab(maps: ContractingMaps, x: Tensor, targets: Tensor, most: int) -> tuple[Tensor, int]:
    """Every graph and head with scalars of its own, until the residuals are below the targets times ||x||.

    The residual b - (I - gamma A) x is the change that a sweep would make. Where a scalar breaks down, that system
    starts again from its residual. Returns x and the products.
    """
    x = x.clone()
    r = maps(x) - x
    shadow, p = r.clone(), r.clone()
    rho = maps.dot(shadow, r)
    tiny = torch.finfo(x.dtype).eps ** 2
    products = 1
    while products < most:
        running = maps.norm(r) > targets * maps.norm(x)
        if not running.any():
            break
        v = maps.linear(p).neg_().add_(p)
        alpha = _ratio(rho, maps.dot(shadow, v), running)
        s = torch.addcmul(r, maps.spread(-alpha), v)
        t = maps.linear(s).neg_().add_(s)
        omega = _ratio(maps.dot(t, s), maps.dot(t, t), running)
        # where a system has finished, alpha and omega are zero: x and r stay
        x.addcmul_(maps.spread(alpha), p).addcmul_(maps.spread(omega), s)
        r = torch.addcmul(s, maps.spread(-omega), t)
        rho_next = maps.dot(shadow, r)
        beta = _ratio(rho_next * alpha, rho * omega, running)
        p.addcmul_(maps.spread(-omega), v).mul_(maps.spread(beta)).add_(r)
        broken = running & (rho_next.abs() <= tiny * maps.dot(r, r))
        if broken.any():
            shadow = torch.where(maps.spread(broken), r, shadow)
            p = torch.where(maps.spread(broken), r, p)
            rho_next = torch.where(broken, maps.dot(r, r), rho_next)
        rho = rho_next
        products += 2
    return x, products


def _ratio(numerator: Tensor, denominator: Tensor, running: Tensor) -> Tensor:
    """Zero where the system has finished or the denominator vanishes."""
    return torch.where(running & (denominator != 0), numerator / denominator, 0.0)


class ReversibleSystem(Operator):
    """diag(d) (I - gamma A), symmetric positive definite where d_i A_ij = d_j A_ji; one system per head."""

    def __init__(self, maps: ContractingMaps, d: Float[Tensor, "nodes 1"]):
        self.maps, self.d = maps, d

    @property
    def size(self) -> int:
        return self.maps.sparsity.num_nodes

    def product(self, v: Tensor, out: Tensor) -> None:
        x = v.mT.contiguous()
        # adjoint maps hold A^T: with x = d y their system is symmetric in y
        y = self.d * x - self.maps.linear(self.d * x) if self.maps.adjoint else self.d * (x - self.maps.linear(x))
        out.copy_(y.mT)


def reversible_cg(maps: ContractingMaps, x: Tensor, tol: float, most: int) -> tuple[Tensor, int]:
    """Solve with d the degrees, by Jacobi-preconditioned conjugate gradients; returns x and the products.

    Raises:
        ValueError: the maps are not reversible with respect to the degrees.
    """
    s = maps.sparsity
    lines = s.columns if maps.adjoint else s.rows
    d = torch.bincount(lines, minlength=s.num_nodes).clamp(min=1).to(x.dtype)[:, None]
    check_reversible(maps, d)
    bias = maps.bias.detach()
    b, start = (bias, x / d) if maps.adjoint else (d * bias, x)
    system, jacobi = ReversibleSystem(maps, d), Diagonal(1 / d[:, 0])
    # residuals in CG's norm weigh nodes by degree, hence a little more accuracy than the tolerance; Picard finishes
    rtol = max((1 - maps.gamma) * tol / 10, torch.finfo(x.dtype).eps)
    found = CG(rtol=rtol, max_steps=most).solve(system, b.mT.contiguous(), start.mT.contiguous(), preconditioner=jacobi)
    y = found.x.mT.contiguous()
    return (d * y if maps.adjoint else y), int(found.iterations.max()) + 1 if y.numel() else 0


def check_reversible(maps: ContractingMaps, d: Float[Tensor, "nodes 1"]) -> None:
    """d_i A_ij = d_j A_ji, summed over parallel edges."""
    s = maps.sparsity
    lines = s.columns if maps.adjoint else s.rows
    flows = d[lines] * maps.weights.detach()
    low, high = torch.minimum(s.rows, s.columns), torch.maximum(s.rows, s.columns)
    _, pair = torch.unique(low * s.num_nodes + high, return_inverse=True)
    signs = torch.sign(s.rows - s.columns)[:, None].to(flows.dtype)
    net = flows.new_zeros(int(pair.max()) + 1 if pair.numel() else 0, flows.shape[1])
    worst = float(net.index_add_(0, pair, signs * flows).abs().max()) if net.numel() else 0.0
    if worst > 1e3 * torch.finfo(flows.dtype).eps:
        raise ValueError(
            "method 'cg' needs reversible maps: an undirected graph with the same logits on both directions of an edge;"
            f" here they differ by up to {worst:.3g}"
        )
