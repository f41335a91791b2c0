"""Systems on graphs whose stationary state is known exactly, and graphs with labels.

Pore networks, graph value iteration, shortest paths, percolating networks; TU Dortmund's collection from its files.
Sources: arXiv 2106.01680, section on experiments; Morris et al., TUDataset (arXiv 2007.08663).
"""

from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.sparse.linalg import spsolve
from scipy.spatial import Delaunay, Voronoi
from torch import Tensor

from locally.checks import check_between, check_choice, check_count, check_positive
from locally.solvers.convergent_graph.graphs import Graph, as_graph
from locally.solvers.convergent_graph.maps import largest_by

EPS = torch.finfo(torch.float64).eps
SIDE = 0.1  # pores within this share of the cube's side from a face belong to it


def make_pore_network(
    n_pores: int, rng: np.random.Generator, *, coordinates: bool = False, tessellation: str = "delaunay"
) -> tuple[Graph, Float[Tensor, " pores"]]:
    """A porous medium in the unit cube and the pressures at rest: sum_j g_ij (p_i - p_j) = 0 inside, 1 in, 0 out.

    Pores are uniform points joined by their Delaunay tessellation (about 15 throats a pore), or the corners of the
    Voronoi cells of uniform grains joined along the cells' edges (at most 4). Radii are lognormal; throats are as wide
    as the smaller pore, g = r^4 / length (Hagen-Poiseuille) relative to the mean. Node features: is a boundary pore,
    boundary pressure, and the coordinates if asked for, which give much of the answer away. Edge features: radius,
    length and conductance over their means; both directions are stored.

    Args:
        n_pores: at least 10.
        tessellation: "delaunay" or "voronoi".
    """
    check_count("n_pores", n_pores, at_least=10)
    check_choice("tessellation", tessellation, ("delaunay", "voronoi"))
    while True:
        if tessellation == "delaunay":
            points = rng.random((n_pores, 3))
            pairs = delaunay_edges(points)
        else:
            points, pairs = _corners_of_cells(n_pores, rng)
        inlet, outlet = points[:, 1] <= SIDE, points[:, 1] >= 1 - SIDE
        if inlet.any() and outlet.any():
            break
    distance = np.linalg.norm(points[pairs[0]] - points[pairs[1]], axis=1)
    room = np.full(n_pores, distance.min())
    if tessellation == "voronoi":  # whose shortest throat is tiny: it bounds its own two pores, not all of them
        room[:] = np.inf
        for end in pairs:
            np.minimum.at(room, end, distance)
    radius = np.minimum(0.5 * rng.lognormal(np.log(0.01), 0.1, n_pores), 0.45 * room)
    throat = np.minimum(*radius[pairs])
    length = distance - radius[pairs].sum(0)
    conductance = throat**4 / length
    fixed = inlet | outlet
    pressure = stationary_potential(pairs, conductance, fixed, inlet.astype(float))
    nodes = np.column_stack([fixed, inlet, *(points.T if coordinates else ())])
    edges = np.column_stack([v / v.mean() for v in (throat, length, conductance)])
    return _both_ways(nodes, pairs, edges), torch.from_numpy(pressure).float()


def _corners_of_cells(n: int, rng: np.random.Generator) -> tuple[Float[ndarray, "n three"], Int[ndarray, "two pairs"]]:
    """n corners of Voronoi cells in the unit cube, all connected, and the cells' edges between them.

    As few grains as give n corners inside; what is too many is left off from one side, so that the rest stays a piece
    of the tessellation.
    """
    grains = 6 + n // 8
    while True:
        cells = Voronoi(rng.random((grains, 3)))
        faces = (np.asarray(face) for face in cells.ridge_vertices if -1 not in face)
        edges = np.concatenate([np.stack([face, np.roll(face, 1)]) for face in faces], axis=1)
        points = cells.vertices
        inside = np.flatnonzero(((points >= 0) & (points <= 1)).all(axis=1))
        kept = inside[np.argsort(points[inside, 0])][:n]
        number = np.full(len(points), -1)
        number[kept] = np.arange(len(kept))
        edges = number[edges]
        edges = edges[:, (edges >= 0).all(axis=0)]
        pairs = np.unique(np.sort(edges, axis=0), axis=1)
        joined = sp.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(len(kept), len(kept)))
        pieces = sp.csgraph.connected_components(joined, directed=False, return_labels=False)
        if len(kept) == n and pieces == 1:
            return points[kept], pairs
        if len(kept) < n:
            grains += 1 + grains // 20


def stationary_potential(
    pairs: Int[ndarray, "two pairs"],
    conductance: Float[ndarray, " pairs"],
    fixed: ndarray,
    values: Float[ndarray, " nodes"],
) -> Float[ndarray, " nodes"]:
    """Potentials with no net flow at free nodes and given values at the fixed ones; sparse elimination.

    Every free node must be connected to a fixed one.
    """
    n = fixed.size
    W = sp.coo_array((conductance, tuple(pairs)), shape=(n, n)).tocsr()
    W = W + W.T
    L = (sp.diags_array(W.sum(axis=1)) - W).tocsr()
    free = ~fixed
    potential = values.astype(float).copy()
    if free.any():
        potential[free] = spsolve(L[free][:, free].tocsc(), -L[free][:, fixed] @ values[fixed])
    return potential


