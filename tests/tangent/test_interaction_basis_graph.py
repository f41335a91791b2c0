"""Ablations at their ends and by hand, the bisection, and the graph as networkx sees it."""

import networkx
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from locally.tangent.interaction_basis import Ablation, InteractionGraph, LocalInteractionBasis, Residual


def block_network():
    """Two independent halves of 3 units, and labels that need both."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    for layer in (net[0], net[2]):
        layer.weight.data[:3, 3:] = 0
        layer.weight.data[3:, :3] = 0
    return net


@pytest.fixture(scope="module")
def fitted():
    net = block_network()
    x = torch.randn(3000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lib = LocalInteractionBasis(["0", "2", "4"]).fit(net, x)
    return net, x, lib, lib.interaction_graph(x)


@pytest.fixture(scope="module")
def ablation(fitted):
    net, x, lib, _ = fitted
    return Ablation(lib, x[:500], net(x[:500]).argmax(1))


def test_nothing_taken_out_is_the_baseline(fitted, ablation):
    _, _, lib, graph = fitted
    assert ablation.baseline == 1.0
    for cut in ("0", "2", "4"):
        assert ablation.keep_nodes(cut, lib.bases_[cut].features) == 1.0
        assert ablation.keep_edges(graph, cut, graph.between(cut).numel()) == 1.0
        # every edge, but by way of the features
        E = graph.between(cut)
        mask = torch.ones_like(E, dtype=torch.bool)
        l = lib.chain_.cuts.index(next(c for c in lib.chain_.cuts if c.name == cut))
        features = ablation._masked_section(l, ablation.activations[l] @ lib.bases_[cut].C, mask)
        there = lib.bases_[lib.chain_.cuts[l + 1].name]
        torch.testing.assert_close(features, ablation.activations[l + 1] @ there.C, rtol=1e-7, atol=1e-8)


def test_ablated_edges_by_hand(fitted, ablation):
    _, _, lib, graph = fitted
    for l, cut in enumerate(("0", "2", "4")):
        here, there = lib.bases_[cut], lib.bases_[("2", "4", "output")[l]]
        mask = graph.mask(cut, 5)
        features = ablation.activations[l] @ here.C
        expected = torch.stack(
            [(lib._section(l)((features * row) @ here.C_pinv) @ there.C)[:, i] for i, row in enumerate(mask)], 1
        )
        torch.testing.assert_close(ablation._masked_section(l, features, mask), expected, rtol=1e-8, atol=1e-8)


def test_sections_without_closed_form_are_ablated_the_same_way():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), Residual(nn.LayerNorm(6), nn.Linear(6, 6)), nn.Linear(6, 3)).double()
    x = torch.randn(200, 5, dtype=torch.float64)
    lib = LocalInteractionBasis(["1", "2"]).fit(net, x)
    graph = lib.interaction_graph(x)
    ablation = Ablation(lib, x, net(x).argmax(1), "cross-entropy")
    mask = graph.mask("1", 7)
    features = ablation.activations[0] @ lib.bases_["1"].C
    expected = torch.stack(
        [
            (lib._section(0)((features * row) @ lib.bases_["1"].C_pinv) @ lib.bases_["2"].C)[:, i]
            for i, row in enumerate(mask)
        ],
        1,
    )
    torch.testing.assert_close(ablation._masked_section(0, features, mask), expected, rtol=1e-8, atol=1e-8)
    scores = ablation.edge_curve(graph, "1", [0, mask.numel()])
    assert scores[0] > scores[1] == ablation.baseline
    required = ablation.edges_required(graph, "1", 0.05)
    assert required.score <= required.baseline + 0.05


def test_without_edges_the_next_features_are_those_of_the_constant(fitted, ablation):
    _, _, lib, graph = fitted
    mask = graph.mask("0", 0)
    assert mask[:, 0].all()
    assert mask[:, 1:].sum() == 0
    features = ablation._masked_section(0, ablation.activations[0] @ lib.bases_["0"].C, mask)
    assert (features - features[:1]).abs().max() < 1e-12
    constant = lib._section(0)(lib.bases_["0"].mean[None]) @ lib.bases_["2"].C
    torch.testing.assert_close(features[:1], constant)


def test_the_bisection_ends_where_one_fewer_is_not_enough(fitted, ablation):
    *_, lib, graph = fitted
    for required, score, total in (
        (ablation.nodes_required("0", 0.001), lambda k: ablation.keep_nodes("0", k), lib.bases_["0"].features),
        (ablation.edges_required(graph, "2", 0.001), lambda k: ablation.keep_edges(graph, "2", k), 49),
    ):
        assert required.score >= required.baseline - 0.001
        assert score(required.kept) == pytest.approx(required.score)
        assert score(required.kept - 1) < required.baseline - 0.001
        assert required.kept < total
        assert dict(required.tried)[required.kept] == required.score
    assert ablation.node_curve("0", [0, lib.bases_["0"].features])[1] == 1.0


def test_independent_halves_come_apart(fitted):
    _, _, lib, graph = fitted
    modules = graph.modules(algorithm="louvain")
    assert sum(map(len, modules.clusters)) == graph.to_networkx().number_of_nodes()
    side = {}
    for cut, basis in lib.bases_.items():
        if cut == "output":
            continue
        squares = basis.C[:6, 1:].square()
        for i, share in enumerate((squares[3:].sum(0) / squares.sum(0)).tolist()):
            side[cut, i + 1] = share > 0.5
    E = graph.edges[0][1:, 1:]
    crossing = torch.tensor([[side["2", i + 1] != side["0", j + 1] for j in range(E.shape[1])] for i in range(len(E))])
    assert E[crossing].sum() < 0.01 * E.sum()


def test_networkx_and_graphml_carry_the_edges(fitted, tmp_path):
    *_, graph = fitted
    found = graph.to_networkx()
    assert found.number_of_nodes() == sum(b.features for b in fitted[2].bases_.values()) - 3
    assert found["0", 2]["2", 1]["weight"] == float(graph.between("0")[1, 2])
    assert not any(node[1] == 0 for node in found if node[0] != "output")
    graph.write_graphml(tmp_path / "graph.graphml")
    back = networkx.read_graphml(tmp_path / "graph.graphml")
    assert back.number_of_edges() == found.number_of_edges()
    assert back.edges["0:2", "2:1"]["weight"] == pytest.approx(float(graph.between("0")[1, 2]))
    assert back.nodes["output:0"]["layer"] == "output"
    assert graph.to_networkx(above=1e9).number_of_edges() == 0


def test_measures_of_sparsity():
    even, single = torch.ones(3, 4).double(), torch.zeros(5, 3).double()
    single[2, 1] = 7
    graph = InteractionGraph(("a", "b", "c"), (even, single), (False, False, False))
    assert graph.participation() == pytest.approx([12, 1])
    assert graph.strong_fraction() == pytest.approx([1, 1 / 15])
    assert graph.pruned([5, 1]).participation() == pytest.approx([5, 1])
    assert [int((E > 0).sum()) for E in graph.pruned([0, 4]).edges] == [0, 1]
    assert InteractionGraph(("a", "b"), (single * 0,), (False, False)).participation() == [0.0]


def test_modularity_of_a_known_partition():
    """Two pairs that see nothing of each other: each is a module, Q = 1/2."""
    graph = InteractionGraph(("a", "b"), (torch.eye(2).double(),), (False, False))
    modules = graph.modules()
    assert modules.modularity == pytest.approx(0.5)
    assert set(modules.clusters) == {frozenset({("a", 0), ("b", 0)}), frozenset({("a", 1), ("b", 1)})}
    weights = graph.modules(floors=[0.1])
    assert weights.modularity == pytest.approx(0.5)
    assert graph.modules(floors=[2.0]).modularity != graph.modules(floors=[2.0]).modularity  # no edge: not a number


def test_leiden_where_igraph_is_installed():
    pytest.importorskip("igraph")
    graph = InteractionGraph(
        ("a", "b"), (torch.block_diag(torch.ones(3, 3), torch.ones(2, 4)).double(),), (False, False)
    )
    leiden, louvain = graph.modules(algorithm="leiden"), graph.modules(algorithm="louvain")
    assert leiden == louvain


def test_leiden_without_igraph_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "igraph", None)
    graph = InteractionGraph(("a", "b"), (torch.eye(2).double(),), (False, False))
    with pytest.raises(ImportError, match="igraph"):
        graph.modules(algorithm="leiden")
    assert len(graph.modules().clusters) == 2


def test_the_drawing_has_a_point_for_each_feature_and_a_line_for_each_edge(fitted):
    *_, lib, graph = fitted
    axes = Figure().subplots()
    graph.draw(axes, edges=5, modules=graph.modules(algorithm="louvain"))
    lines = [c for c in axes.collections if type(c).__name__ == "LineCollection"]
    points = [c for c in axes.collections if type(c).__name__ == "PathCollection"]
    assert [len(c.get_segments()) for c in lines] == [5, 5, 5]
    counts = [b.features - b.fixed for b in lib.bases_.values()]
    assert [len(c.get_offsets()) for c in points] == counts


def test_bad_input_is_named(fitted, ablation, without_shape_checks):
    net, x, lib, graph = fitted
    y = net(x).argmax(1)
    for arguments, message in (
        ((lib, x, y[:5]), "y must be 3000 integer labels"),
        ((lib, x, y.double()), "y must be"),
        ((lib, x, y, "auc"), "metric"),
        ((lib, x * torch.nan, y), "data holds NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            Ablation(*arguments)
    with pytest.raises(RuntimeError, match="fit first"):
        Ablation(LocalInteractionBasis(["0"]), x, y)
    with pytest.raises(ValueError, match="delta"):
        ablation.nodes_required("0", -1)
    with pytest.raises(ValueError, match="mask of shape"):
        ablation.keep_edges(graph, "0", torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="layer must be one of"):
        ablation.keep_edges(graph, "output", 3)
    with pytest.raises(ValueError, match="layer must be one of"):
        graph.between("output")
    with pytest.raises(ValueError, match="kept"):
        graph.pruned([1])
    with pytest.raises(ValueError, match="floors"):
        graph.modules(floors=[1.0])
    with pytest.raises(ValueError, match="floors"):
        graph.modules(floors=[1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="resolution"):
        graph.modules(resolution=0)
    with pytest.raises(ValueError, match="algorithm"):
        graph.modules(algorithm="spectral")
    with pytest.raises(ValueError, match="share"):
        graph.strong_fraction(2.0)
