"""What convergent graph solvers are measured against: stacked message passing, IGNN, SSE, APPNP and GIN.

Same call as `CGS`. Sources: Gu et al., Implicit Graph Neural Networks (arXiv 2009.06211); Dai et al., Learning
Steady-States of Iterative Algorithms over Graphs (ICML 2018); Klicpera et al., Predict then Propagate (arXiv
1810.05997); Xu et al., How Powerful are Graph Neural Networks (arXiv 1810.00826).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from locally.checks import check_between, check_count, check_positive
from locally.solvers.convergent_graph.graphs import Graph
from locally.solvers.convergent_graph.layer import ContractingFixedPoint
from locally.solvers.convergent_graph.networks import AttentionMPNN, GraphNetwork, mlp


class StackedGNN(GraphNetwork):
    """The encoder of `CGS` with `num_layers` layers and the decoder, without a fixed point in between.

    With one layer it is the encoder alone: what the fixed point adds shows in the difference. Arguments as for `CGS`.

    >>> model = StackedGNN(1, 0, 2, num_layers=3)
    >>> model(torch.ones(4, 1), torch.tensor([[0, 1], [1, 2]])).shape
    torch.Size([4, 2])
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        out_dim: int,
        *,
        hidden: int = 32,
        num_layers: int = 5,
        mlp_hidden: tuple[int, ...] = (64,),
        decoder_hidden: tuple[int, ...] = (64, 32),
        activation: str = "leaky_relu",
        aggregation: str = "sum",
        task: str = "node",
        readout: str = "sum",
    ):
        super().__init__(hidden, out_dim, task=task, readout=readout, activation=activation, decoder=decoder_hidden)
        sizes: dict[str, Any] = {"hidden": hidden, "num_layers": num_layers, "mlp_hidden": mlp_hidden}
        self.encoder = AttentionMPNN(
            node_dim, edge_dim, hidden, hidden, activation=activation, aggregation=aggregation, **sizes
        )

    def states(self, graph: Graph) -> Float[Tensor, "nodes width"]:
        """What the encoder gives for the nodes."""
        return self.encoder(graph)[0]


class IGNN(GraphNetwork):
    """Implicit graph network: X = relu(A X W^T + B(graph)), A averaging over entering edges, ||W||_inf <= kappa.

    A has a maximum norm of at most 1, hence kappa < 1 makes the map a contraction. Rows of the parameter that are
    longer than kappa in the sum norm are scaled down to it. Edge features reach only B. At most `max_iter` sweeps,
    forward and backward.
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        out_dim: int,
        *,
        heads: int = 32,
        kappa: float = 0.9,
        tol: float = 3e-6,
        max_iter: int = 300,
        hidden: int = 32,
        num_layers: int = 1,
        mlp_hidden: tuple[int, ...] = (64,),
        decoder_hidden: tuple[int, ...] = (64, 32),
        activation: str = "leaky_relu",
        task: str = "node",
        readout: str = "sum",
    ):
        check_positive("kappa", kappa, below=1.0)
        super().__init__(heads, out_dim, task=task, readout=readout, activation=activation, decoder=decoder_hidden)
        self.kappa, self.tol, self.max_iter = kappa, tol, max_iter
        sizes: dict[str, Any] = {"hidden": hidden, "num_layers": num_layers, "mlp_hidden": mlp_hidden}
        self.encoder = AttentionMPNN(node_dim, edge_dim, heads, heads, activation=activation, **sizes)
        self.weight = nn.Parameter(torch.randn(heads, heads) * kappa / heads)

    def states(self, graph: Graph) -> Float[Tensor, "nodes width"]:
        """The equilibrium, from zero; gradients by the implicit function theorem."""
        bias, _ = self.encoder(graph)
        source, target = graph.edge_index
        share = 1 / torch.bincount(target, minlength=graph.num_nodes).clamp(min=1).to(bias.dtype)[:, None]
        rows = self.weight.abs().sum(1, keepdim=True)
        weight = self.weight * (self.kappa / rows).clamp(max=1)

        def step(x: Tensor) -> Tensor:
            average = share * torch.zeros_like(x).index_add(0, target, x.index_select(0, source))
            return torch.relu(average @ weight.mT + bias)

        return equilibrium(step, torch.zeros_like(bias), tol=self.tol, max_iter=self.max_iter)


def equilibrium(step: Callable[[Tensor], Tensor], x: Tensor, *, tol: float, max_iter: int) -> Tensor:
    """Iterate `step` to its fixed point without a graph, once with it; the backward pass iterates its Jacobian."""
    with torch.no_grad():
        for _ in range(max_iter):
            x, last = step(x), x
            if not x.numel() or float((x - last).abs().max()) < tol:
                break
    if not torch.is_grad_enabled():
        return x
    # the Jacobian lives on a branch of its own: a hook on `result` that walked its own graph would hold itself alive
    start = x.detach().requires_grad_()
    again = step(start)
    result = step(x.detach())

    def solve_adjoint(g: Tensor) -> Tensor:
        u = g
        for _ in range(max_iter):
            (pulled,) = torch.autograd.grad(again, start, u, retain_graph=True)
            u, last = g + pulled, u
            if float((u - last).abs().max()) < tol * float(g.abs().max()):
                break
        return u

    if result.requires_grad:
        result.register_hook(solve_adjoint)
    return result


class SSE(GraphNetwork):
    """Steady-state embedding: h <- (1 - a) h + a W2 relu(W1 [x, sum over entering edges of (x, edge, h)]).

    Nothing makes it converge: `steps` sweeps at most, and the gradient sees only the last of them.
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        out_dim: int,
        *,
        hidden: int = 32,
        mlp_hidden: tuple[int, ...] = (64,),
        decoder_hidden: tuple[int, ...] = (64, 32),
        activation: str = "leaky_relu",
        rate: float = 0.1,
        steps: int = 20,
        tol: float = 1e-5,
        task: str = "node",
        readout: str = "sum",
    ):
        check_between("rate", rate, 0, 1)
        check_count("steps", steps)
        super().__init__(hidden, out_dim, task=task, readout=readout, activation=activation, decoder=decoder_hidden)
        self.rate, self.steps, self.tol, self.hidden = rate, steps, tol, hidden
        self.transition = mlp(2 * node_dim + edge_dim + hidden, mlp_hidden, hidden, "relu", last=False)

    def states(self, graph: Graph) -> Float[Tensor, "nodes width"]:
        """The state after at most `steps` sweeps from zero; the gradient sees the last one."""
        source, target = graph.edge_index

        def step(h: Tensor) -> Tensor:
            messages = torch.cat([graph.x.index_select(0, source), graph.edge_attr, h.index_select(0, source)], 1)
            gathered = messages.new_zeros(graph.num_nodes, messages.shape[1]).index_add(0, target, messages)
            return (1 - self.rate) * h + self.rate * self.transition(torch.cat([graph.x, gathered], 1))

        h = graph.x.new_zeros(graph.num_nodes, self.hidden)
        with torch.no_grad():
            for _ in range(self.steps - 1):
                h, last = step(h), h
                if not h.numel() or float((h - last).abs().max()) < self.tol:
                    break
        return step(h)


