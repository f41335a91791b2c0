"""What a network really needs: features taken out of a cut, edges out of a section, until it stops working.

Source: arXiv 2405.10928, the sections on ablations; the search and what is kept for nothing follow its experiments.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from locally.checks import check_choice, check_count, check_nonnegative
from locally.tangent.interaction_basis.basis import LocalInteractionBasis
from locally.tangent.interaction_basis.graph import InteractionGraph

Score = Callable[[Tensor, Tensor], float]


class Metric(StrEnum):
    """What an ablation curve measures; chosen by the caller."""

    ACCURACY = "accuracy"  # of the largest output, more is better
    CROSS_ENTROPY = "cross-entropy"  # in nats, less is better


@dataclass(frozen=True)
class Required:
    """The fewest that a bisection found to be enough.

    Attributes:
        kept: nodes (with the constant) or edges (without those from the constant) that remain.
        score: of the network with only those.
        baseline: of the whole network.
        tried: (kept, score) of every step; the score need not be monotone, so fewer may be enough now and then.
    """

    kept: int
    score: float
    baseline: float
    tried: tuple[tuple[int, float], ...]


class Ablation:
    """Ablate the features and interactions of a basis on labelled data.

    Args:
        basis: fitted; its folded network runs in `dtype`.
        x, y: inputs and labels, best not those of the fit.
        metric: "accuracy" or "cross-entropy" of the output; outputs at many positions count at the last.
        dtype: default that of the basis; float32 is twice as fast.
        batch_size: examples at once; what does not fit into the cache takes longer.

    Attributes:
        baseline: score without ablation.

    Raises:
        ValueError: x and y do not belong together, an argument is out of range.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    >>> lib = LocalInteractionBasis(["0", "2"]).fit(net, x)
    >>> ablation = Ablation(lib, x, net(x).argmax(1))
    >>> ablation.baseline, ablation.keep_nodes("2", 3)  # both outputs are within two features and the constant
    (1.0, 1.0)
    """

    def __init__(
        self,
        basis: LocalInteractionBasis,
        x: Tensor,
        y: Tensor,
        metric: Metric | str = "accuracy",
        *,
        dtype: torch.dtype | None = None,
        batch_size: int = 1024,
    ) -> None:
        basis._fitted()
        basis._check_data(x)
        check_choice("metric", metric, tuple(Metric))
        check_count("batch_size", batch_size)
        if y.ndim != 1 or len(y) != len(x) or y.is_floating_point():
            raise ValueError(f"y must be {len(x)} integer labels, got {y.dtype} of shape {tuple(y.shape)}")
        self.basis, self.y, self.metric, self.batch_size = basis, y, Metric(metric), batch_size
        dtype = dtype or basis.dtype
        self.chain = basis.chain_ if dtype == basis.dtype else deepcopy(basis.chain_).to(dtype)
        self.to = lambda matrix: matrix.to(dtype)
        with torch.no_grad():
            f = self._in_batches(self.chain.start, x)
            self.activations = [f]
            for section in self.chain.sections:
                f = self._in_batches(section, f)
                self.activations.append(f)
            self.baseline = self._score(f, len(self.chain.sections))

    def keep_nodes(self, layer: str, kept: int) -> float:
        """Score when the activations at a cut are projected on its first `kept` features, the constant among them.

        With all features nothing is done, not even the projection on them.
        """
        l, basis = self.basis._at(layer)
        check_count("kept", kept, at_least=0)
        if kept >= basis.features:
            return self.baseline
        with torch.no_grad():
            projection = self.to(basis.C[:, :kept]) @ self.to(basis.C_pinv[:kept])
            return self._score(self.activations[l] @ projection, l)

    def keep_edges(self, graph: InteractionGraph, layer: str, kept: int | Bool[Tensor, "there here"]) -> float:
        """Score when each feature of the next cut sees only those of this one to which it keeps an edge.

        Args:
            graph: of the same basis.
            layer: where the edges begin.
            kept: how many of the largest, or a mask. Edges from the constant are free. With all edges nothing is done.
        """
        l, here = self.basis._at(layer)
        mask = graph.mask(layer, kept) if isinstance(kept, int) else kept
        there = self.basis.bases_[self.chain.cuts[l + 1].name]
        if mask.shape != (there.features, here.features):
            expected = (there.features, here.features)
            raise ValueError(f"kept must be a mask of shape {expected} at {layer}, got {tuple(mask.shape)}")
        if mask.all():
            return self.baseline
        with torch.no_grad():
            features = self._masked_section(l, self.activations[l] @ self.to(here.C), mask)
            return self._score(features @ self.to(there.C_pinv), l + 1)

    def node_curve(self, layer: str, kept: Sequence[int]) -> list[float]:
        """Scores for several numbers of features kept."""
        return [self.keep_nodes(layer, k) for k in kept]

    def edge_curve(self, graph: InteractionGraph, layer: str, kept: Sequence[int]) -> list[float]:
        """Scores for several numbers of edges kept."""
        return [self.keep_edges(graph, layer, k) for k in kept]

    def nodes_required(self, layer: str, delta: float = 0.001) -> Required:
        """Bisect for the fewest first features with which the score stays within `delta` of the baseline.

        Raises:
            ValueError: delta is negative, the layer unknown.
        """
        _, basis = self.basis._at(layer)
        return self._bisect(lambda k: self.keep_nodes(layer, k), basis.features, delta)

    def edges_required(self, graph: InteractionGraph, layer: str, delta: float = 0.001) -> Required:
        """Bisect for the fewest largest edges to the next cut with which the score stays within `delta`.

        Starts from all pairs of coordinates rather than of features, so that bases of different size are tried at the
        same numbers.
        """
        l, _ = self.basis._at(layer)
        pairs = self.chain.cuts[l].width * self.chain.cuts[l + 1].width
        return self._bisect(lambda k: self.keep_edges(graph, layer, k), pairs, delta)

    def _bisect(self, score: Callable[[int], float], total: int, delta: float) -> Required:
        check_nonnegative("delta", delta)
        sign = -1 if self.metric is Metric.CROSS_ENTROPY else 1
        goal = sign * self.baseline - delta
        removable, too_many = 0, total  # removed: enough remains, too little remains
        best, tried = self.baseline, []
        while too_many - removable > 1:
            removed = (removable + too_many) // 2
            value = score(total - removed)
            tried.append((total - removed, value))
            if sign * value >= goal:
                removable, best = removed, value
            else:
                too_many = removed
        return Required(total - removable, best, self.baseline, tuple(tried))

    def _masked_section(
        self, l: int, features: Float[Tensor, "n ... here"], mask: Bool[Tensor, "there here"]
    ) -> Float[Tensor, "n ... there"]:
        """Features of the next cut, those that see the same features computed together."""
        here = self.basis.bases_[self.chain.cuts[l].name]
        C_next, C_pinv = self.basis._next(l + 1), self.to(here.C_pinv)
        C_next = None if C_next is None else self.to(C_next)
        section = self.chain.sections[l]
        width = self.chain.cuts[l].width
        factored = section.factor(features, width)  # type: ignore[operator]
        attending = section.attend(features, width)  # type: ignore[operator]
        compute: Callable[[Tensor, Tensor, Tensor], Tensor]
        if factored is not None:
            A, B = C_pinv @ factored.A, factored.B if C_next is None else factored.B @ C_next
            if factored.activation is None:  # every edge is a number
                return features @ ((A @ B) * mask.T)
            compute = lambda part, seen, rows: factored.activation(part @ A[seen]) @ B[:, rows]
        elif attending is not None:
            turned = attending.turned(C_pinv, C_next)
            compute = lambda part, seen, rows: turned.part(seen, rows)(part)
        else:
            last = lambda f, rows: f[..., rows] if C_next is None else f @ C_next[:, rows]
            compute = lambda part, seen, rows: last(section(part @ C_pinv[seen]), rows)
        patterns, which = mask.unique(dim=0, return_inverse=True)
        columns: dict[int, Tensor] = {}
        for p, pattern in enumerate(patterns):
            rows = (which == p).nonzero()[:, 0]
            found = self._in_batches(lambda part: compute(part, pattern, rows), features[..., pattern])  # noqa: B023
            columns |= dict(zip(rows.tolist(), found.unbind(-1)))
        return torch.stack([columns[i] for i in range(len(mask))], -1)

    def _score(self, f: Tensor, since: int) -> float:
        outputs = self._in_batches(lambda part: self.chain.finish(part, since), f)
        outputs = outputs[:, -1] if outputs.ndim == 3 else outputs
        if self.metric is Metric.CROSS_ENTROPY:
            return float(F.cross_entropy(outputs, self.y))
        return float((outputs.argmax(-1) == self.y).double().mean())

    def _in_batches(self, work: Callable[[Tensor], Tensor], f: Tensor) -> Tensor:
        return torch.cat([work(part) for part in f.split(self.batch_size)])
