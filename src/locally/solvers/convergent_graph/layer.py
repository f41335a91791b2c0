"""The contracting layer: edge logits and node biases in, the fixed point of the maps that they define out.

Source: Park, Choo and Park, Convergent Graph Solvers (arXiv 2106.01680).
"""

from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_finite, check_positive, check_shape
from locally.solvers.convergent_graph.fixed_points import FixedPoint, FixedPointSolver, Method
from locally.solvers.convergent_graph.implicit import attach, warn_unless_reached
from locally.solvers.convergent_graph.maps import Activation, ContractingMaps, Sparsity, largest_by


class Normalize(StrEnum):
    """How edge logits become rows that sum to at most one."""

    DEGREE = "degree"
    SIGMOID = "sigmoid"
    SOFTMAX = "softmax"


class Flow(StrEnum):
    """The way that values travel along an edge (source, target)."""

    TARGET_TO_SOURCE = "target_to_source"
    SOURCE_TO_TARGET = "source_to_target"


class ContractingFixedPoint(nn.Module):
    """x = phi(gamma A x + b), A made from edge logits so that the map contracts by gamma whatever the logits are.

    Existence, uniqueness and convergence hold for any input; the gradient is implicit, with memory for one evaluation.
    The layer has no parameters of its own.

    Args:
        gamma: the contraction factor, in (0, 1). An influence fades by gamma a hop.
        activation: phi: identity, tanh, relu or leaky_relu.
        normalize: `degree` clips logits to [0, 1] and divides by the number of edges in the row (the paper's; no
            gradient reaches a logit outside); `sigmoid` divides 1 / (1 + exp(-logit)) likewise; `softmax` normalises
            each row, which then sums to exactly 1.
        flow: `target_to_source`, the paper's, makes the source of an edge its row, so that values travel against the
            edge; `source_to_target` is PyTorch Geometric's convention. On undirected graphs with both directions
            stored only the logits' roles change.
        solver, tol, max_iter: see `FixedPointSolver`.

    Attributes:
        last: the `FixedPoint` of the last call: iterations, statuses and error bounds of each graph.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> layer = ContractingFixedPoint(gamma=0.5)
    >>> edges = torch.tensor([[0, 1], [1, 2]])  # a path 0 -> 1 -> 2
    >>> layer(edges, torch.ones(2, 1), torch.tensor([[0.0], [0.0], [1.0]])).flatten().tolist()
    [0.25, 0.5, 1.0]
    """

    last: FixedPoint | None

    def __init__(
        self,
        gamma: float = 0.5,
        activation: str = "identity",
        *,
        normalize: str = "degree",
        flow: str = "target_to_source",
        solver: str = "auto",
        tol: float | None = None,
        max_iter: int | None = None,
    ):
        super().__init__()
        check_positive("gamma", gamma, below=1.0)
        for name, value, kind in (("activation", activation, Activation), ("normalize", normalize, Normalize)):
            check_choice(name, value, tuple(kind))
        check_choice("flow", flow, tuple(Flow))
        check_choice("solver", solver, tuple(Method))
        self.gamma, self.activation = gamma, Activation(activation)
        self.normalize, self.flow = Normalize(normalize), Flow(flow)
        self.solver = FixedPointSolver(method=solver, tol=tol, max_iter=max_iter)
        self.last = None

    def extra_repr(self) -> str:
        return f"gamma={self.gamma}, activation={self.activation}, normalize={self.normalize}, flow={self.flow}"

    def maps(
        self,
        edge_index: Int[Tensor, "two edges"],
        edge_logit: Float[Tensor, "edges heads"],
        bias: Float[Tensor, "nodes heads"],
        batch: Int[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> ContractingMaps:
        """The maps that the layer solves, for a look at them.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        check_shape("edge_index", edge_index, (2, None))
        if edge_index.dtype != torch.int64:
            raise TypeError(f"edge_index must be int64, got {edge_index.dtype}")
        check_shape("bias", bias, (None, None))
        check_shape("edge_logit", edge_logit, (edge_index.shape[1], bias.shape[1]))
        check_finite("edge_logit", edge_logit)
        source, target = edge_index
        rows, columns = (source, target) if self.flow is Flow.TARGET_TO_SOURCE else (target, source)
        sparsity = Sparsity.of(rows, columns, bias.shape[0], batch, num_graphs)
        weights = contracting_weights(edge_logit, rows, bias.shape[0], self.normalize)
        return ContractingMaps(sparsity, weights, bias, self.gamma, self.activation)

    def forward(
        self,
        edge_index: Int[Tensor, "two edges"],
        edge_logit: Float[Tensor, "edges heads"],
        bias: Float[Tensor, "nodes heads"],
        batch: Int[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
        x0: Float[Tensor, "nodes heads"] | None = None,
    ) -> Float[Tensor, "nodes heads"]:
        """The fixed points of all heads; O(iterations edges heads) time.

        Args:
            edge_index: sources and targets; parallel edges and self-loops count as they stand.
            edge_logit: any finite numbers, one for each edge and head.
            bias: b; a node without edges in its row gets phi(b).
            batch: graph of each node, non-decreasing, for a disjoint union; each graph is solved to its own tolerance.
            num_graphs: how many graphs `batch` speaks of; default the last one in it plus one.
            x0: where to start, such as the answer of the previous training step.

        Raises:
            ValueError, TypeError: shapes or dtypes do not fit, an index is not a node, an edge joins two graphs, or an
                entry is not finite.

        Warns (ConvergenceWarning) if `max_iter` ends the solve early.
        """
        maps = self.maps(edge_index, edge_logit, bias, batch, num_graphs)
        self.last = self.solver.solve(maps, x0)
        warn_unless_reached(self.last, "forward")
        return attach(self.last, maps, self.solver)


def contracting_weights(
    logit: Float[Tensor, "edges heads"], rows: Int[Tensor, " edges"], num_nodes: int, normalize: str = "degree"
) -> Float[Tensor, "edges heads"]:
    """Entries of A: non-negative, with row sums of at most 1 for any logits.

    >>> contracting_weights(torch.tensor([[3.0], [0.5], [-1.0]]), torch.tensor([0, 0, 1]), 2).flatten().tolist()
    [0.5, 0.25, 0.0]
    """
    check_choice("normalize", normalize, tuple(Normalize))
    check_count("num_nodes", num_nodes, at_least=0)
    if normalize == Normalize.SOFTMAX:
        return softmax_by(logit, rows, num_nodes)
    degree = torch.bincount(rows, minlength=num_nodes).to(logit.dtype)
    # an edge implies a degree of at least one
    return (logit.clamp(0, 1) if normalize == Normalize.DEGREE else logit.sigmoid()) / degree[rows, None]


def softmax_by(
    logit: Float[Tensor, "edges heads"], groups: Int[Tensor, " edges"], num_groups: int
) -> Float[Tensor, "edges heads"]:
    """Softmax over the edges of each group; sums are double, so that those of large groups are 1 all the same."""
    top = largest_by(logit.detach(), groups, num_groups)
    raised = (logit - top.index_select(0, groups)).exp()
    totals = top.new_zeros(top.shape, dtype=torch.float64).index_add(0, groups, raised.double())
    return raised / totals.to(logit.dtype).index_select(0, groups)
