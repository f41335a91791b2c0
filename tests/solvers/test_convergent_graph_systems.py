"""The systems: their stationary states by other means, the measures, the reader of TU files."""

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.solvers.convergent_graph import (
    as_graph,
    make_percolating_network,
    make_pore_network,
    make_shortest_path_graph,
    make_value_iteration_graph,
    policy_accuracy,
    read_tu_dataset,
    value_iteration,
)

seeds = st.integers(0, 2**32 - 1)


def as_networkx(graph, weight=None):
    web = nx.MultiDiGraph()
    web.add_nodes_from(range(graph.num_nodes))
    lengths = graph.edge_attr[:, weight].tolist() if weight is not None else [1.0] * graph.edge_index.shape[1]
    web.add_weighted_edges_from(zip(*graph.edge_index.tolist(), lengths))
    return web


@settings(max_examples=10)
@given(seeds, st.integers(10, 120), st.sampled_from(["delaunay", "voronoi"]))
def test_no_pore_but_the_boundary_ones_gains_or_loses_fluid(seed, n, tessellation):
    graph, pressure = make_pore_network(n, np.random.default_rng(seed), tessellation=tessellation)
    fixed, inlet = graph.x[:, 0].bool(), graph.x[:, 1].bool()
    assert inlet.any()
    assert (fixed & ~inlet).any()
    p = pressure.double()
    source, target = graph.edge_index
    flow = graph.edge_attr[:, 2].double() * (p[source] - p[target])
    net = torch.zeros(n, dtype=torch.float64).index_add(0, source, flow)
    through = torch.zeros(n, dtype=torch.float64).index_add(0, source, flow.abs())
    assert (net[~fixed].abs() <= 1e-4 * through[~fixed] + 1e-6).all()
    assert (p[inlet] == 1).all()
    assert (p[fixed & ~inlet] == 0).all()
    assert p.min() >= -1e-6
    assert p.max() <= 1 + 1e-6  # maximum principle
    assert net[inlet].sum() == pytest.approx(-float(net[fixed & ~inlet].sum()), rel=1e-3)


@pytest.mark.parametrize("tessellation", ["delaunay", "voronoi"])
def test_throats_are_as_wide_as_the_smaller_pore_and_conduct_by_hagen_and_poiseuille(tessellation):
    rng = np.random.default_rng(1)
    graph, _ = make_pore_network(60, rng, coordinates=True, tessellation=tessellation)
    assert graph.x.shape[1] == 5
    radius, length, conductance = graph.edge_attr.double().T
    ratio = conductance * length / radius**4
    torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
    assert (length > 0).all()
    torch.testing.assert_close(graph.edge_attr.mean(0), torch.ones(3), rtol=1e-5, atol=0)
    half = graph.edge_index.shape[1] // 2
    assert torch.equal(graph.edge_index[:, :half], graph.edge_index[:, half:].flip(0))


@settings(max_examples=10)
@given(seeds, st.integers(10, 150))
def test_corners_of_cells_have_four_throats_at_most_and_hang_together(seed, n):
    graph, _ = make_pore_network(n, np.random.default_rng(seed), tessellation="voronoi", coordinates=True)
    web = nx.Graph(graph.edge_index.T.tolist())
    assert len(web) == n
    assert nx.is_connected(web)
    assert max(degree for _, degree in web.degree) <= 4
    assert graph.x[:, 2:].min() >= 0
    assert graph.x[:, 2:].max() <= 1


@settings(max_examples=10)
@given(seeds, st.integers(2, 40), st.integers(1, 8), st.floats(0.1, 0.99))
def test_optimal_values_solve_bellmans_equation(seed, n, actions, discount):
    graph, values = make_value_iteration_graph(n, actions, np.random.default_rng(seed), discount=discount)
    assert graph.edge_index.shape == (2, n * actions)
    assert (torch.bincount(graph.edge_index[1], minlength=n) == actions).all()
    assert (graph.edge_index[0] != graph.edge_index[1]).all()
    V = value_iteration(graph, discount=discount)
    torch.testing.assert_close(V.float(), values)
    offers = graph.edge_attr[:, 0].double() + discount * V[graph.edge_index[0]]
    best = torch.stack([offers[graph.edge_index[1] == v].max() for v in range(n)])
    torch.testing.assert_close(best, V, rtol=0, atol=1e-8)


