"""The contracting layer: its guarantee, its fixed points by every method, its gradients, and what bad input gets."""

import copy
import warnings
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from locally.solvers.convergent_graph import (
    Activation,
    ContractingFixedPoint,
    ContractingMaps,
    ConvergenceWarning,
    FixedPointSolver,
    Method,
    Sparsity,
    Status,
    contracting_weights,
)
from locally.solvers.convergent_graph.fixed_points import picard

GOLDEN_NAMES = {"identity": "Identity", "tanh": "Tanh", "relu": "ReLU", "leaky_relu": "LeakyReLU"}
FOR_ANY_ACTIVATION = ("picard", "anderson", "auto")
METHODS_OF = {
    a: (*FOR_ANY_ACTIVATION, "bicgstab", "dense") if a == "identity" else FOR_ANY_ACTIVATION for a in GOLDEN_NAMES
}
seeds = st.integers(0, 2**32 - 1)
gammas = st.floats(0.01, 0.99)
activations = st.sampled_from(list(Activation))
normalizations = st.sampled_from(["degree", "sigmoid", "softmax"])
flows = st.sampled_from(["target_to_source", "source_to_target"])


def draw(seed, n=12, e=40, heads=3, dtype=torch.float64, scale=1.0):
    """Edges, logits on both sides of the clip, biases; parallel edges, loops and nodes without edges occur."""
    g = torch.Generator().manual_seed(seed % 2**63)
    edges = torch.randint(n, (2, e), generator=g)
    logit = scale * (0.5 + torch.randn(e, heads, generator=g, dtype=dtype))
    return edges, logit, torch.randn(n, heads, generator=g, dtype=dtype)


def undirected(n, e, heads, seed, dtype=torch.float64):
    """Both directions of every edge with the same logits: reversible."""
    edges, logit, bias = draw(seed, n, e, heads, dtype)
    return torch.cat([edges, edges.flip(0)], 1), torch.cat([logit, logit]), bias


def hard(n, e, heads, seed=0):
    """A ring and random edges, logits above the clip: rows sum to one, so the map contracts by gamma and no better."""
    edges, _, bias = draw(seed, n, e, heads)
    ring = torch.stack([torch.arange(n), torch.arange(1, n + 1) % n])
    return torch.cat([ring, edges], 1), torch.full((n + e, heads), 1.5, dtype=torch.float64), bias


def dense(maps):
    """A, one matrix per head, from the list of edges."""
    n = maps.bias.shape[0]
    A = maps.bias.new_zeros(maps.bias.shape[1], n, n)
    for e, (i, j) in enumerate(zip(maps.sparsity.rows.tolist(), maps.sparsity.columns.tolist())):
        A[:, i, j] += maps.weights[e].detach()
    return A


@pytest.fixture
def vectors(golden):
    with np.load(golden / "16-convergent-graph-solver" / "fixed_point.npz", allow_pickle=False) as z:
        return {name: torch.from_numpy(z[name]) for name in z.files}


# The guarantee


@given(seeds, gammas, activations, normalizations, flows, st.floats(0, 100))
def test_any_weights_contract_by_gamma_in_the_maximum_norm(seed, gamma, activation, normalize, flow, scale):
    layer = ContractingFixedPoint(gamma, activation, normalize=normalize, flow=flow)
    maps = layer.maps(*draw(seed, scale=scale))
    assert (maps.weights >= 0).all()
    assert maps.sums.max() <= 1 + 1e-12
    x, y = torch.randn(2, *maps.bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**63))
    assert (maps.norm(maps(x) - maps(y)) <= maps.rates * maps.norm(x - y) * (1 + 1e-12)).all()
    assert (maps.rates <= gamma).all()


@given(seeds, gammas, normalizations)
def test_the_rate_is_attained_so_the_bound_is_no_looser_than_it_need_be(seed, gamma, normalize):
    maps = ContractingFixedPoint(gamma, normalize=normalize).maps(*draw(seed))
    moved = maps.norm(maps(torch.ones_like(maps.bias)) - maps(torch.zeros_like(maps.bias)))
    torch.testing.assert_close(moved, maps.rates, rtol=1e-12, atol=1e-14)


