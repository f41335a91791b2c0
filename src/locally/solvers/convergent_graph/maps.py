"""Contracting maps on graphs: x -> phi(gamma A x + b), one for each head, with row sums of |A| of at most one.

Any such map has exactly one fixed point, and iterating it converges from anywhere at the rate gamma in the maximum norm
(Banach). Source: Park, Choo and Park, Convergent Graph Solvers (arXiv 2106.01680), section on contracting maps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from locally.checks import check_choice, check_finite, check_positive, check_shape
from locally.solvers.convergent_graph import kernels


class Activation(StrEnum):
    """The 1-Lipschitz functions phi that a map may end with."""

    IDENTITY = "identity"
    TANH = "tanh"
    RELU = "relu"
    LEAKY_RELU = "leaky_relu"

    @property
    def code(self) -> int:
        """The number that kernels know it by."""
        return list(Activation).index(self)

    def __call__(self, z: Tensor) -> Tensor:
        return _FUNCTIONS[self](z)

    def slope(self, z: Tensor) -> Tensor:
        """phi'(z), differentiable again; at the kink of (leaky) ReLU the value on its left, as in torch."""
        return _SLOPES[self](z)


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: lambda z: z,
    Activation.TANH: torch.tanh,
    Activation.RELU: torch.relu,
    Activation.LEAKY_RELU: lambda z: torch.nn.functional.leaky_relu(z, kernels.LEAK),
}
_SLOPES: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.IDENTITY: torch.ones_like,
    Activation.TANH: lambda z: 1 - torch.tanh(z).square(),
    Activation.RELU: lambda z: (z > 0).to(z.dtype),
    Activation.LEAKY_RELU: lambda z: torch.where(z > 0, 1.0, kernels.LEAK).to(z.dtype),
}