def make_percolating_network(
    n_pores: int, rng: np.random.Generator, *, spans: bool | None = None, open_share: tuple[float, float] = (0.25, 0.45)
) -> tuple[Graph, bool]:
    """A planar network with blocked throats, and whether fluid can get from the inlet to the outlet.

    Delaunay edges of uniform points in the unit square, a random share of them open; near the threshold, 1/3, no local
    count tells the answer. Node features: is an inlet, is an outlet. Blocked throats are left out.

    Args:
        n_pores: at least 10.
        spans: draw until this is the answer; None takes what comes.
        open_share: range of the share of open throats.
    """
    check_count("n_pores", n_pores, at_least=10)
    low, high = open_share
    check_between("open_share[0]", low, 0, high)
    check_between("open_share[1]", high, low, 1)
    while True:
        points = rng.random((n_pores, 2))
        inlet, outlet = points[:, 1] <= SIDE, points[:, 1] >= 1 - SIDE
        pairs = delaunay_edges(points)
        pairs = pairs[:, rng.random(pairs.shape[1]) < rng.uniform(low, high)]
        joined = sp.coo_array((np.ones(pairs.shape[1]), tuple(pairs)), shape=(n_pores, n_pores))
        _, component = sp.csgraph.connected_components(joined, directed=False)
        found = bool(np.isin(component[inlet], component[outlet]).any())
        if spans is None or found == spans:
            nodes = np.column_stack([inlet, outlet])
            return _both_ways(nodes, pairs, np.empty((pairs.shape[1], 0))), found


def make_shortest_path_graph(
    n_nodes: int, rng: np.random.Generator, *, degree: float = 6.0
) -> tuple[Graph, Float[Tensor, " nodes"]]:
    """Points in the unit square, each joined to its nearest ones, and their distances to one marked point on the graph.

    Node feature: is the target. Edge feature: length over the mean length; distances are in the same unit divided by
    sqrt(n_nodes), and all nodes reach the target since the Delaunay tessellation's spanning tree is kept.

    Args:
        n_nodes: at least 10.
        degree: average number of neighbours, up to 6 (all of the tessellation).
    """
    check_count("n_nodes", n_nodes, at_least=10)
    check_between("degree", degree, 2, 6)
    points = rng.random((n_nodes, 2))
    pairs = delaunay_edges(points)
    length = np.linalg.norm(points[pairs[0]] - points[pairs[1]], axis=1)
    shape = (n_nodes, n_nodes)
    tree = sp.csgraph.minimum_spanning_tree(sp.coo_array((length, tuple(pairs)), shape=shape)).tocsr()
    kept = np.asarray(tree[tuple(pairs)] > 0).ravel() | (rng.random(length.size) < (degree - 2) / 4)
    pairs, length = pairs[:, kept], length[kept]
    target = int(rng.integers(n_nodes))
    graph = sp.coo_array((length, tuple(pairs)), shape=shape).tocsr()
    distance = sp.csgraph.dijkstra(graph, directed=False, indices=target)
    unit = length.mean()
    nodes = (np.arange(n_nodes) == target).astype(float)[:, None]
    values = torch.from_numpy(distance / (unit * np.sqrt(n_nodes))).float()
    return _both_ways(nodes, pairs, (length / unit)[:, None]), values


def make_value_iteration_graph(
    n_states: int, n_actions: int, rng: np.random.Generator, *, discount: float = 0.9
) -> tuple[Graph, Float[Tensor, " states"]]:
    """A deterministic decision process on a graph, and its optimal values V_i = max over edges j -> i of r_ji + g V_j.

    Every state draws n_actions sources among the others, with replacement; rewards are uniform in [-1, 1] and the only
    edge feature; nodes have the feature 1. Values to 1e-9.
    """
    check_count("n_states", n_states, at_least=2)
    check_count("n_actions", n_actions)
    target = np.repeat(np.arange(n_states), n_actions)
    source = rng.integers(n_states - 1, size=target.size)
    source += source >= target
    reward = rng.uniform(-1, 1, target.size)
    edges = torch.from_numpy(np.stack([source, target]))
    graph = as_graph(torch.ones(n_states, 1), edges, torch.from_numpy(reward)[:, None].float())
    # values of the rewards as stored, so that networks and targets see the same problem
    return graph, value_iteration(graph, discount=discount).float()


def value_iteration(graph: Graph, *, discount: float = 0.9, tol: float = 1e-9) -> Float[Tensor, " states"]:
    """Optimal values by the Bellman map, to `tol` or to rounding in the maximum norm; edge feature 0 is the reward.

    Raises:
        ValueError: a state has no edge that enters it, or discount or tol is out of range.
    """
    check_positive("discount", discount, below=1.0)
    check_positive("tol", tol)
    source, target = graph.edge_index
    if (torch.bincount(target, minlength=graph.num_nodes) == 0).any():
        raise ValueError("every state needs an edge that enters it")
    reward = graph.edge_attr[:, 0].double()
    values = torch.zeros(graph.num_nodes, dtype=torch.float64)
    while True:
        last = values
        offers = reward + discount * values.index_select(0, source)
        values = largest_by(offers[:, None], target, graph.num_nodes)[:, 0]
        change = (values - last).abs().max() if values.numel() else values.new_zeros(())
        # Banach: the error is at most discount / (1 - discount) times the last change
        if change * discount / (1 - discount) < tol or change <= 4 * EPS * values.abs().max():
            return values


