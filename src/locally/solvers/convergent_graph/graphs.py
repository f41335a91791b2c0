"""Graphs as the networks take them: PyTorch Geometric's data objects by their attributes, or plain tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from locally.checks import check_count, check_finite, check_shape


@dataclass(frozen=True, eq=False)
class Graph:
    """A graph, or a disjoint union of graphs.

    Attributes:
        x: node features.
        edge_index: sources and targets.
        edge_attr: edge features.
        batch: the graph of each node, non-decreasing.
        num_graphs: at least the last entry of batch plus one; graphs without nodes count.
    """

    x: Float[Tensor, "nodes node_features"]
    edge_index: Int[Tensor, "two edges"]
    edge_attr: Float[Tensor, "edges edge_features"]
    batch: Int[Tensor, " nodes"]
    num_graphs: int = 1

    @property
    def num_nodes(self) -> int:
        """Nodes of all graphs together."""
        return self.x.shape[0]

    def to(self, device: torch.device | str) -> "Graph":
        """The graph on a device; tensors that are there already are shared."""
        moved = {name: getattr(self, name).to(device) for name in ("x", "edge_index", "edge_attr", "batch")}
        return replace(self, **moved)


def as_graph(
    data: Any,
    edge_index: Int[Tensor, "two edges"] | None = None,
    edge_attr: Float[Tensor, "..."] | None = None,
    batch: Int[Tensor, " nodes"] | None = None,
    num_graphs: int | None = None,
) -> Graph:
    """From a data object, or from tensors (x, edge_index, edge_attr, batch).

    A data object has `edge_index` and, unless they are None, `x`, `edge_attr`, `batch`, `num_graphs` and `num_nodes`:
    what torch_geometric.data.Data and Batch have. Without x every node gets the feature 1, without edge_attr edges have
    no features. One-dimensional features become one column.

    Raises:
        ValueError, TypeError: no edge_index, shapes or dtypes that do not fit together, an index that is not a node, a
            feature that is not finite, or a batch that is not sorted.

    >>> as_graph(torch.ones(3, 2), torch.tensor([[0, 1], [1, 2]])).edge_attr.shape
    torch.Size([2, 0])
    """
    if isinstance(data, Graph):
        return data
    x, num_nodes = data, None
    if edge_index is None:
        if getattr(data, "edge_index", None) is None:
            raise TypeError(
                f"a graph needs edge_index: pass tensors or an object that has it, got {type(data).__name__}"
            )
        x, edge_index = getattr(data, "x", None), data.edge_index
        edge_attr, batch = getattr(data, "edge_attr", None), getattr(data, "batch", None)
        num_nodes, num_graphs = getattr(data, "num_nodes", None), getattr(data, "num_graphs", num_graphs)
    check_shape("edge_index", edge_index, (2, None))
    if edge_index.dtype != torch.int64:
        raise TypeError(f"edge_index must be int64, got {edge_index.dtype}")
    if x is None:
        known = [
            num_nodes,
            None if batch is None else batch.shape[0],
            int(edge_index.max()) + 1 if edge_index.numel() else 0,
        ]
        like = edge_attr if edge_attr is not None else torch.empty(0)
        x = like.new_ones(next(n for n in known if n is not None), 1)
    x = x[:, None] if x.ndim == 1 else x
    check_shape("x", x, (None, None))
    if edge_attr is None:
        edge_attr = x.new_zeros(edge_index.shape[1], 0)
    edge_attr = edge_attr[:, None] if edge_attr.ndim == 1 else edge_attr
    check_shape("edge_attr", edge_attr, (edge_index.shape[1], None))
    if batch is None:
        batch, num_graphs = edge_index.new_zeros(x.shape[0]), num_graphs or 1
    check_shape("batch", batch, (x.shape[0],))
    if num_graphs is None:
        num_graphs = int(batch[-1]) + 1 if batch.numel() else 0
    graph = Graph(x, edge_index, edge_attr, batch, num_graphs)
    _check(graph)
    return graph


def _check(graph: Graph) -> None:
    for name in ("x", "edge_attr"):
        features = getattr(graph, name)
        if not features.is_floating_point() or features.dtype != graph.x.dtype:
            raise TypeError(f"x and edge_attr must have one floating-point dtype, got {name} of {features.dtype}")
        check_finite(name, features)
    ends = graph.edge_index
    if ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < graph.num_nodes:
        low, high = int(ends.min()), int(ends.max())
        raise ValueError(f"edge_index must hold nodes 0 .. {graph.num_nodes - 1}, got {low} to {high}")
    batch = graph.batch
    if batch.numel() and not (int(batch[0]) >= 0 and (batch.diff() >= 0).all() and int(batch[-1]) < graph.num_graphs):
        raise ValueError(f"batch must be sorted and in 0 .. num_graphs - 1 = {graph.num_graphs - 1}")


def disjoint_union(graphs: Sequence[Any]) -> Graph:
    """One graph with all of them side by side, `batch` telling them apart.

    Raises:
        ValueError: there are none, or their numbers of features differ.
    """
    check_count("number of graphs", len(graphs))
    parts = [as_graph(g) for g in graphs]
    widths = {(g.x.shape[1], g.edge_attr.shape[1]) for g in parts}
    if len(widths) > 1:
        raise ValueError(f"graphs must have the same numbers of node and edge features, got {sorted(widths)}")
    nodes = torch.tensor([0, *(g.num_nodes for g in parts)]).cumsum(0).tolist()
    counts = torch.tensor([0, *(g.num_graphs for g in parts)]).cumsum(0).tolist()
    return Graph(
        torch.cat([g.x for g in parts]),
        torch.cat([g.edge_index + n for g, n in zip(parts, nodes)], 1),
        torch.cat([g.edge_attr for g in parts]),
        torch.cat([g.batch + n for g, n in zip(parts, counts)]),
        counts[-1],
    )
