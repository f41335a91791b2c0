"""A strip: a block of queries against all keys that they see. The unit in which everything is computed on a CPU.

A strip has R x n entries, R fixed, so memory stays Theta(n d); its weights are computed once and serve every iteration
of the solver, where a GPU, whose fast memory holds no strip, computes them anew each time (`kernels`).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from locally.sequence.local_linear_attention.layout import Problem

STRIP_ENTRIES = 2**19  # what a core's cache holds of one strip, in numbers
COLUMNS = 512  # keys whose second moments are summed in one product
FEW_ROWS = 4  # up to here each query's second moments are a product of their own


@dataclass
class Strip:
    """Weights w_ij of R queries and n keys in each of h heads, with their moments about the query (`offset`)."""

    weights: Float[Tensor, "h R n"]
    keys: Float[Tensor, "h n d"]
    query: Float[Tensor, "h R d"]
    offset: Float[Tensor, "h R d"]  # the query relative to the centre of the keys
    scale: Float[Tensor, "h R"]
    shift: Float[Tensor, "h R"]
    omega: Float[Tensor, "h R"]
    mu: Float[Tensor, "h R d"]
    ridge: Float[Tensor, "h R"]
    loading: Float[Tensor, "h R"]  # ridge * omega, and 1 for a query without keys
    scratch: Float[Tensor, "h R n"]

    def project(self, x: Float[Tensor, "h R d"], out: Float[Tensor, "h R n"] | None = None) -> Float[Tensor, "h R n"]:
        """z_ij . x_i for every pair, without any z: the first memory primitive (relative product)."""
        return torch.baddbmm(-rowdot(self.offset, x).unsqueeze(-1), x, self.keys.mT, out=out)

    def apply(self, x: Float[Tensor, "h R d"]) -> Float[Tensor, "h R d"]:
        """A_i x_i for every row, without any A: the second memory primitive. Two products with the keys."""
        weighted = self.project(x, out=self.scratch).mul_(self.weights)
        y = torch.addcmul(-rowdot(self.mu, x).unsqueeze(-1) * self.offset, self.loading.unsqueeze(-1), x)
        return y.baddbmm_(weighted, self.keys)

    def diagonal(self) -> Float[Tensor, "h R d"]:
        """Of every A_i, for Jacobi's preconditioner."""
        second = self.weights @ self.keys.square()
        about = second - self.offset * (2 * self.mu + self.omega.unsqueeze(-1) * self.offset)
        return about.clamp_(min=0) + self.loading.unsqueeze(-1)

    def matrices(self) -> Float[Tensor, "h R d d"]:
        """Every A_i; above the diagonal they may be undefined. R d^2 numbers a head, the same for any length."""
        h, R, _ = self.weights.shape
        d = self.keys.shape[-1]
        A = self.moments_of_few() if R <= FEW_ROWS else self.moments_of_many()
        A = A.view(h * R, d, d)
        # from moments about the centre to moments about the query: Sigma = M - mu q^T - q mu^T - omega q q^T
        q = self.offset.flatten(0, 1)
        half = (self.mu + 0.5 * self.omega.unsqueeze(-1) * self.offset).flatten(0, 1)
        A.baddbmm_(torch.stack([half, q], -1), torch.stack([q, half], -1).mT, alpha=-1)
        A.diagonal(dim1=1, dim2=2).add_(self.loading.reshape(-1, 1))
        return A.view(h, R, d, d)

    def moments_of_few(self) -> Float[Tensor, "h R d d"]:
        """M_i = sum_j w_ij k_j k_j^T, one query after the other."""
        weighted = (self.keys * self.weights[:, row].unsqueeze(-1) for row in range(self.weights.shape[1]))
        return torch.stack([K.mT @ self.keys for K in weighted], 1)

    def moments_of_many(self) -> Float[Tensor, "h R d d"]:
        """Lower triangles of all M_i: one product of the weights with the products of the keys' coordinates."""
        h, R, n = self.weights.shape
        d = self.keys.shape[-1]
        rows, columns = torch.tril_indices(d, d, device=self.keys.device)
        moments = self.mu.new_zeros(h, R, len(rows))
        coordinates = self.keys.mT.contiguous()  # products of whole rows: contiguous, and nothing is gathered
        products = self.mu.new_empty(h, len(rows), min(n, COLUMNS))
        for start in range(0, n, COLUMNS):
            some = coordinates[..., start : start + COLUMNS]
            into = products[..., : some.shape[-1]]
            for i in range(d):
                torch.mul(some[:, i : i + 1], some[:, : i + 1], out=into[:, i * (i + 1) // 2 : (i + 1) * (i + 2) // 2])
            moments.baddbmm_(self.weights[..., start : start + COLUMNS], into.mT)
        A = self.mu.new_zeros(h, R, d * d)
        return A.index_copy_(2, rows * d + columns, moments).view(h, R, d, d)


def tiles(problem: Problem, block_size: int | None) -> Iterator[tuple[slice, slice]]:
    """Which heads and which queries make each strip: short sequences many heads at once, long ones few rows."""
    heads, group, L, _ = problem.q.shape
    S = max(problem.keys.shape[1], 1)
    rows = block_size or max(16, min(128, STRIP_ENTRIES // (group * S)))
    together = max(1, STRIP_ENTRIES // (min(rows, max(L, 1)) * group * S))
    for head in range(0, heads, together):
        for row in range(0, L, rows):
            yield slice(head, min(head + together, heads)), slice(row, min(row + rows, L))


def weigh(problem: Problem, heads: slice, rows: slice, shift: Float[Tensor, "h R"] | None = None) -> Strip:
    """Weights and first moments of one strip; `shift` is the largest logit of each row where it is known already."""
    q = problem.q[heads, :, rows].flatten(1, 2)
    scale = problem.scale[heads, :, rows].flatten(1, 2)
    ridge = problem.ridge[heads, :, rows].flatten(1, 2)
    n = problem.reach(rows)
    keys = problem.keys[heads, :n]
    logits = (scale.unsqueeze(-1) * q) @ keys.mT
    if problem.causal:
        first = problem.first_reach + rows.start  # keys that the first row sees: the mask starts there
        start = max(0, first)
        reach = first + torch.arange(rows.stop - rows.start, device=q.device)
        late = torch.arange(start, n, device=q.device) >= reach.unsqueeze(1)
        logits[..., start:].masked_fill_(late.repeat(problem.q.shape[1], 1), -torch.inf)
    if problem.hidden is not None:
        logits.masked_fill_(problem.hidden[heads, None, :n], -torch.inf)
    if shift is None:
        shift = logits.amax(-1) if n else logits.new_zeros(logits.shape[:-1])
        shift = shift.masked_fill(shift == -torch.inf, 0.0)
    weights = logits.sub_(shift.unsqueeze(-1)).exp_()
    return strip_of(weights, keys, q, q - problem.centre[heads].unsqueeze(1), scale, shift, ridge)


def strip_of(
    weights: Float[Tensor, "h R n"],
    keys: Float[Tensor, "h n d"],
    query: Float[Tensor, "h R d"],
    offset: Float[Tensor, "h R d"],
    scale: Float[Tensor, "h R"],
    shift: Float[Tensor, "h R"],
    ridge: Float[Tensor, "h R"],
) -> Strip:
    """Complete a strip whose weights are known."""
    omega = weights.sum(-1)
    mu = torch.baddbmm(-omega.unsqueeze(-1) * offset, weights, keys)
    loading = torch.where(omega > 0, ridge * omega, 1.0)
    return Strip(weights, keys, query, offset, scale, shift, omega, mu, ridge, loading, torch.empty_like(weights))


def rowdot(x: Float[Tensor, "h R d"], y: Float[Tensor, "h R d"]) -> Float[Tensor, "h R"]:
    return torch.linalg.vecdot(x, y)