def test_value_iteration_ends_where_rounding_does_and_refuses_dead_ends():
    graph, _ = make_value_iteration_graph(10, 3, np.random.default_rng(0))
    torch.testing.assert_close(
        value_iteration(graph, tol=1e-300), value_iteration(graph, tol=1e-13), rtol=0, atol=1e-12
    )
    dead_end = as_graph(torch.ones(2, 1), torch.tensor([[0], [1]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="every state needs an edge"):
        value_iteration(dead_end)
    for bad in ({"discount": 1.0}, {"tol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            value_iteration(graph, **bad)


def test_policy_accuracy_counts_states_whose_greedy_edge_is_optimal():
    edges = torch.tensor([[1, 2, 0, 2, 0, 1], [0, 0, 1, 1, 2, 2]])
    graph = as_graph(torch.ones(3, 1), edges, torch.tensor([1.0, 0.0, 1.0, 0.0, 0.5, 0.4])[:, None])
    V = value_iteration(graph)
    assert policy_accuracy(graph, V, V) == 1.0
    assert policy_accuracy(graph, V + 7, V) == 1.0  # a common level changes no choice
    wrong = V + torch.tensor([0.0, 5.0, 0.0], dtype=torch.float64)  # state 2 now goes for state 1
    assert policy_accuracy(graph, wrong, V) == pytest.approx(2 / 3)


def test_policies_of_equal_worth_both_count():
    edges = torch.tensor([[1, 2, 0, 0], [0, 0, 1, 2]])
    graph = as_graph(torch.ones(3, 1), edges, torch.ones(4, 1))
    V = value_iteration(graph)
    for nudge in (torch.tensor([0, 1e-3, 0]), torch.tensor([0, 0, 1e-3])):
        assert policy_accuracy(graph, V + nudge, V) == 1.0


@settings(max_examples=10)
@given(seeds, st.integers(10, 80), st.floats(2, 6))
def test_shortest_paths_agree_with_networkx(seed, n, degree):
    graph, distance = make_shortest_path_graph(n, np.random.default_rng(seed), degree=degree)
    target = int(graph.x[:, 0].argmax())
    assert graph.x.sum() == 1
    lengths = nx.single_source_dijkstra_path_length(as_networkx(graph, weight=0), target)
    expected = torch.tensor([lengths[i] for i in range(n)]) / n**0.5
    torch.testing.assert_close(distance, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@given(seeds, st.integers(20, 80), st.booleans())
def test_percolation_is_a_path_from_inlet_to_outlet(seed, n, wanted):
    graph, spans = make_percolating_network(n, np.random.default_rng(seed), spans=wanted)
    assert spans == wanted
    web = as_networkx(graph)
    inlets, outlets = (graph.x[:, k].nonzero()[:, 0].tolist() for k in (0, 1))
    reached = set().union(*(nx.descendants(web, i) | {i} for i in inlets)) if inlets else set()
    assert bool(reached & set(outlets)) == wanted


def test_the_same_generator_draws_the_same_graph():
    for make in (
        lambda rng: make_pore_network(20, rng),
        lambda rng: make_percolating_network(20, rng),
        lambda rng: make_shortest_path_graph(20, rng),
        lambda rng: make_value_iteration_graph(20, 3, rng),
    ):
        (a, y), (b, z) = make(np.random.default_rng(5)), make(np.random.default_rng(5))
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.edge_index, b.edge_index)
        assert torch.equal(a.edge_attr, b.edge_attr)
        assert torch.equal(torch.as_tensor(y), torch.as_tensor(z))


def test_generators_refuse_sizes_out_of_range():
    rng = np.random.default_rng(0)
    for make, name in (
        (lambda: make_pore_network(5, rng), "n_pores"),
        (lambda: make_pore_network(20, rng, tessellation="square"), "tessellation"),
        (lambda: make_percolating_network(5, rng), "n_pores"),
        (lambda: make_percolating_network(20, rng, open_share=(0.5, 0.4)), "open_share"),
        (lambda: make_shortest_path_graph(5, rng), "n_nodes"),
        (lambda: make_shortest_path_graph(20, rng, degree=7.0), "degree"),
        (lambda: make_value_iteration_graph(1, 3, rng), "n_states"),
        (lambda: make_value_iteration_graph(5, 0, rng), "n_actions"),
    ):
        with pytest.raises(ValueError, match=name):
            make()


# TU files


def write_tu(folder, *, node_labels=True, edges="1, 2\n2, 1\n3, 4\n4, 3\n4, 5\n5, 4\n", graphs="1\n1\n2\n2\n2\n"):
    folder.mkdir(exist_ok=True)
    name = folder.name
    (folder / f"{name}_A.txt").write_text(edges)
    (folder / f"{name}_graph_indicator.txt").write_text(graphs)
    (folder / f"{name}_graph_labels.txt").write_text("-1\n1\n")
    if node_labels:
        (folder / f"{name}_node_labels.txt").write_text("0\n3\n3\n0\n7\n")
        (folder / f"{name}_edge_labels.txt").write_text("1\n1\n0\n0\n1\n1\n")
    return folder


def test_tu_files(tmp_path):
    (first, second), labels = read_tu_dataset(write_tu(tmp_path / "TOY"))
    assert labels.tolist() == [0, 1]
    assert first.x.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert second.x.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]
    assert second.edge_index.tolist() == [[0, 1, 1, 2], [1, 0, 2, 1]]
    assert first.edge_attr.tolist() == [[0, 1], [0, 1]]
    (tmp_path / "TOY" / "TOY_node_attributes.txt").write_text("0.5\n1\n1.5\n2\n2.5\n")
    (first, _), _ = read_tu_dataset(tmp_path / "TOY")
    assert first.x.tolist() == [[0.5, 1, 0, 0], [1, 0, 1, 0]]


def test_tu_files_without_labels_give_degrees(tmp_path):
    (first, second), _ = read_tu_dataset(write_tu(tmp_path / "BARE", node_labels=False))
    assert first.x.tolist() == [[0.5], [0.5]]
    assert second.x.tolist() == [[0.5], [1.0], [0.5]]
    assert first.edge_attr.shape == (2, 0)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"graphs": "1\n2\n1\n2\n2\n"}, "graph_indicator must be non-decreasing"),
        ({"graphs": "1\n1\n2\n2\n3\n"}, "graph_indicator must be non-decreasing in 1 .. 2"),
        ({"edges": "1, 6\n"}, "A must hold node numbers in 1 .. 5"),
        ({"graphs": "1\n1\n2\n2\n"}, "A must hold node numbers in 1 .. 4"),
        ({"edges": "1, 2\n"}, "edge files must have 1 lines"),
    ],
)
def test_tu_files_that_disagree_are_refused(tmp_path, broken, message):
    with pytest.raises(ValueError, match=message):
        read_tu_dataset(write_tu(tmp_path / "TOY", **broken))


def test_a_missing_tu_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"must hold NONE_A\.txt"):
        read_tu_dataset(tmp_path / "NONE")