def policy_accuracy(
    graph: Graph, predicted: Float[Tensor, " states"], optimal: Float[Tensor, " states"], *, discount: float = 0.9
) -> float:
    """Share of states whose greedy edge under the predicted values is one that is greedy under the optimal ones."""
    source, target = graph.edge_index
    reward = graph.edge_attr[:, 0].double()

    def offers(values: Tensor) -> tuple[Tensor, Tensor]:
        each = reward + discount * values.detach().double()[source]
        return each, largest_by(each[:, None], target, graph.num_nodes)[:, 0]

    (each, best), (each_true, best_true) = offers(predicted), offers(optimal)
    agree = (each == best[target]) & (each_true >= best_true[target] - 1e-6)
    right = torch.zeros(graph.num_nodes, dtype=torch.bool)
    right[target[agree]] = True
    return float(right.double().mean())


def delaunay_edges(points: Float[ndarray, "points dimension"]) -> Int[ndarray, "two pairs"]:
    """Each edge of the tessellation once, smaller end first."""
    simplices = Delaunay(points).simplices
    k = simplices.shape[1]
    ends = np.concatenate([simplices[:, [i, j]] for i in range(k) for j in range(i + 1, k)])
    return np.unique(np.sort(ends, axis=1), axis=0).T.astype(np.int64)


def _both_ways(nodes: ndarray, pairs: ndarray, edges: ndarray) -> Graph:
    return as_graph(
        torch.from_numpy(nodes.astype(np.float32)),
        torch.from_numpy(np.concatenate([pairs, pairs[::-1]], axis=1)),
        torch.from_numpy(np.concatenate([edges, edges]).astype(np.float32)),
    )


def read_tu_dataset(folder: Path) -> tuple[list[Graph], Int[ndarray, " graphs"]]:
    """Graphs and labels (0, 1, ...) from the text files of a TU dataset: NAME_A.txt and its companions.

    Node labels become one-hot features, after node attributes where there are any; without both a node's feature is
    the number of its edges over the largest such number.
    Edge labels become one-hot edge features. NAME is the folder's.

    Raises:
        ValueError: the files do not agree in their lengths or indices.
    """
    folder = Path(folder)

    def table(part: str) -> ndarray | None:
        path = folder / f"{folder.name}_{part}.txt"
        return np.loadtxt(path, delimiter=",", ndmin=2) if path.exists() else None

    def required(part: str) -> ndarray:
        found = table(part)
        if found is None:
            raise ValueError(f"{folder} must hold {folder.name}_{part}.txt")
        return found

    edges = required("A").astype(np.int64).T - 1
    owner = required("graph_indicator").astype(np.int64)[:, 0] - 1
    labels = required("graph_labels")[:, 0]
    n, graphs = owner.size, labels.size
    if (np.diff(owner) < 0).any() or not (owner >= 0).all() or not (owner < graphs).all():
        raise ValueError(f"graph_indicator must be non-decreasing in 1 .. {graphs}")
    if edges.size and (edges.min() < 0 or edges.max() >= n):
        raise ValueError(f"A must hold node numbers in 1 .. {n}, got {edges.min() + 1} to {edges.max() + 1}")
    nodes = _features(n, table("node_attributes"), table("node_labels"), "node")
    if nodes.shape[1] == 0:
        degrees = np.bincount(edges[0], minlength=n)
        nodes = (degrees / max(degrees.max(initial=0), 1))[:, None]
    links = _features(edges.shape[1], None, table("edge_labels"), "edge")
    starts = np.searchsorted(owner, np.arange(graphs + 1))
    parts = []
    order = np.argsort(owner[edges[0]], kind="stable")
    bounds = np.searchsorted(owner[edges[0]][order], np.arange(graphs + 1))
    for g in range(graphs):
        mine = order[bounds[g] : bounds[g + 1]]
        local = torch.from_numpy(edges[:, mine] - starts[g])
        x = torch.from_numpy(nodes[starts[g] : starts[g + 1]]).float()
        parts.append(as_graph(x, local, torch.from_numpy(links[mine]).float()))
    return parts, np.unique(labels, return_inverse=True)[1]


def _features(count: int, attributes: ndarray | None, labels: ndarray | None, kind: str) -> ndarray:
    columns = [np.empty((count, 0))]
    for values, one_hot in ((attributes, False), (labels, True)):
        if values is None:
            continue
        if len(values) != count:
            raise ValueError(f"{kind} files must have {count} lines, got {len(values)}")
        columns.append((values[:, :1] == np.unique(values[:, 0])).astype(float) if one_hot else values)
    return np.concatenate(columns, axis=1)
