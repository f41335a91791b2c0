"""Convergent graph solvers: an encoder writes the maps, the contracting layer solves them, a decoder reads the answer.

For stationary states of systems on graphs, on graphs of any size. Source: arXiv 2106.01680.
"""

from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from locally.checks import check_choice, check_count, check_shape
from locally.solvers.convergent_graph.graphs import Graph, as_graph
from locally.solvers.convergent_graph.layer import ContractingFixedPoint, softmax_by

TASKS = ("node", "graph")
AGGREGATIONS = ("sum", "mean")
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "leaky_relu": nn.LeakyReLU,
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
}


class GraphNetwork(nn.Module, ABC):
    """What all networks here share: one value vector per node, decoded per node or, after a readout, per graph.

    Subclasses define `states`, one row per node.
    """

    def __init__(self, width: int, out_dim: int, *, task: str, readout: str, activation: str, decoder: tuple[int, ...]):
        super().__init__()
        check_choice("task", task, TASKS)
        check_choice("readout", readout, AGGREGATIONS)
        self.task, self.readout = task, readout
        self.decoder = mlp(width, decoder, out_dim, activation, last=False)

    @abstractmethod
    def states(self, graph: Graph) -> Float[Tensor, "nodes width"]:
        """The state of every node, which the decoder reads."""

    def forward(
        self,
        data: Any,
        edge_index: Int[Tensor, "two edges"] | None = None,
        edge_attr: Float[Tensor, "..."] | None = None,
        batch: Int[Tensor, " nodes"] | None = None,
        num_graphs: int | None = None,
    ) -> Float[Tensor, "nodes_or_graphs out"]:
        """From a data object as PyTorch Geometric's, or from (x, edge_index, edge_attr, batch).

        Returns:
            One row per node, or per graph for task "graph"; a graph without nodes gets what the decoder makes of zero.

        Raises:
            ValueError, TypeError: the graph does not fit together, or not to the network.
        """
        graph = as_graph(data, edge_index, edge_attr, batch, num_graphs)
        states = self.states(graph)
        return self.decoder(states if self.task == "node" else pool(states, graph, self.readout))


