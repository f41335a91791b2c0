"""Training, and scikit-learn's interface: lists of graphs in, values per node or labels per graph out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from locally.checks import check_count, check_positive
from locally.solvers.convergent_graph.graphs import Graph, as_graph, disjoint_union
from locally.solvers.convergent_graph.networks import CGS

Sample = Callable[[int], tuple[Graph, Tensor]]


def train(
    model: nn.Module,
    sample: Sample,
    *,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = nn.functional.mse_loss,
    lr: float = 1e-3,
    cycle: int = 32,
    callback: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Adam under a cosine schedule that restarts every `cycle` steps, as in the paper; returns the losses.

    Args:
        model: takes a `Graph`.
        sample: the graphs and targets of a step.
        steps: a multiple of the cycle ends where the rate is low.
        callback: sees every step, `callback(step, loss)`.

    Raises:
        ValueError: steps, lr or cycle is out of range.
        FloatingPointError: the loss is no longer finite.
    """
    check_count("steps", steps)
    check_count("cycle", cycle)
    check_positive("lr", lr)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=cycle)
    losses = []
    model.train()
    for step in range(steps):
        graph, target = sample(step)
        optimizer.zero_grad()
        value = loss(model(graph), target)
        losses.append(float(value.detach()))
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss became {losses[-1]} in step {step}: lower lr")
        value.backward()
        optimizer.step()
        schedule.step()
        if callback is not None:
            callback(step, losses[-1])
    model.eval()
    return losses


class _CGSEstimator(BaseEstimator):
    def __init__(
        self,
        heads: int = 16,
        gamma: float = 0.5,
        hidden: int = 32,
        num_layers: int = 1,
        steps: int = 320,
        batch_size: int = 32,
        lr: float = 1e-3,
        random_state: int | None = None,
        warm_start: bool = False,
    ):
        self.heads = heads
        self.gamma = gamma
        self.hidden = hidden
        self.num_layers = num_layers
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.random_state = random_state
        self.warm_start = warm_start

    def _fit(
        self,
        graphs: list[Graph],
        targets: list[Tensor],
        out_dim: int,
        task: str,
        loss: Any,
        callback: Callable[[int, float], None] | None,
    ) -> None:
        check_count("batch_size", self.batch_size)
        rng = np.random.default_rng(self.random_state)
        if not (self.warm_start and hasattr(self, "model_")):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(rng.integers(2**31)))
                self.model_ = self._network(graphs[0], out_dim, task)
            self.losses_: list[float] = []

        def sample(step: int) -> tuple[Graph, Tensor]:
            chosen = rng.permutation(len(graphs))[: self.batch_size]
            return disjoint_union([graphs[i] for i in chosen]), torch.cat([targets[i] for i in chosen])

        def keep(step: int, value: float) -> None:
            self.losses_.append(value)  # as it goes, so that an interrupted fit leaves a model and its losses
            if callback is not None:
                callback(step, value)

        train(self.model_, sample, steps=self.steps, lr=self.lr, loss=loss, callback=keep)

    def _network(self, like: Graph, out_dim: int, task: str) -> CGS:
        model = CGS(
            like.x.shape[1],
            like.edge_attr.shape[1],
            out_dim,
            heads=self.heads,
            gamma=self.gamma,
            hidden=self.hidden,
            num_layers=self.num_layers,
            task=task,
        )
        return model.to(dtype=like.x.dtype, device=like.x.device)

    def _outputs(self, graphs: Sequence[Any]) -> tuple[Graph, Tensor]:
        check_is_fitted(self)
        union = disjoint_union(graphs)
        with torch.no_grad():
            return union, self.model_(union)


