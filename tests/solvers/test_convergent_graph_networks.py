"""Graphs as they come, the networks on them, what they can and cannot express, the estimators."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone

from locally.solvers.convergent_graph import (
    APPNP,
    CGS,
    GIN,
    IGNN,
    SSE,
    AttentionMPNN,
    CGSClassifier,
    CGSRegressor,
    StackedGNN,
    as_graph,
    disjoint_union,
    train,
)

NETWORKS = [CGS, APPNP, GIN, IGNN, SSE, StackedGNN]
seeds = st.integers(0, 2**32 - 1)


def draw(seed=0, n=9, e=20, nodes=2, edges=3):
    g = torch.Generator().manual_seed(seed % 2**63)
    return (
        torch.randn(n, nodes, generator=g),
        torch.randint(n, (2, e), generator=g),
        torch.randn(e, edges, generator=g),
    )


def network(kind, **options):
    torch.manual_seed(0)
    return kind(2, 3, 4, **options).eval()


# Graphs


def test_data_objects_and_plain_tensors_are_one():
    x, edge_index, edge_attr = draw()
    batch = torch.tensor([0] * 9)
    model = network(CGS)
    expected = model(x, edge_index, edge_attr)
    for data in (
        SimpleNamespace(x=x, edge_index=edge_index, edge_attr=edge_attr),
        SimpleNamespace(x=x, edge_index=edge_index, edge_attr=edge_attr, batch=batch, num_graphs=1),
        as_graph(x, edge_index, edge_attr, batch),
    ):
        assert torch.equal(model(data), expected)


def test_data_and_batches_of_torch_geometric():
    geometric = pytest.importorskip("torch_geometric.data")
    parts = [geometric.Data(*draw(seed, n=4 + seed)) for seed in range(3)]
    union = geometric.Batch.from_data_list(parts)
    for task in ("node", "graph"):
        model = network(CGS, task=task)
        alone = torch.cat([model(part) for part in parts])
        torch.testing.assert_close(model(union), alone, rtol=1e-4, atol=1e-5)
    ours = disjoint_union([as_graph(part) for part in parts])
    assert torch.equal(ours.edge_index, union.edge_index)
    assert torch.equal(ours.batch, union.batch)
    loader = pytest.importorskip("torch_geometric.loader").DataLoader(parts, batch_size=2)
    assert [network(CGS, task="graph")(batch).shape[0] for batch in loader] == [2, 1]
    bare = geometric.Data(edge_index=torch.tensor([[0, 1], [1, 2]]), num_nodes=5)
    assert as_graph(bare).x.tolist() == [[1.0]] * 5


def test_what_a_graph_lacks_is_filled_in():
    path = torch.tensor([[0, 1], [1, 2]])
    assert as_graph(SimpleNamespace(edge_index=path)).x.tolist() == [[1.0]] * 3
    assert as_graph(SimpleNamespace(edge_index=path, num_nodes=4)).num_nodes == 4
    column = as_graph(torch.arange(3.0), path, torch.arange(2.0))
    assert column.x.shape == (3, 1)
    assert column.edge_attr.shape == (2, 1)
    empty = as_graph(torch.empty(0, 2), path[:, :0])
    assert (empty.num_nodes, empty.num_graphs) == (0, 1)


def test_graphs_that_do_not_fit_together_are_refused(without_shape_checks):
    x, edge_index, edge_attr = draw()
    cases = [
        ((x,), TypeError, "needs edge_index"),
        ((x, edge_index.int()), TypeError, "edge_index must be int64"),
        ((x, edge_index + 9), ValueError, "edge_index must hold nodes 0 .. 8"),
        ((x, edge_index.T), ValueError, "edge_index must have shape"),
        ((x, edge_index, edge_attr[1:]), ValueError, "edge_attr must have shape"),
        ((x.long(), edge_index), TypeError, "floating-point"),
        ((x, edge_index, edge_attr.double()), TypeError, "one floating-point dtype"),
        ((x / 0, edge_index), ValueError, "x holds NaN"),
        ((x, edge_index, edge_attr * torch.inf), ValueError, "edge_attr holds NaN"),
        ((x, edge_index, edge_attr, torch.arange(9).flip(0)), ValueError, "batch must be sorted"),
        ((x, edge_index, edge_attr, torch.arange(8)), ValueError, "batch must have shape"),
        ((x, edge_index, edge_attr, torch.ones(9, dtype=torch.int64), 1), ValueError, "num_graphs"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            as_graph(*arguments)
    with pytest.raises(ValueError, match="same numbers of node and edge features"):
        disjoint_union([as_graph(x, edge_index), as_graph(x, edge_index, edge_attr)])
    with pytest.raises(ValueError, match="number of graphs"):
        disjoint_union([])
    with pytest.raises(ValueError, match="x must have shape"):
        network(CGS)(x[:, :1], edge_index, edge_attr)
    with pytest.raises(ValueError, match="edge_attr must have shape"):
        network(CGS)(x, edge_index)


# Networks


@pytest.mark.parametrize("kind", NETWORKS)
@settings(max_examples=8)
@given(seed=seeds)
def test_renumbering_nodes_and_edges(kind, seed):
    x, edge_index, edge_attr = draw(seed)
    g = torch.Generator().manual_seed(seed % 2**63)
    new, order = torch.randperm(9, generator=g), torch.randperm(20, generator=g)
    shuffled = torch.empty_like(x)
    shuffled[new] = x
    other = shuffled, new[edge_index][:, order], edge_attr[order]
    by_node, by_graph = network(kind, task="node"), network(kind, task="graph")
    torch.testing.assert_close(by_node(*other)[new], by_node(x, edge_index, edge_attr), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(by_graph(*other), by_graph(x, edge_index, edge_attr), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("readout", ["sum", "mean"])
def test_a_union_gives_what_its_graphs_give(kind, readout):
    parts = [as_graph(*draw(seed, n=3 + seed)) for seed in range(4)]
    model = network(kind, task="graph", readout=readout)
    expected = torch.cat([model(part) for part in parts])
    torch.testing.assert_close(model(disjoint_union(parts)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", NETWORKS)
def test_empty_graphs_and_isolated_nodes(kind):
    none = torch.empty(2, 0, dtype=torch.int64)
    alone = torch.ones(2, 2), none, torch.empty(0, 3)
    assert network(kind, task="node")(*alone).isfinite().all()
    model = network(kind, task="graph")
    empty = model(torch.empty(0, 2), none, torch.empty(0, 3))
    torch.testing.assert_close(empty, model.decoder(torch.zeros_like(model.decoder[0].weight[:1])))
    gap = disjoint_union([as_graph(*alone), as_graph(torch.empty(0, 2), none, torch.empty(0, 3)), as_graph(*draw())])
    out = model(gap)
    assert out.shape == (3, 4)
    torch.testing.assert_close(out[1:2], empty)
    out.sum().backward()


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_parameter_that_matters_gets_a_gradient(kind):
    model = network(kind).train()
    model(*draw()).square().sum().backward()
    missing = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    last_edges = f"encoder.layers.{len(model.encoder.layers) - 1}.edge" if kind is IGNN else "none"
    assert not {name for name in missing if not name.startswith(last_edges)}


def test_the_encoder_is_what_its_formula_says():
    """z = [edge, source, target] through both perceptrons, edge by edge, without the split of the first layer."""
    torch.manual_seed(0)
    encoder = AttentionMPNN(2, 3, 5, 4, hidden=6, num_layers=2, aggregation="mean")
    x, edge_index, edge_attr = draw()
    nodes, edges = x, edge_attr
    for layer in encoder.layers:
        z = torch.cat([edges, nodes[edge_index[0]], nodes[edge_index[1]]], 1)
        edges, raised = layer.edge(z), layer.attention(z).exp()
        gathered = []
        for v in range(9):
            entering = edge_index[1] == v
            w = raised[entering] / raised[entering].sum()
            gathered.append((w * edges[entering]).sum(0) / max(int(entering.sum()), 1))
        nodes = layer.node(torch.cat([torch.stack(gathered), nodes], 1))
    found = encoder(as_graph(x, edge_index, edge_attr))
    torch.testing.assert_close(found, (nodes, edges), rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_published_pore_network_model():
    """Heads 16, one layer of width 32 with perceptrons of 64, decoder 64-32."""
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(CGS(2, 3, 1, heads=16)) == 7586
    assert count(StackedGNN(2, 3, 1, num_layers=5)) == 94918
    assert count(StackedGNN(2, 3, 1, num_layers=1)) == 11714


def test_the_fixed_point_sees_across_a_chain_that_its_encoder_cannot():
    """Two chains of 30 nodes that differ at one end only."""
    forth = torch.stack([torch.arange(29), torch.arange(1, 30)])
    edges = torch.cat([forth, forth.flip(0)], 1)
    plain, marked = torch.zeros(2, 30, 2)
    marked[0, 0] = 1
    attr = torch.ones(58, 3)
    far = slice(6, 30)
    stacked = network(StackedGNN, num_layers=5)
    assert torch.equal(stacked(plain, edges, attr)[far], stacked(marked, edges, attr)[far])
    solver = network(CGS, gamma=0.9, tol=1e-12, normalize="softmax").double()
    plain, marked, attr = plain.double(), marked.double(), attr.double()
    differs = (solver(plain, edges, attr) - solver(marked, edges, attr)).abs().amax(1)
    assert (differs > 1e-9).all()
    assert differs[29] < differs[5]


def test_a_solver_does_not_count_neighbours_so_a_degree_must_be_a_feature():
    """Attention averages and rows are normalised: with equal features a ring and a complete graph look alike."""
    ring = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
    ring = torch.cat([ring, ring.flip(0)], 1)
    complete = torch.tensor([(i, j) for i in range(6) for j in range(6) if i != j]).T
    x = torch.ones(6, 2)
    model, gin = network(CGS, task="graph"), network(GIN, task="graph")
    values = [[m(x, edges, torch.ones(edges.shape[1], 3)) for edges in (ring, complete)] for m in (model, gin)]
    torch.testing.assert_close(*values[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(*values[1], rtol=1e-2)


def test_ignn_and_sse_are_where_they_say_they_are():
    x, edge_index, edge_attr = draw(3)
    graph = as_graph(x, edge_index, edge_attr)
    model = network(IGNN, tol=1e-6)
    with torch.no_grad():
        model.weight.mul_(100)  # scaled down to kappa again
        X = model.states(graph)
        rows = model.weight.abs().sum(1, keepdim=True)
        W = model.weight * (0.9 / rows).clamp(max=1)
        assert W.abs().sum(1).max() <= 0.9 + 1e-6
        A = torch.zeros(9, 9).index_put((edge_index[1], edge_index[0]), torch.ones(20), accumulate=True)
        A = A / A.sum(1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(torch.relu(A @ X @ W.T + model.encoder(graph)[0]), X, rtol=1e-3, atol=1e-4)
    gentle = network(SSE, steps=2000, tol=1e-7)
    with torch.no_grad():
        for p in gentle.transition.parameters():
            p.mul_(0.3)
        h = gentle.states(graph)
        gentle.steps = 1
        further = network(SSE, steps=4000, tol=1e-7)
        further.load_state_dict(gentle.state_dict())
        torch.testing.assert_close(further.states(graph), h, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_ignn_is_that_of_its_unrolled_iteration():
    graph = as_graph(*(t.double() if t.is_floating_point() else t for t in draw(5)))
    torch.manual_seed(0)
    model = IGNN(2, 3, 1, heads=4, tol=1e-13).double()
    model.states(graph).square().sum().backward()
    implicit = model.weight.grad.clone()
    bias = model.encoder(graph)[0].detach()
    A = torch.zeros(9, 9, dtype=torch.float64)
    A.index_put_((graph.edge_index[1], graph.edge_index[0]), torch.ones(20, dtype=torch.float64), accumulate=True)
    A = A / A.sum(1, keepdim=True).clamp(min=1)
    W = model.weight.detach().requires_grad_()
    x = torch.zeros(9, 4, dtype=torch.float64)
    for _ in range(400):
        x = torch.relu(A @ x @ (W * (0.9 / W.abs().sum(1, keepdim=True)).clamp(max=1)).T + bias)
    x.square().sum().backward()
    torch.testing.assert_close(implicit, W.grad, rtol=1e-8, atol=1e-9)


def test_networks_can_be_copied_and_saved_after_use(tmp_path):
    model = network(CGS)
    out = model(*draw())
    assert torch.equal(copy.deepcopy(model)(*draw()), out)
    assert 0 <= model.active_share <= 1
    other = CGS(2, 3, 4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(*draw()), out)


@pytest.mark.parametrize("option", ["heads", "hidden", "num_layers"])
def test_sizes_must_be_counts(option):
    for bad in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match=option.replace("heads", "heads|node_out")):
            CGS(2, 3, 4, **{option: bad})


@pytest.mark.parametrize(
    "options", [{"task": "edge"}, {"readout": "max"}, {"activation": "gelu"}, {"aggregation": "max"}, {"gamma": 1.0}]
)
def test_choices_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CGS(2, 3, 4, **options)


# Training and estimators


def chains(count, seed=0):
    """Chains whose values fall by half a hop from the marked end."""
    rng = np.random.default_rng(seed)
    graphs, values = [], []
    for _ in range(count):
        n = int(rng.integers(3, 8))
        forth = torch.stack([torch.arange(n - 1), torch.arange(1, n)])
        graphs.append((torch.eye(n)[:, :1], torch.cat([forth, forth.flip(0)], 1)))
        values.append(0.5 ** np.arange(n))
    return graphs, values


def test_a_regressor_learns_and_repeats_itself():
    graphs, values = chains(8)
    model = CGSRegressor(steps=96, lr=1e-2, random_state=3).fit(graphs, values)
    assert model.score(*chains(10, seed=1)) > 0.8
    again = clone(model).fit(graphs, values)
    assert again.losses_ == model.losses_
    assert all(np.array_equal(a, b) for a, b in zip(again.predict(graphs), model.predict(graphs)))


def test_an_interrupted_fit_goes_on_from_where_it_was():
    graphs, values = chains(4)
    model = CGSRegressor(steps=16, random_state=0, warm_start=True)

    def interrupt(step, loss):
        if step == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.fit(graphs, values, callback=interrupt)
    assert len(model.losses_) == 11
    first = model.model_
    model.fit(graphs, values)
    assert model.model_ is first
    assert len(model.losses_) == 11 + 16
    model.set_params(warm_start=False).fit(graphs, values)
    assert model.model_ is not first


def test_a_classifier_tells_cycles_from_chains():
    rng = np.random.default_rng(0)
    graphs, labels = [], []
    for i in range(16):
        n = int(rng.integers(4, 9))
        forth = torch.stack([torch.arange(n), (torch.arange(n) + 1) % n])[:, : n - i % 2]
        edges = torch.cat([forth, forth.flip(0)], 1)
        graphs.append((torch.bincount(edges[0]).float(), edges))
        labels.append("chain" if i % 2 else "cycle")
    model = CGSClassifier(steps=96, lr=1e-2, random_state=0).fit(graphs[:10], labels[:10])
    assert model.score(graphs[10:], labels[10:]) == 1.0
    probabilities = model.predict_proba(graphs)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert model.classes_.tolist() == ["chain", "cycle"]


def test_estimators_refuse_what_does_not_fit():
    graphs, values = chains(3)
    with pytest.raises(ValueError, match="same length"):
        CGSRegressor().fit(graphs, values[:2])
    with pytest.raises(ValueError, match=r"y\[1\] must have one value for each"):
        CGSRegressor().fit(graphs, [values[0], values[1][:-1], values[2]])
    with pytest.raises(ValueError, match="two classes"):
        CGSClassifier().fit(graphs, [1, 1, 1])
    with pytest.raises(ValueError, match="number of graphs"):
        CGSRegressor().fit([], [])
    with pytest.raises(ValueError, match="steps"):
        CGSRegressor(steps=0).fit(graphs, values)
    with pytest.raises(ValueError, match="not fitted"):
        CGSRegressor().predict(graphs)


def test_training_stops_where_the_loss_is_no_longer_finite():
    graphs, values = chains(2)
    with pytest.raises(FloatingPointError, match="in step 0"):
        CGSRegressor(steps=4).fit(graphs, [v * 1e30 for v in values])


def test_training_follows_the_cosine_schedule_with_restarts():
    model, rates = network(CGS), []
    x, edge_index, edge_attr = draw()
    graph, target = as_graph(x, edge_index, edge_attr), torch.zeros(9, 4)
    before = [p.clone() for p in model.parameters()]

    def watch(step, loss):
        after = [p.detach().clone() for p in model.parameters()]
        rates.append(max(float((a - b).detach().abs().max()) for a, b in zip(after, before)))
        before[:] = after

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(model, lambda step: (graph, target), steps=64, lr=1e-3, callback=watch)
    assert losses[-1] < losses[0]
    assert not model.training
    assert rates[0] == pytest.approx(1e-3, rel=0.01)  # Adam's first step is the rate
    assert rates[31] < 0.1 * rates[0]
    assert rates[32] > 5 * rates[31]