class CGS(GraphNetwork):
    """Convergent graph solver: encoder, contracting layer with several heads, decoder.

    Attention averages over edges and rows are normalised, so neighbours are never counted: where degrees matter, make
    them a node feature.

    Args:
        node_dim, edge_dim: numbers of node and edge features; edge_dim may be 0.
        out_dim: outputs per node or graph.
        heads: independent maps, H.
        gamma: contraction factor, in (0, 1); the paper's is 0.5 throughout.
        hidden: width of the encoder's states.
        num_layers: message passing layers of the encoder, at least 1.
        mlp_hidden: hidden widths of its perceptrons.
        decoder_hidden: hidden widths of the decoder.
        activation: of all perceptrons: leaky_relu, silu, relu or tanh.
        aggregation: of messages: sum or mean.
        task: "node" or "graph"; `readout` (sum or mean) gathers nodes for the latter.
        **layer: handed to `ContractingFixedPoint`: normalize, flow, solver, tol, max_iter, and its activation as `phi`.

    Raises:
        ValueError, TypeError: a hyper-parameter is out of range.

    >>> _ = torch.manual_seed(0)
    >>> model = CGS(node_dim=2, edge_dim=1, out_dim=1, heads=4)
    >>> x, edges = torch.ones(3, 2), torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> model(x, edges, torch.ones(4, 1)).shape, model.active_share > 0
    (torch.Size([3, 1]), True)
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        out_dim: int,
        *,
        heads: int = 16,
        gamma: float = 0.5,
        phi: str = "identity",
        hidden: int = 32,
        num_layers: int = 1,
        mlp_hidden: tuple[int, ...] = (64,),
        decoder_hidden: tuple[int, ...] = (64, 32),
        activation: str = "leaky_relu",
        aggregation: str = "sum",
        task: str = "node",
        readout: str = "sum",
        **layer: Any,
    ):
        check_count("heads", heads)
        super().__init__(heads, out_dim, task=task, readout=readout, activation=activation, decoder=decoder_hidden)
        sizes: dict[str, Any] = {"hidden": hidden, "num_layers": num_layers, "mlp_hidden": mlp_hidden}
        self.encoder = AttentionMPNN(
            node_dim,
            edge_dim,
            heads,
            heads,
            activation=activation,
            aggregation=aggregation,
            **sizes,
        )
        self.fixed_point = ContractingFixedPoint(gamma, phi, **layer)
        self.active_share = float("nan")

    def states(self, graph: Graph) -> Float[Tensor, "nodes heads"]:
        """The fixed points; `active_share` is then the share of logits that the clip lets gradients through."""
        bias, logit = self.encoder(graph)
        self.active_share = float(((logit >= 0) & (logit <= 1)).float().mean()) if logit.numel() else float("nan")
        return self.fixed_point(graph.edge_index, logit, bias, graph.batch, graph.num_graphs)


class AttentionMPNN(nn.Module):
    """Message passing with attention over the edges that enter a node; outputs a row per node and a row per edge.

    z_e = [edge, source, target]; edge' = MLP(z); w = softmax over entering edges of MLP(z); node' = MLP([aggregate of
    w edge', node]). Perceptrons have the activation on their output too.
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        node_out: int,
        edge_out: int,
        *,
        hidden: int = 32,
        num_layers: int = 1,
        mlp_hidden: tuple[int, ...] = (64,),
        activation: str = "leaky_relu",
        aggregation: str = "sum",
    ):
        super().__init__()
        for name, value in (("node_dim", node_dim), ("node_out", node_out), ("edge_out", edge_out), ("hidden", hidden)):
            check_count(name, value)
        check_count("edge_dim", edge_dim, at_least=0)
        check_count("num_layers", num_layers)
        check_choice("aggregation", aggregation, AGGREGATIONS)
        self.node_dim, self.edge_dim = node_dim, edge_dim
        inner = [hidden] * (num_layers - 1)
        nodes, edges = [node_dim, *inner, node_out], [edge_dim, *inner, edge_out]
        self.layers = nn.ModuleList(
            AttentionLayer(*sizes, mlp_hidden, activation, aggregation)
            for sizes in zip(nodes[:-1], nodes[1:], edges[:-1], edges[1:], strict=True)
        )

    def forward(self, graph: Graph) -> tuple[Float[Tensor, "nodes node_out"], Float[Tensor, "edges edge_out"]]:
        check_shape("x", graph.x, (None, self.node_dim))
        check_shape("edge_attr", graph.edge_attr, (None, self.edge_dim))
        nodes, edges = graph.x, graph.edge_attr
        for layer in self.layers:
            nodes, edges = layer(nodes, edges, graph.edge_index)
        return nodes, edges


class AttentionLayer(nn.Module):
    """One layer of `AttentionMPNN`, from node_in and edge_in features to node_out and edge_out."""

    def __init__(
        self,
        node_in: int,
        node_out: int,
        edge_in: int,
        edge_out: int,
        mlp_hidden: tuple[int, ...],
        activation: str,
        aggregation: str,
    ):
        super().__init__()
        self.edge = mlp(edge_in + 2 * node_in, mlp_hidden, edge_out, activation)
        self.attention = mlp(edge_in + 2 * node_in, mlp_hidden, 1, activation)
        self.node = mlp(edge_out + node_in, mlp_hidden, node_out, activation)
        self.aggregation = aggregation

    def forward(
        self,
        nodes: Float[Tensor, "nodes node_in"],
        edges: Float[Tensor, "edges edge_in"],
        edge_index: Int[Tensor, "two edges"],
    ) -> tuple[Float[Tensor, "nodes node_out"], Float[Tensor, "edges edge_out"]]:
        source, target = edge_index
        edges, scores = self.along_edges(nodes, edges, source, target)
        messages = softmax_by(scores, target, nodes.shape[0]) * edges
        gathered = edges.new_zeros(nodes.shape[0], edges.shape[1]).index_add(0, target, messages)
        if self.aggregation == "mean":
            gathered = gathered / torch.bincount(target, minlength=nodes.shape[0]).clamp(min=1)[:, None]
        return self.node(torch.cat([gathered, nodes], 1)), edges

    def along_edges(
        self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor
    ) -> tuple[Float[Tensor, "edges edge_out"], Float[Tensor, "edges 1"]]:
        """Both perceptrons of z, whose first layers are linear: W z = W_e edge + (W_s x)[source] + (W_t x)[target].

        Nodes go through their part of W before they are copied to the edges, of which there are several times as many.
        """
        both = self.edge, self.attention
        weights: list[Tensor] = [m.get_parameter("0.weight") for m in both]
        offsets: list[Tensor] = [m.get_parameter("0.bias") for m in both]
        n, e = nodes.shape[1], edges.shape[1]
        of_edges, of_source, of_target = torch.cat(weights).split([e, n, n], dim=1)
        z = nn.functional.linear(edges, of_edges, torch.cat(offsets))
        z += nn.functional.linear(nodes, of_source).index_select(0, source)
        z += nn.functional.linear(nodes, of_target).index_select(0, target)
        values, scores = z.split([w.shape[0] for w in weights], dim=1)
        return self.edge[1:](values), self.attention[1:](scores)


def pool(states: Float[Tensor, "nodes width"], graph: Graph, readout: str) -> Float[Tensor, "graphs width"]:
    """Sum or mean over the nodes of each graph; zero for a graph without any."""
    total = states.new_zeros(graph.num_graphs, states.shape[1]).index_add(0, graph.batch, states)
    if readout == "sum":
        return total
    return total / torch.bincount(graph.batch, minlength=graph.num_graphs).clamp(min=1)[:, None]


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int, activation: str, *, last: bool = True) -> nn.Sequential:
    """Linear layers with an activation after each; `last` puts one after the output as well."""
    check_choice("activation", activation, tuple(ACTIVATIONS))
    widths = [inputs, *hidden, outputs]
    layers: list[nn.Module] = []
    for i, o in pairwise(widths):
        layers += [nn.Linear(i, o), ACTIVATIONS[activation]()]
    return nn.Sequential(*(layers if last else layers[:-1]))
