"""The interaction graph: features as nodes, what they do to features of the next cut as edges, clusters as modules."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from locally.checks import check_choice, check_count, check_nonnegative, check_positive

if TYPE_CHECKING:
    import networkx

GREY = "#7c8591"


@dataclass(frozen=True)
class Modules:
    """Clusters of features over all cuts, the largest first, and the modularity Q of the partition."""

    clusters: tuple[frozenset[tuple[str, int]], ...]  # of (cut, feature)
    modularity: float


@dataclass(frozen=True)
class InteractionGraph:
    """Edges between the features of neighbouring cuts.

    Attributes:
        layers: names of the cuts.
        edges: for each pair of neighbouring cuts (features there, features here).
        constants: whether feature 0 of a cut is the constant.

    >>> edges = torch.tensor([[0.0, 4.0, 0.0], [1.0, 0.0, 2.0]])
    >>> graph = InteractionGraph(("a", "b"), (edges,), (True, False))
    >>> graph.mask("a", 1)
    tensor([[ True,  True, False],
            [ True, False, False]])
    >>> sorted(graph.to_networkx().edges(data="weight"))
    [(('a', 1), ('b', 0), 4.0), (('a', 2), ('b', 1), 2.0)]
    >>> len(graph.modules().clusters)
    2
    """

    layers: tuple[str, ...]
    edges: tuple[Float[Tensor, "_ _"], ...]
    constants: tuple[bool, ...]

    def between(self, layer: str) -> Float[Tensor, "there here"]:
        """Edges from a cut to the next."""
        return self.edges[self._index(layer)]

    def mask(self, layer: str, kept: int) -> Bool[Tensor, "there here"]:
        """The `kept` largest edges from a cut to the next; those from the constant are free and always kept."""
        check_count("kept", kept, at_least=0)
        E, free = self.between(layer), int(self.constants[self._index(layer)])
        inner = E[:, free:]
        chosen = torch.zeros(inner.numel(), dtype=torch.bool, device=E.device)
        chosen[inner.flatten().topk(min(kept, inner.numel())).indices] = True
        return torch.cat([torch.ones_like(E[:, :free], dtype=torch.bool), chosen.view(inner.shape)], 1)

    def pruned(self, kept: Sequence[int]) -> "InteractionGraph":
        """Only so many edges of each pair of cuts, the largest; from the constant all stay.

        Raises:
            ValueError: not one number for each pair of cuts, or one below 0.
        """
        if len(kept) != len(self.edges):
            raise ValueError(f"kept must have {len(self.edges)} entries, got {len(kept)}")
        edges = (E.where(self.mask(l, n), 0) for l, E, n in zip(self.layers, self.edges, kept))
        return replace(self, edges=tuple(edges))

    def participation(self) -> list[float]:
        """(sum E)^2 / sum E^2 for each pair of cuts without constants: how many equal edges would be as spread out."""
        return [float(E.sum() ** 2 / E.square().sum()) if E.any() else 0.0 for E in self._inner()]

    def strong_fraction(self, share: float = 0.01) -> list[float]:
        """Fraction of the edges, without constants, that exceed `share` of the largest."""
        check_positive("share", share, below=1)
        return [float(E.gt(share * E.max()).double().mean()) if E.numel() else 0.0 for E in self._inner()]

    def to_networkx(self, *, above: float = 0.0) -> "networkx.DiGraph":
        """Nodes (cut, feature) without constants, edges with `weight` > above.

        Needs networkx, which comes with torch.
        """
        check_nonnegative("above", above)
        import networkx

        graph = networkx.DiGraph()
        for layer, count, constant in zip(self.layers, self._counts(), self.constants):
            graph.add_nodes_from(((layer, i) for i in range(int(constant), count)), layer=layer)
        for l, E in enumerate(self.edges):
            skip_here, skip_there = int(self.constants[l]), int(self.constants[l + 1])
            there, here = (E[skip_there:, skip_here:] > above).nonzero(as_tuple=True)
            weights = E[skip_there:, skip_here:][there, here].tolist()
            for i, j, weight in zip(there.tolist(), here.tolist(), weights):
                graph.add_edge((self.layers[l], j + skip_here), (self.layers[l + 1], i + skip_there), weight=weight)
        return graph

    def write_graphml(self, path: Path | str, *, above: float = 0.0) -> None:
        """Write `to_networkx` as GraphML, nodes called "cut:feature"."""
        import networkx

        graph = self.to_networkx(above=above)
        names = {node: f"{node[0]}:{node[1]}" for node in graph}
        networkx.write_graphml(networkx.relabel_nodes(graph, names), str(path))

    def modules(
        self,
        *,
        floors: Sequence[float] | None = None,
        resolution: float = 1.0,
        seed: int = 0,
        algorithm: str = "auto",
    ) -> Modules:
        """Cluster features by their interactions.

        Args:
            floors: for each pair of cuts an edge strength eps; edges weigh log10(E / eps), and nothing below eps. The
                paper takes the weakest edge that an ablation must keep. Default: edges weigh E.
            resolution: above 0; more gives smaller clusters.
            seed: of the algorithm.
            algorithm: "louvain" (networkx), "leiden" (needs igraph), or "auto" for Leiden where igraph is installed.

        Raises:
            ValueError: an argument is out of range. ImportError: "leiden" without igraph.
        """
        check_positive("resolution", resolution)
        check_choice("algorithm", algorithm, ("auto", "louvain", "leiden"))
        import networkx

        graph = replace(self, edges=tuple(self._logarithmic(floors))).to_networkx().to_undirected()
        if graph.number_of_edges() == 0:
            return Modules(tuple(frozenset([node]) for node in graph), math.nan)
        clusters = leiden(graph, resolution, seed) if algorithm != "louvain" else None
        if clusters is None:
            if algorithm == "leiden":
                raise ImportError('algorithm="leiden" needs the package igraph')
            clusters = networkx.community.louvain_communities(graph, resolution=resolution, seed=seed)
        quality = networkx.community.modularity(graph, clusters, resolution=resolution)
        ordered = sorted((frozenset(c) for c in clusters), key=lambda c: (-len(c), sorted(c)))
        return Modules(tuple(ordered), float(quality))

    def draw(self, axes: Any, *, edges: int = 400, modules: Modules | None = None, colours: Sequence[str] = ()) -> None:
        """Draw on Matplotlib axes: one column a cut, feature 0 on top, the strongest edges of each pair by width.

        Args:
            edges: at most so many for each pair of cuts.
            modules: colour nodes by cluster, the ten largest.
            colours: of the clusters; default Matplotlib's.
        """
        check_count("edges", edges)
        from matplotlib.collections import LineCollection
        from matplotlib.colors import to_rgba

        colours = list(colours) or [f"C{i}" for i in range(10)]
        counts = self._counts()
        tallest = max(counts)
        height = lambda l, i: -(i + (tallest - counts[l]) / 2)
        inside = {node: i for i, c in enumerate(modules.clusters[:10]) for node in c} if modules else {}
        tint = lambda node: colours[inside[node] % len(colours)] if node in inside else GREY
        for l, E in enumerate(self.edges):
            strong = E * self.mask(self.layers[l], edges)
            strong[:, : int(self.constants[l])] = 0
            top = float(strong.max()) or 1.0
            lines, tints, widths = [], [], []
            for i, j in strong.nonzero().tolist():
                here, there = (self.layers[l], j), (self.layers[l + 1], i)
                share = (max(float(strong[i, j]), 0.0) / top) ** 0.5
                same = modules is None or (here in inside and inside[here] == inside.get(there))
                lines.append([(l, height(l, j)), (l + 1, height(l + 1, i))])
                tints.append(to_rgba(tint(here) if same else GREY, 0.12 + 0.75 * share))
                widths.append(0.2 + 2.5 * share)
            axes.add_collection(LineCollection(lines, colors=tints, linewidths=widths, zorder=1, capstyle="round"))
        size = 26 if tallest <= 40 else 9
        for l, (layer, count) in enumerate(zip(self.layers, counts)):
            nodes = range(int(self.constants[l]), count)
            places = [height(l, i) for i in nodes]
            axes.scatter([l] * len(nodes), places, s=size, color=[tint((layer, i)) for i in nodes], zorder=2, lw=0)
        axes.set_xticks(range(len(self.layers)), self.layers)
        axes.set_yticks([])
        axes.set_xlim(-0.2, len(self.layers) - 0.8)
        axes.grid(False)
        for side in ("left", "bottom"):
            axes.spines[side].set_visible(False)

    def _logarithmic(self, floors: Sequence[float] | None) -> list[Tensor]:
        if floors is None:
            return [E.clamp(min=0) for E in self.edges]
        if len(floors) != len(self.edges):
            raise ValueError(f"floors must have {len(self.edges)} entries, got {len(floors)}")
        for floor in floors:
            check_positive("floors", floor)
        return [(E.clamp(min=0) / floor).log10().clamp(min=0) for E, floor in zip(self.edges, floors)]

    def _inner(self) -> list[Tensor]:
        return [E[int(b) :, int(a) :] for E, a, b in zip(self.edges, self.constants, self.constants[1:])]

    def _counts(self) -> list[int]:
        return [self.edges[0].shape[1], *(len(E) for E in self.edges)]

    def _index(self, layer: str) -> int:
        if layer not in self.layers[:-1]:
            raise ValueError(f"layer must be one of {', '.join(self.layers[:-1])}, got {layer!r}")
        return self.layers.index(layer)


def leiden(graph: "networkx.Graph", resolution: float, seed: int) -> list[set] | None:
    """Communities by igraph's Leiden algorithm, None where igraph is not installed."""
    try:
        import igraph
    except ImportError:
        return None
    import random

    nodes = list(graph)
    index = {node: i for i, node in enumerate(nodes)}
    twin = igraph.Graph(len(nodes), [(index[a], index[b]) for a, b in graph.edges])
    weights = [weight for _, _, weight in graph.edges(data="weight")]
    igraph.set_random_number_generator(random.Random(seed))
    found = twin.community_leiden("modularity", weights=weights, resolution=resolution, n_iterations=10)
    return [{nodes[i] for i in members} for members in found]