class CGSRegressor(RegressorMixin, _CGSEstimator):
    """Values at the nodes of graphs, by a convergent graph solver.

    Parameters
    ----------
    heads, gamma, hidden, num_layers : see `CGS`
    steps, batch_size, lr : steps of Adam, graphs in each, learning rate (see `train`)
    random_state : seed of the initial weights and of the batches
    warm_start : let a further `fit` go on from the weights that the last one left, even if it was interrupted

    Attributes
    ----------
    model_ : CGS
    losses_ : list of float

    References
    ----------
    Park, Choo and Park, Convergent Graph Solvers, ICLR 2022, arXiv 2106.01680.

    Examples
    --------
    >>> edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    >>> graphs = [(torch.tensor([[1.0], [0.0], [v]]), edges) for v in (0.0, 0.5, 1.0)]
    >>> values = [np.array([0.5, 0.0, v / 2]) for v in (0.0, 0.5, 1.0)]
    >>> model = CGSRegressor(steps=64, random_state=0).fit(graphs, values)
    >>> [p.shape for p in model.predict(graphs)]
    [(3,), (3,), (3,)]
    """

    def fit(
        self, graphs: Sequence[Any], y: Sequence[Any], callback: Callable[[int, float], None] | None = None
    ) -> "CGSRegressor":
        """`graphs`: data objects, or tuples (x, edge_index[, edge_attr]); `y`: for each graph one value per node.

        `callback(step, loss)` sees every step.

        Raises:
            ValueError: numbers of graphs, nodes or values do not agree.
        """
        parts = _graphs(graphs, len(y))
        targets = []
        for i, (graph, values) in enumerate(zip(parts, y, strict=True)):
            target = torch.as_tensor(values, dtype=graph.x.dtype, device=graph.x.device)
            if tuple(target.shape) != (graph.num_nodes,):
                raise ValueError(f"y[{i}] must have one value for each of {graph.num_nodes} nodes, got {target.shape}")
            targets.append(target)
        self._fit(parts, targets, 1, "node", lambda out, y: nn.functional.mse_loss(out[:, 0], y), callback)
        return self

    def predict(self, graphs: Sequence[Any]) -> list[np.ndarray]:
        """One array of values per graph."""
        union, outputs = self._outputs(_graphs(graphs))
        sizes = torch.bincount(union.batch, minlength=union.num_graphs).tolist()
        return [part[:, 0].cpu().numpy() for part in outputs.split(sizes)]

    def score(self, graphs: Sequence[Any], y: Sequence[Any], sample_weight: Any = None) -> float:
        """R^2 over the nodes of all graphs."""
        from sklearn.metrics import r2_score

        return float(r2_score(np.concatenate(y), np.concatenate(self.predict(graphs)), sample_weight=sample_weight))


class CGSClassifier(ClassifierMixin, _CGSEstimator):
    """Labels of graphs, by a convergent graph solver with a sum over nodes. Parameters as for `CGSRegressor`.

    Attributes
    ----------
    classes_ : ndarray
    model_ : CGS
    losses_ : list of float

    Examples
    --------
    >>> path, loop = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0, 1, 2], [1, 2, 0]])
    >>> graphs = [(torch.ones(2, 1), path), (torch.ones(3, 1), loop)]
    >>> CGSClassifier(steps=96, lr=0.01, random_state=0).fit(graphs, ["path", "loop"]).predict(graphs).tolist()
    ['path', 'loop']
    """

    def fit(
        self, graphs: Sequence[Any], y: Sequence[Any], callback: Callable[[int, float], None] | None = None
    ) -> "CGSClassifier":
        """`graphs`: data objects, or tuples (x, edge_index[, edge_attr]); `y`: a label for each.

        `callback(step, loss)` sees every step.

        Raises:
            ValueError: numbers of graphs and labels do not agree, or there is one class only.
        """
        parts = _graphs(graphs, len(y))
        self.classes_, codes = np.unique(np.asarray(y), return_inverse=True)
        if self.classes_.size < 2:
            raise ValueError(f"y must hold at least two classes, got {self.classes_.tolist()}")
        targets = [torch.tensor([c], device=parts[0].x.device) for c in codes.tolist()]
        self._fit(parts, targets, self.classes_.size, "graph", nn.functional.cross_entropy, callback)
        return self

    def predict_proba(self, graphs: Sequence[Any]) -> np.ndarray:
        """One row of class probabilities per graph."""
        return self._outputs(_graphs(graphs))[1].softmax(1).cpu().numpy()

    def predict(self, graphs: Sequence[Any]) -> np.ndarray:
        """The likeliest class of each graph, from `classes_`."""
        return self.classes_[self.predict_proba(graphs).argmax(1)]


def _graphs(graphs: Sequence[Any], expected: int | None = None) -> list[Graph]:
    check_count("number of graphs", len(graphs))
    if expected is not None and expected != len(graphs):
        raise ValueError(f"graphs and y must have the same length, got {len(graphs)} and {expected}")
    return [as_graph(*g) if isinstance(g, tuple) else as_graph(g) for g in graphs]