@dataclass(frozen=True, eq=False)
class Sparsity:
    """Where the entries of A are: entry e stands in row rows[e] and column columns[e]; parallel entries add up.

    Attributes:
        rows, columns: one each per edge, in the caller's order.
        starts: graph g of a disjoint union owns the nodes starts[g] .. starts[g + 1] - 1.
    """

    rows: Int[Tensor, " edges"]
    columns: Int[Tensor, " edges"]
    starts: Int[Tensor, " graphs_plus_1"]

    @classmethod
    def of(
        cls,
        rows: Int[Tensor, " edges"],
        columns: Int[Tensor, " edges"],
        num_nodes: int,
        batch: Int[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> "Sparsity":
        """Check the indices.

        Raises:
            ValueError: an index is not a node, `batch` is not sorted or not of one entry per node, or an edge joins two
                graphs.
        """
        for name, ends in (("rows", rows), ("columns", columns)):
            if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < num_nodes:
                low, high = int(ends.min()), int(ends.max())
                raise ValueError(f"edges must join nodes 0 .. {num_nodes - 1}, got {name} from {low} to {high}")
        if batch is None:
            return cls(rows, columns, torch.tensor([0, num_nodes], device=rows.device))
        if tuple(batch.shape) != (num_nodes,):
            raise ValueError(f"batch must have one entry for each of {num_nodes} nodes, got shape {tuple(batch.shape)}")
        if num_nodes and (int(batch[0]) < 0 or not (batch.diff() >= 0).all()):
            raise ValueError("batch must be non-negative and non-decreasing: the nodes of one graph stand together")
        if not torch.equal(batch[rows], batch[columns]):
            raise ValueError("edge_index joins nodes of different graphs")
        least = int(batch[-1]) + 1 if num_nodes else 0
        if num_graphs is None:
            num_graphs = least
        elif num_graphs < least:
            raise ValueError(f"num_graphs must be at least {least}, the graphs in batch, got {num_graphs}")
        counts = torch.bincount(batch, minlength=num_graphs)
        return cls(rows, columns, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))

    @property
    def num_nodes(self) -> int:
        """Nodes of all graphs together."""
        return int(self.starts[-1])

    @property
    def num_graphs(self) -> int:
        """Graphs side by side."""
        return self.starts.numel() - 1

    @cached_property
    def batch(self) -> Int[Tensor, " nodes"]:
        """The graph of each node."""
        graphs = torch.arange(self.num_graphs, device=self.starts.device)
        return torch.repeat_interleave(graphs, self.starts.diff())

    @cached_property
    def by_rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Limits of the rows, columns sorted by row, and the order that sorts them."""
        if self.rows.device.type == "cpu":
            limits, order = map(torch.from_numpy, kernels.compress(self.rows.numpy(), self.num_nodes))
        else:
            order = torch.argsort(self.rows, stable=True)
            counts = torch.bincount(self.rows, minlength=self.num_nodes)
            limits = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return limits, self.columns[order], order

    @cached_property
    def transposed(self) -> "Sparsity":
        """The pattern with every edge turned round."""
        return Sparsity(self.columns, self.rows, self.starts)


@dataclass(frozen=True, eq=False)
class ContractingMaps:
    """x -> phi(gamma A x + b), one map for each head, on a graph or a disjoint union of graphs.

    Args:
        sparsity: where A has entries.
        weights: the entries of A for each head, row sums of |weights| at most 1.
        bias: b, in the dtype and on the device of the weights (float32 or float64).
        gamma: the contraction factor, in (0, 1).
        activation: phi.
        adjoint: the maps contract in the sum norm, since their *column* sums are at most 1: what a backward pass
            solves. They are then measured in that norm.

    >>> ring = Sparsity.of(torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0]), num_nodes=3)
    >>> maps = ContractingMaps(ring, torch.ones(3, 1), torch.ones(3, 1), gamma=0.5)
    >>> maps(torch.zeros(3, 1)).flatten().tolist()
    [1.0, 1.0, 1.0]
    """

    sparsity: Sparsity
    weights: Float[Tensor, "edges heads"]
    bias: Float[Tensor, "nodes heads"]
    gamma: float
    activation: Activation = Activation.IDENTITY
    adjoint: bool = False

    def check(self) -> None:
        """Refuse what is not a contraction.

        Raises:
            ValueError, TypeError: shapes, dtypes or gamma do not fit, an entry is not finite, or a row of |A| sums to
                more than 1 (a column, for adjoint maps): A x could then grow, and a fixed point need not exist.
        """
        check_positive("gamma", self.gamma, below=1.0)
        check_choice("activation", self.activation, tuple(Activation))
        if self.bias.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"bias must be float32 or float64, got {self.bias.dtype}")
        if self.weights.dtype != self.bias.dtype:
            raise TypeError(f"weights must have the dtype of bias, {self.bias.dtype}, got {self.weights.dtype}")
        if self.bias.ndim != 2 or self.bias.shape[0] != self.sparsity.num_nodes:
            expected = f"({self.sparsity.num_nodes}, heads)"
            raise ValueError(f"bias must have shape {expected}, got {tuple(self.bias.shape)}")
        expected_weights = (self.sparsity.rows.numel(), self.bias.shape[1])
        if tuple(self.weights.shape) != expected_weights:
            raise ValueError(f"weights must have shape {expected_weights}, got {tuple(self.weights.shape)}")
        check_finite("weights", self.weights)
        check_finite("bias", self.bias)
        worst = float(self.sums.max()) if self.bias.numel() else 0.0
        slack = 64 * torch.finfo(self.bias.dtype).eps
        if worst > 1 + slack:
            kind = "column" if self.adjoint else "row"
            raise ValueError(f"each {kind} of |weights| must sum to at most 1, the largest sum is {worst:.6g}")

    @cached_property
    def rates(self) -> Float[Tensor, "graphs heads"]:
        """gamma ||A||, at most gamma: the factor by which each graph and head contracts."""
        largest = largest_by(self.sums, self.sparsity.batch, self.sparsity.num_graphs)
        return self.gamma * largest.clamp_(0, 1).to(self.bias.dtype)  # sums that rounding carries past 1 count as 1

    @cached_property
    def sums(self) -> Float[Tensor, "nodes heads"]:
        """Row sums of |A|, which bound its maximum norm (column sums and the sum norm for adjoint maps), in double."""
        lines = self.sparsity.columns if self.adjoint else self.sparsity.rows
        weights = self.weights.detach()
        totals = torch.zeros(self.bias.shape, dtype=torch.float64, device=weights.device)
        if weights.device.type == "cpu":
            kernels.add_absolute(lines.numpy(), weights.numpy(), totals.numpy())
            return totals
        return totals.index_add_(0, lines, weights.abs().double())

    def __call__(self, x: Float[Tensor, "nodes heads"]) -> Float[Tensor, "nodes heads"]:
        """phi(gamma A x + b), without a graph for gradients, O(edges heads); ValueError for x of another shape."""
        check_shape("x", x, tuple(self.bias.shape))
        if x.device.type == "cpu":
            out = torch.empty_like(self.bias, memory_format=torch.contiguous_format)
            n = self.sparsity.num_nodes
            kernels.sweep(*self.arrays, self.gamma, self.activation.code, 0, n, x.contiguous().numpy(), out.numpy())
            return out
        return self.activation(affine(self.sparsity, self.gamma, self.weights.detach(), self.bias.detach(), x))

    @cached_property
    def arrays(self) -> tuple[np.ndarray, ...]:
        """What the compiled loops read: limits, columns, weights by rows, and bias."""
        limits, columns, order = self.sparsity.by_rows
        weights = self.weights.detach()[order].contiguous()
        return tuple(t.numpy() for t in (limits, columns, weights, self.bias.detach().contiguous()))

    @cached_property
    def linear(self) -> "ContractingMaps":
        """x -> gamma A x."""
        homogeneous = replace(self, bias=torch.zeros_like(self.bias), activation=Activation.IDENTITY)
        if self.bias.device.type == "cpu":  # the sorted weights are the same
            homogeneous.__dict__["arrays"] = (*self.arrays[:3], homogeneous.bias.numpy())
        return homogeneous

    def norm(self, v: Float[Tensor, "nodes heads"]) -> Float[Tensor, "graphs heads"]:
        """The norm in which the maps contract, of each graph and head: maximum, or sum for adjoint maps."""
        if self.sparsity.num_graphs == 1 and v.shape[0]:
            return (v.abs().sum(0) if self.adjoint else v.abs().amax(0))[None]
        graphs = self.sparsity.num_graphs
        if self.adjoint:
            return v.new_zeros(graphs, v.shape[1]).index_add_(0, self.sparsity.batch, v.abs())
        return largest_by(v.abs(), self.sparsity.batch, graphs).clamp_(min=0)

    def dot(self, u: Float[Tensor, "nodes heads"], v: Float[Tensor, "nodes heads"]) -> Float[Tensor, "graphs heads"]:
        """Inner products of each graph and head."""
        if self.sparsity.num_graphs == 1:
            return (u * v).sum(0, keepdim=True)
        zeros = v.new_zeros(self.sparsity.num_graphs, v.shape[1])
        return zeros.index_add_(0, self.sparsity.batch, u * v)

    def spread(self, values: Shaped[Tensor, "graphs heads"]) -> Shaped[Tensor, "nodes_or_1 heads"]:
        """One value per graph and head to all its nodes."""
        return values if self.sparsity.num_graphs == 1 else values[self.sparsity.batch]

    def dense(self) -> Float[Tensor, "graphs heads most_nodes most_nodes"]:
        """I - gamma A of each graph and head, padded with the identity to the largest graph: 4 to 8 G H n^2 bytes."""
        s = self.sparsity
        most = int(s.starts.diff().max()) if s.num_graphs else 0
        graphs = s.batch[s.rows]
        offset = s.starts[graphs]
        eye = torch.eye(most, dtype=self.bias.dtype, device=self.bias.device)
        matrices = eye.repeat(s.num_graphs, 1, 1)[..., None].repeat(1, 1, 1, self.bias.shape[1])
        entries = -self.gamma * self.weights.detach()
        matrices.index_put_((graphs, s.rows - offset, s.columns - offset), entries, accumulate=True)
        return matrices.permute(0, 3, 1, 2)


def affine(
    sparsity: Sparsity,
    gamma: float,
    weights: Float[Tensor, "edges heads"],
    bias: Float[Tensor, "nodes heads"],
    x: Float[Tensor, "nodes heads"],
) -> Float[Tensor, "nodes heads"]:
    """gamma A x + b as a differentiable function of weights, bias and x, on any device."""
    messages = weights * x.index_select(0, sparsity.columns)
    return bias + gamma * torch.zeros_like(bias).index_add(0, sparsity.rows, messages)


def largest_by(
    values: Float[Tensor, "items heads"], groups: Int[Tensor, " items"], num_groups: int
) -> Float[Tensor, "groups heads"]:
    """The largest value of each group, -inf for an empty one."""
    lowest = values.new_full((num_groups, values.shape[1]), -torch.inf)
    return lowest.scatter_reduce_(0, groups[:, None].expand_as(values), values, "amax")