@given(seeds, gammas, activations)
def test_what_the_backward_pass_solves_contracts_in_the_sum_norm(seed, gamma, activation):
    maps = ContractingFixedPoint(gamma).maps(*draw(seed))
    slopes = Activation(activation).slope(maps(maps.bias))
    adjoint = ContractingMaps(
        maps.sparsity.transposed, maps.weights * slopes[maps.sparsity.rows], maps.bias, gamma, adjoint=True
    )
    adjoint.check()
    x, y = torch.randn(2, *maps.bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**63))
    assert (adjoint.norm(adjoint(x) - adjoint(y)) <= gamma * adjoint.norm(x - y) * (1 + 1e-12)).all()


@pytest.mark.parametrize("activation", list(Activation))
def test_changes_shrink_by_gamma_from_sweep_to_sweep(activation):
    maps = ContractingFixedPoint(0.8, activation).maps(*draw(3))
    changes = []
    FixedPointSolver(method="picard").solve(maps, callback=lambda k, c: changes.append(c))
    steps = torch.stack(changes)
    assert len(steps) > 10
    assert (steps[1:] <= 0.8 * steps[:-1] + 1e-15).all()


@given(seeds, gammas, activations)
def test_any_start_ends_in_the_same_point(seed, gamma, activation):
    edges, logit, bias = draw(seed)
    layer = ContractingFixedPoint(gamma, activation, tol=1e-12)
    start = 1e3 * torch.randn(bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed % 2**63))
    torch.testing.assert_close(
        layer(edges, logit, bias, x0=start), layer(edges, logit, bias), rtol=1e-9, atol=1e-10 / (1 - gamma)
    )


@given(seeds, st.floats(0.1, 0.99), activations, st.integers(1, 30))
def test_the_error_bound_covers_the_error_of_a_solve_cut_short(seed, gamma, activation, sweeps):
    maps = ContractingFixedPoint(gamma, activation).maps(*draw(seed))
    exact = FixedPointSolver(tol=1e-14).solve(maps).x
    found = FixedPointSolver(method="picard", max_iter=sweeps).solve(maps)
    assert (maps.norm(found.x - exact) <= found.error_bounds + 1e-12).all()
    assert (found.iterations <= sweeps).all()


def test_a_million_edges_into_one_node_still_sum_to_one_in_single_precision():
    n = 1_000_000
    rows = torch.zeros(n, dtype=torch.int64)
    for normalize in ("degree", "softmax"):
        weights = contracting_weights(torch.full((n, 1), 2.0), rows, 2, normalize)
        maps = ContractingMaps(Sparsity.of(rows, rows + 1, 2), weights, torch.ones(2, 1), 0.99)
        maps.check()
        torch.testing.assert_close(maps(torch.ones(2, 1)), torch.tensor([[1.99], [1.0]]), rtol=1e-5, atol=0)


# Fixed points