class APPNP(GraphNetwork):
    """Personalised PageRank to its limit: x = gamma A x + (1 - gamma) MLP(node), A averaging over neighbours.

    The contracting layer with weights that nothing sets: what writing them from the graph adds shows in the difference.
    """

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        out_dim: int,
        *,
        heads: int = 16,
        gamma: float = 0.9,
        mlp_hidden: tuple[int, ...] = (64,),
        decoder_hidden: tuple[int, ...] = (64, 32),
        activation: str = "leaky_relu",
        flow: str = "target_to_source",
        task: str = "node",
        readout: str = "sum",
    ):
        check_count("edge_dim", edge_dim, at_least=0)  # the same call as the others; edge features go unseen
        super().__init__(heads, out_dim, task=task, readout=readout, activation=activation, decoder=decoder_hidden)
        self.encoder = mlp(node_dim, mlp_hidden, heads, activation)
        self.fixed_point = ContractingFixedPoint(gamma, flow=flow)

    def states(self, graph: Graph) -> Float[Tensor, "nodes width"]:
        """The fixed point of averaging over neighbours with restarts at the encoded nodes."""
        bias = (1 - self.fixed_point.gamma) * self.encoder(graph.x)
        logit = bias.new_ones(graph.edge_index.shape[1], bias.shape[1])
        return self.fixed_point(graph.edge_index, logit, bias, graph.batch, graph.num_graphs)


class GIN(GraphNetwork):
    """Graph isomorphism network: x <- MLP((1 + eps) x + sum over entering edges of relu(x_source + W edge))."""

    def __init__(
        self,
        node_dim: int,
        edge_dim: int,
        out_dim: int,
        *,
        hidden: int = 32,
        num_layers: int = 5,
        mlp_hidden: tuple[int, ...] = (64,),
        decoder_hidden: tuple[int, ...] = (64, 32),
        activation: str = "relu",
        task: str = "graph",
        readout: str = "sum",
    ):
        check_count("num_layers", num_layers)
        super().__init__(hidden, out_dim, task=task, readout=readout, activation=activation, decoder=decoder_hidden)
        widths = [node_dim, *[hidden] * num_layers]
        self.eps = nn.Parameter(torch.zeros(num_layers))
        self.edges = nn.ModuleList(
            nn.Linear(edge_dim, w, bias=False) if edge_dim else nn.Identity() for w in widths[:-1]
        )
        self.layers = nn.ModuleList(mlp(i, mlp_hidden, o, activation) for i, o in pairwise(widths))

    def states(self, graph: Graph) -> Float[Tensor, "nodes width"]:
        """Node features after `len(layers)` rounds of messages."""
        source, target = graph.edge_index
        x = graph.x
        for eps, edge, layer in zip(self.eps, self.edges, self.layers):
            messages = x.index_select(0, source)
            if graph.edge_attr.shape[1]:
                messages = torch.relu(messages + edge(graph.edge_attr))
            x = layer((1 + eps) * x + torch.zeros_like(x).index_add(0, target, messages))
        return x