@pytest.mark.parametrize("gamma", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("method", list(Method))
def test_every_method_gives_the_solution_of_the_linear_system(method, gamma):
    maps = ContractingFixedPoint(gamma).maps(*undirected(30, 80, 4, seed=5))
    found = FixedPointSolver(method=method, tol=1e-12).solve(maps)
    assert found.status in (Status.CONVERGED, Status.ROUNDING)
    expected = torch.linalg.solve(torch.eye(30, dtype=torch.float64) - gamma * dense(maps), maps.bias.mT[..., None])
    torch.testing.assert_close(found.x, expected[..., 0].mT, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["tanh", "relu", "leaky_relu"])
def test_anderson_mixing_agrees_with_picard_iteration_in_fewer_products(activation):
    edges, logit, bias = hard(200, 500, 3)
    maps = ContractingFixedPoint(0.99, activation).maps(edges, logit, 0.01 * bias)  # tanh is nearly linear there
    slow = FixedPointSolver(method="picard", tol=1e-11).solve(maps)
    fast = FixedPointSolver(method="anderson", tol=1e-11).solve(maps)
    assert fast.status is Status.CONVERGED
    torch.testing.assert_close(fast.x, slow.x, rtol=1e-9, atol=1e-9)
    assert fast.iterations.max() < slow.iterations.max() / 2


@pytest.mark.parametrize("method", ["bicgstab", "cg"])
def test_krylov_methods_need_far_fewer_products_near_gamma_one(method):
    maps = ContractingFixedPoint(0.999).maps(*undirected(300, 900, 2, seed=1))
    maps = replace(maps, weights=contracting_weights(torch.ones_like(maps.weights), maps.sparsity.rows, 300))
    slow = FixedPointSolver(method="picard", tol=1e-9).solve(maps)
    fast = FixedPointSolver(method=method, tol=1e-9).solve(maps)
    torch.testing.assert_close(fast.x, slow.x, rtol=1e-7, atol=1e-6)
    assert 20 * fast.iterations.max() < slow.iterations.max()


def test_auto_takes_sweeps_then_elimination_then_krylov_then_mixing():
    def method(n, gamma, activation="identity"):
        layer = ContractingFixedPoint(gamma, activation)
        layer(*hard(n, 3 * n, 2))
        assert layer.last.status is Status.CONVERGED
        return layer.last.method

    assert method(40, 0.5) is Method.PICARD
    assert method(40, 0.99) is Method.DENSE
    assert method(400, 0.99) is Method.BICGSTAB
    assert method(400, 0.99, "leaky_relu") is Method.ANDERSON


def test_one_large_graph_among_many_tiny_ones_is_not_eliminated():
    """Padding every graph to the largest would take a gibibyte here."""
    batch = torch.cat([torch.zeros(400, dtype=torch.int64), torch.arange(1, 801)])
    edges, logit, _ = hard(400, 1600, 1)
    layer = ContractingFixedPoint(0.99)
    layer(edges, logit, torch.ones(1200, 1, dtype=torch.float64), batch)
    assert layer.last.method is Method.BICGSTAB
    assert layer.last.status is Status.CONVERGED


@pytest.mark.parametrize(("activation", "solver"), [(a, m) for a, methods in METHODS_OF.items() for m in methods])
def test_golden_fixed_points_and_gradients_of_the_reference_layer(vectors, activation, solver):
    name = GOLDEN_NAMES[activation]
    logit, bias = vectors["logit"].clone().requires_grad_(), vectors["b"].clone().requires_grad_()
    layer = ContractingFixedPoint(float(vectors["gamma"]), activation, solver=solver, tol=1e-13)
    maps = layer.maps(torch.stack([vectors["src"], vectors["dst"]]), logit, bias)
    torch.testing.assert_close(dense(maps), vectors["A"], rtol=0, atol=1e-15)
    x = layer(torch.stack([vectors["src"], vectors["dst"]]), logit, bias)
    torch.testing.assert_close(x.mT, vectors[f"z_{name}"], rtol=0, atol=1e-9)
    (x.mT * vectors["cotangent"]).sum().backward()
    torch.testing.assert_close(bias.grad.mT, vectors[f"gb_{name}"].reshape(3, 12), rtol=0, atol=1e-9)
    degree = torch.bincount(vectors["src"])[vectors["src"]]
    inside = (vectors["logit"] >= 0) & (vectors["logit"] <= 1)
    of_edges = vectors[f"gA_{name}"][:, vectors["src"], vectors["dst"]].mT
    torch.testing.assert_close(logit.grad, of_edges * inside / degree[:, None], rtol=0, atol=1e-9)


def test_golden_iteration_counts_agree_within_the_difference_of_the_stopping_rules(vectors):
    edges = torch.stack([vectors["src"], vectors["dst"]])
    for activation, name in GOLDEN_NAMES.items():
        layer = ContractingFixedPoint(0.5, activation, solver="picard", tol=1e-12)
        layer(edges, vectors["logit"], vectors["b"])
        assert abs(int(layer.last.iterations) - int(vectors[f"iters_{name}"])) <= 5


def test_closed_forms():
    edges, logit, bias = draw(2)
    torch.testing.assert_close(ContractingFixedPoint(1e-12)(edges, logit, bias), bias, rtol=0, atol=1e-10)
    ring = torch.stack([torch.arange(6), (torch.arange(6) + 1) % 6])
    ones = torch.ones(6, 2, dtype=torch.float64)
    for gamma in (0.5, 0.9, 0.999):
        found = ContractingFixedPoint(gamma)(ring, 1.5 * ones, ones)  # rows sum to one: A 1 = 1
        torch.testing.assert_close(found, ones / (1 - gamma), rtol=1e-9, atol=0)


def test_information_travels_any_distance_and_fades_by_gamma_a_hop():
    path = torch.stack([torch.arange(29), torch.arange(1, 30)])
    bias = torch.zeros(30, 1, dtype=torch.float64)
    bias[29] = 1
    found = ContractingFixedPoint(0.9, tol=1e-14)(path, torch.ones(29, 1, dtype=torch.float64), bias)
    torch.testing.assert_close(found[:, 0], 0.9 ** torch.arange(29, -1, -1, dtype=torch.float64), rtol=1e-10, atol=0)
    other_way = ContractingFixedPoint(0.9, flow="source_to_target")(path, torch.ones(29, 1, dtype=torch.float64), bias)
    assert other_way[:29].abs().max() == 0


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("solver", FOR_ANY_ACTIVATION)
def test_isolated_nodes_get_the_activation_of_their_bias(activation, solver):
    bias = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    none = torch.empty(2, 0, dtype=torch.int64)
    found = ContractingFixedPoint(0.9, activation, solver=solver)(none, torch.empty(0, 2, dtype=torch.float64), bias)
    torch.testing.assert_close(found, Activation(activation)(bias))
    found.sum().backward()
    torch.testing.assert_close(bias.grad, Activation(activation).slope(bias.detach()))


@pytest.mark.parametrize("solver", list(Method))
def test_no_nodes_and_graphs_without_nodes(solver):
    layer = ContractingFixedPoint(0.99, solver=solver)
    nothing = torch.empty(0, 2, requires_grad=True)
    none = torch.empty(2, 0, dtype=torch.int64)
    found = layer(none, torch.empty(0, 2), nothing)
    assert found.shape == (0, 2)
    found.sum().backward()
    assert nothing.grad.shape == (0, 2)
    batch = torch.tensor([1, 1, 3])  # graphs 0, 2 and 4 are empty
    edges = torch.tensor([[0, 1], [1, 0]])
    found = layer(edges, torch.ones(2, 1), torch.ones(3, 1), batch, num_graphs=5)
    torch.testing.assert_close(found[:, 0], torch.tensor([100.0, 100.0, 1.0]), rtol=1e-4, atol=0)
    assert len(layer.last.statuses) == 5


@pytest.mark.parametrize("solver", list(Method))
def test_a_batch_gives_what_its_graphs_give_one_by_one(solver):
    parts = [undirected(n, 3 * n, 2, seed=n) for n in (1, 5, 17, 40)]
    layer = ContractingFixedPoint(0.95, solver=solver)
    alone = [layer(*p) for p in parts]
    starts = np.cumsum([0, 1, 5, 17])
    edges = torch.cat([p[0] + s for p, s in zip(parts, starts.tolist())], 1)
    batch = torch.repeat_interleave(torch.arange(4), torch.tensor([1, 5, 17, 40]))
    together = layer(edges, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), batch)
    tolerance = {"rtol": 0, "atol": 0} if solver == "picard" else {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(together, torch.cat(alone), **tolerance)


@given(seeds, activations)
def test_renumbering_the_nodes_renumbers_the_answer(seed, activation):
    edges, logit, bias = draw(seed)
    new = torch.randperm(12, generator=torch.Generator().manual_seed(seed % 2**63))
    layer = ContractingFixedPoint(0.7, activation)
    shuffled = torch.empty_like(bias)
    shuffled[new] = bias
    torch.testing.assert_close(
        layer(new[edges], logit, shuffled)[new], layer(edges, logit, bias), rtol=1e-9, atol=1e-10
    )


def test_a_warm_start_saves_sweeps_and_a_hopeless_one_costs_none():
    edges, logit, bias = draw(4, n=60, e=200)
    layer = ContractingFixedPoint(0.9, solver="picard")
    x = layer(edges, logit, bias)
    cold = int(layer.last.iterations)
    layer(edges, logit, bias + 1e-6, x0=x)
    assert int(layer.last.iterations) < cold / 2
    layer(edges, logit, bias, x0=1e9 * torch.ones_like(x))
    assert int(layer.last.iterations) <= cold + 1


@pytest.mark.parametrize("activation", list(Activation))
def test_the_compiled_sweeps_and_the_tensor_ones_are_the_same(activation):
    """A callback sends Picard iteration through the loop that accelerators take."""
    parts = draw(8, n=30, e=90)
    batch = torch.repeat_interleave(torch.arange(3), 10)
    edges = 10 * (torch.arange(90) % 3) + parts[0] % 10
    maps = ContractingFixedPoint(0.9, activation).maps(edges, parts[1], parts[2], batch)
    targets = torch.full((3, 3), 1e-9, dtype=torch.float64)
    compiled, eager = torch.zeros_like(maps.bias), torch.zeros_like(maps.bias)
    sweeps, _ = picard(maps, compiled, targets, 500)
    assert sweeps.min() < sweeps.max()  # each graph ends on its own
    counts, _ = picard(maps, eager, targets, 500, callback=lambda k, c: None)
    torch.testing.assert_close(eager, compiled, rtol=1e-7, atol=1e-8)
    assert torch.equal(sweeps, counts)


# Gradients


@pytest.mark.parametrize("normalize", ["degree", "sigmoid", "softmax"])
@pytest.mark.parametrize("activation", list(Activation))
def test_gradients_match_central_differences_to_a_millionth(activation, normalize):
    edges, logit, bias = draw(11, n=6, e=14, heads=2)
    layer = ContractingFixedPoint(0.8, activation, normalize=normalize, tol=1e-14)
    cotangent = torch.randn(bias.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def value(both):
        return (
            layer(edges, both[: logit.numel()].view_as(logit), both[logit.numel() :].view_as(bias)) * cotangent
        ).sum()

    at = torch.cat([logit.flatten(), bias.flatten()]).requires_grad_()
    (gradient,) = torch.autograd.grad(value(at), at)
    h = 1e-5
    with torch.no_grad():
        steps = h * torch.eye(at.numel(), dtype=torch.float64)
        differences = torch.stack([(value(at + step) - value(at - step)) / (2 * h) for step in steps])
    assert (gradient - differences).norm() <= 1e-6 * gradient.norm()


@pytest.mark.parametrize("solver", ["picard", "bicgstab", "dense", "cg", "auto"])
def test_gradients_equal_those_through_a_dense_solve_and_through_an_unrolled_loop(solver):
    gamma = 0.8
    edges, logit, bias = undirected(15, 40, 2, seed=3)
    cotangent = torch.randn(15, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def matrices(logit):
        weights = contracting_weights(logit, edges[0], 15)
        return torch.zeros(15, 15, 2, dtype=torch.float64).index_put((edges[0], edges[1]), weights, accumulate=True)

    def implicit(logit, bias):
        return ContractingFixedPoint(gamma, solver=solver, tol=1e-14)(edges, logit, bias)

    def through_solve(logit, bias):
        eye = torch.eye(15, dtype=torch.float64)
        return torch.linalg.solve(eye - gamma * matrices(logit).permute(2, 0, 1), bias.mT[..., None])[..., 0].mT

    def unrolled(logit, bias):
        A, x = matrices(logit), torch.zeros_like(bias)
        for _ in range(200):
            x = gamma * torch.einsum("ijh,jh->ih", A, x) + bias
        return x

    def gradients(solve):
        leaves = logit.clone().requires_grad_(), bias.clone().requires_grad_()
        return torch.autograd.grad((solve(*leaves) * cotangent).sum(), leaves)

    ours = gradients(implicit)
    for other in (through_solve, unrolled):
        torch.testing.assert_close(ours, gradients(other), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("activation", ["identity", "tanh", "leaky_relu"])
def test_gradcheck_twice(activation):
    edges, logit, bias = draw(13, n=4, e=6, heads=2)
    layer = ContractingFixedPoint(0.7, activation, normalize="sigmoid", tol=1e-14)
    leaves = logit.requires_grad_(), bias.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: layer(edges, a, b), leaves)
    assert torch.autograd.gradgradcheck(lambda a, b: layer(edges, a, b), leaves)


def test_the_gradient_of_one_value_is_personalised_pagerank():
    """u = g + gamma P^T u is PageRank from the node that g marks, over 1 - gamma."""
    web = nx.random_k_out_graph(40, 5, alpha=1.0, seed=2)
    edges = torch.tensor([(i, j) for i, j, _ in web.edges]).T.contiguous()
    bias = torch.zeros(40, 1, dtype=torch.float64, requires_grad=True)
    logit = torch.ones(edges.shape[1], 1, dtype=torch.float64)
    for solver in ("picard", "bicgstab", "dense"):
        x = ContractingFixedPoint(0.85, solver=solver, tol=1e-13)(edges, logit, bias)
        (gradient,) = torch.autograd.grad(x[7, 0], bias)
        ranks = nx.pagerank(web, alpha=0.85, personalization={7: 1.0}, tol=1e-14, max_iter=500)
        np.testing.assert_allclose(0.15 * gradient[:, 0].numpy(), [ranks[i] for i in range(40)], atol=1e-11)


def test_appnp_of_torch_geometric_tends_to_the_fixed_point():
    geometric = pytest.importorskip("torch_geometric.nn")
    edges, logit, bias = undirected(20, 50, 3, seed=9)
    weights = contracting_weights(torch.ones_like(logit[:, :1]), edges[1], 20)[:, 0]
    theirs = geometric.APPNP(K=300, alpha=0.1, normalize=False)(bias, edges, weights)
    layer = ContractingFixedPoint(0.9, flow="source_to_target", tol=1e-13)
    torch.testing.assert_close(layer(edges, torch.ones_like(logit), 0.1 * bias), theirs, rtol=1e-9, atol=1e-11)


def peak_memory(work):
    """Most bytes that torch held at a time during the work."""
    work()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    # `recorded.events()` gives those inside an operation to the operation
    raw = recorded.profiler.kineto_results.events()
    events = sorted((e for e in raw if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert events
    return np.cumsum([e.nbytes() for e in events]).max()


def test_memory_of_the_gradient_does_not_grow_with_the_iterations():
    edges, logit, bias = hard(300, 1200, 4)
    logit, bias = logit.requires_grad_(), bias.abs().requires_grad_()
    iterations, peaks, saved = [], [], []
    for gamma in (0.5, 0.976):
        layer = ContractingFixedPoint(gamma, solver="picard", tol=1e-6)
        peaks.append(peak_memory(lambda: layer(edges, logit, bias).square().sum().backward()))  # noqa: B023
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            layer(edges, logit, bias)
        saved.append(sum(kept))
        iterations.append(int(layer.last.iterations))
    assert iterations[0] < 25
    assert iterations[1] > 450
    assert peaks[0] == peaks[1]
    assert saved[0] == saved[1]

    def unrolled(steps):
        weights, x = contracting_weights(logit, edges[0], 300), torch.zeros_like(bias)
        for _ in range(steps):
            x = bias + 0.5 * torch.zeros_like(bias).index_add(0, edges[0], weights * x[edges[1]])
        x.square().sum().backward()

    assert peak_memory(lambda: unrolled(40)) > 1.5 * peak_memory(lambda: unrolled(20))  # what the measure would show


def test_the_layer_does_not_keep_the_graph_of_its_last_call():
    edges, logit, bias = draw(1)
    layer = ContractingFixedPoint()
    layer(edges, logit.requires_grad_(), bias)
    assert not layer.last.x.requires_grad
    copy.deepcopy(layer)


# Failures and refusals


def test_too_few_iterations_are_said_and_warned_of_forward_and_backward():
    edges, logit, bias = hard(12, 20, 2)
    bias.requires_grad_()
    for solver in ("picard", "anderson", "bicgstab", "auto"):
        layer = ContractingFixedPoint(0.99, solver=solver, max_iter=3)
        with pytest.warns(ConvergenceWarning, match="the forward fixed point was not reached for 1 of 1"):
            x = layer(edges, logit, bias)
        assert layer.last.status is Status.ITERATION_LIMIT
        with pytest.warns(ConvergenceWarning, match="the backward fixed point"):
            x.sum().backward()


def test_nothing_warns_by_default_even_close_to_one():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float32, torch.float64):
            edges, logit, bias = hard(12, 20, 2)
            layer = ContractingFixedPoint(0.99999)
            layer(edges, logit.to(dtype), bias.to(dtype).requires_grad_()).sum().backward()


def test_a_tolerance_that_rounding_forbids_ends_in_a_status_of_its_own():
    found = FixedPointSolver(tol=1e-9).solve(ContractingFixedPoint(0.9).maps(*draw(0, dtype=torch.float32)))
    assert found.status is Status.ROUNDING
    exact = FixedPointSolver(tol=1e-13).solve(ContractingFixedPoint(0.9).maps(*draw(0, dtype=torch.float32)))
    assert (found.x - exact.x).abs().max() <= 1e-5 * exact.x.abs().max()


def test_maps_that_need_not_contract_are_refused():
    ring = Sparsity.of(torch.tensor([0, 1]), torch.tensor([1, 0]), 2)
    maps = ContractingMaps(ring, torch.full((2, 1), 1.1), torch.ones(2, 1), 0.9)
    with pytest.raises(ValueError, match=r"each row of \|weights\| must sum to at most 1, the largest sum is 1.1"):
        FixedPointSolver().solve(maps)
    with pytest.raises(ValueError, match="gamma"):
        FixedPointSolver().solve(replace(maps, gamma=1.0, weights=torch.ones(2, 1)))


def test_methods_refuse_maps_that_are_not_theirs():
    edges, logit, bias = draw(0)
    for solver in ("bicgstab", "dense", "cg"):
        with pytest.raises(ValueError, match="for the identity activation"):
            ContractingFixedPoint(0.5, "tanh", solver=solver)(edges, logit, bias)
    with pytest.raises(ValueError, match="reversible"):
        ContractingFixedPoint(0.5, solver="cg")(edges, logit, bias)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": 1.0}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"activation": "exp"}, "activation"),
        ({"normalize": "rows"}, "normalize"),
        ({"flow": "both"}, "flow"),
        ({"solver": "newton"}, "solver"),
        ({"tol": 0.0}, "tol"),
        ({"max_iter": 0}, "max_iter"),
        ({"max_iter": 1.5}, "max_iter"),
    ],
)
def test_hyper_parameters_out_of_range_are_named(arguments, name):
    with pytest.raises((ValueError, TypeError), match=name):
        ContractingFixedPoint(**arguments)


def test_bad_graphs_are_named(without_shape_checks):
    edges, logit, bias = draw(0)
    layer = ContractingFixedPoint()
    cases = [
        ((edges + 12, logit, bias), ValueError, r"nodes 0 .. 11, got rows from 12"),
        ((edges - 1, logit, bias), ValueError, "got rows from -1"),
        ((edges.int(), logit, bias), TypeError, "edge_index must be int64"),
        ((edges[:1], logit, bias), ValueError, "edge_index must have shape"),
        ((edges, logit[:-1], bias), ValueError, "edge_logit must have shape"),
        ((edges, logit[:, :1], bias), ValueError, "edge_logit must have shape"),
        ((edges, torch.full_like(logit, float("nan")), bias), ValueError, "edge_logit holds NaN"),
        ((edges, logit, bias / 0), ValueError, "bias holds NaN"),
        ((edges, logit.half(), bias.half()), TypeError, "float32 or float64"),
        ((edges, logit.float(), bias), TypeError, "weights must have the dtype of bias"),
        ((edges, logit, bias, torch.arange(12)), ValueError, "joins nodes of different graphs"),
        ((edges, logit, bias, torch.arange(12).flip(0)), ValueError, "non-decreasing"),
        ((edges, logit, bias, torch.zeros(11, dtype=torch.int64)), ValueError, "batch must have one entry"),
        ((edges, logit, bias, torch.ones(12, dtype=torch.int64), 1), ValueError, "num_graphs must be at least 2"),
        ((edges, logit, bias, None, None, bias[:3]), ValueError, "x0 must have shape"),
        ((edges, logit, bias, None, None, bias / 0), ValueError, "x0 holds NaN"),
    ]
    for arguments, kind, message in cases:
        with pytest.raises(kind, match=message):
            layer(*arguments)
