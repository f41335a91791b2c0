"""Reference vectors of the authors' code, the identities that define the basis, and what must not change it."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn

from locally.tangent.interaction_basis import (
    CausalSelfAttention,
    LastPosition,
    LocalInteractionBasis,
    Residual,
    addition_transformer,
)
from locally.tangent.interaction_basis.folding import Section
from locally.tangent.interaction_basis.gradients import Sources, mean_squared_jacobian, quadrature

VARIANTS = {
    "jac": {},
    "pca": {"basis": "pca"},
    "jac_ig": {"integration": "gauss-legendre", "n_intervals": 20},
    "jac_nocenter": {"center": False},
    "ig10a": {"formula": "(1-0)*alpha", "integration": "gauss-legendre", "n_intervals": 20},
}


def network(*widths, seed=0, act=nn.ReLU):
    torch.manual_seed(seed)
    layers = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1]).double()


def cuts_of(net):
    return [name for name, layer in net.named_children() if isinstance(layer, nn.Linear)]


def inputs(n, d, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("file", ["mlp_5_7_6_4", "mlp_8_12_12_12_5"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_vectors(golden, file, variant):
    with np.load(golden / "31-local-interaction-basis" / f"{file}.npz", allow_pickle=False) as data:
        z = {key: torch.from_numpy(data[key]) for key in data.files}
    depth = sum(key.startswith("W") for key in z)
    net = network(*(z[f"W{i}"].shape[0] for i in range(depth)), z[f"W{depth - 1}"].shape[1])
    for i, layer in enumerate(layer for layer in net if isinstance(layer, nn.Linear)):
        layer.weight.data, layer.bias.data = z[f"W{i}"].T.clone(), z[f"b{i}"]
    lib = LocalInteractionBasis(cuts_of(net), tol=1e-12, **VARIANTS[variant]).fit(net, z["X"])
    graph = lib.interaction_graph(z["X"])
    for l, cut in enumerate(cuts_of(net)):
        basis = lib.bases_[cut]
        torch.testing.assert_close(basis.C @ basis.C_pinv, z[f"{variant}_CCp{l}"], rtol=0, atol=1e-9)
        torch.testing.assert_close(basis.C.abs(), z[f"{variant}_absC{l}"], rtol=0, atol=1e-9)
        if basis.Lambda is not None:
            theirs = z[f"{variant}_Lambda{l}"]
            torch.testing.assert_close(basis.Lambda.sort().values, theirs.sort().values, rtol=1e-9, atol=1e-10)
        # the reference adds edges up in single precision
        E = z[f"{variant}_E{l}"]
        torch.testing.assert_close(graph.edges[l], E.double(), rtol=1e-4, atol=1e-6 * float(E.max()))


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), hidden=st.integers(2, 9), outputs=st.integers(1, 5))
def test_the_identities_that_define_the_basis(seed, hidden, outputs):
    net, x = network(5, hidden, 6, outputs, seed=seed), inputs(300, 5, seed + 1)
    lib = LocalInteractionBasis(cuts_of(net)).fit(net, x)
    for l, (cut, basis) in enumerate(list(lib.bases_.items())[:-1]):
        k = basis.features
        torch.testing.assert_close(basis.C_pinv @ basis.C, torch.eye(k).double(), rtol=0, atol=1e-7)
        features = lib.transform(x, cut)
        second = features.T @ features / len(x)
        torch.testing.assert_close(second, torch.diag(basis.Lambda[:k]), rtol=1e-8, atol=1e-10)
        M = jacobian_moment(lib, l, x)
        turned = (basis.C_pinv @ M @ basis.C_pinv.T)[1:, 1:]
        torch.testing.assert_close(turned, torch.eye(k - 1).double(), rtol=0, atol=1e-6)


def jacobian_moment(lib, l, x):
    """M' by one autograd Jacobian an example."""
    f = lib.chain_.advance(lib.chain_.start(x), 0, l)
    C_next = lib._next(l + 1)
    work = lambda row: lib._section(l)(row) if C_next is None else lib._section(l)(row) @ C_next
    J = torch.func.vmap(torch.func.jacrev(work))(f)
    return torch.einsum("nij,nik->jk", J, J) / len(x)


@pytest.mark.parametrize("act", [nn.ReLU, nn.GELU, nn.SiLU])
@pytest.mark.parametrize("rule", [{}, {"integration": "trapezoid", "n_intervals": 3}])
def test_closed_forms_equal_backward_passes(act, rule, monkeypatch):
    net, x = network(5, 8, 7, 3, act=act), inputs(24, 5)
    lib = LocalInteractionBasis(cuts_of(net), **rule).fit(net, x)
    graph = lib.interaction_graph(x)
    monkeypatch.setattr(Section, "factor", lambda *_: None)
    slow = LocalInteractionBasis(cuts_of(net), **rule, memory=40_000).fit(net, x)
    for cut, basis in lib.bases_.items():
        torch.testing.assert_close(basis.C.abs(), slow.bases_[cut].C.abs(), rtol=1e-6, atol=1e-8)
    for ours, theirs in zip(graph.edges, slow.interaction_graph(x).edges):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


def test_edges_are_squared_attributions_example_by_example():
    net, x = network(4, 6, 3), inputs(40, 4)
    lib = LocalInteractionBasis(["0", "2"]).fit(net, x)
    here, there = lib.bases_["0"], lib.bases_["2"]
    features = lib.transform(x, "0")
    J = torch.func.vmap(torch.func.jacrev(lambda f: lib._section(0)(f @ here.C_pinv) @ there.C))(features)
    expected = (J * features[:, None]).square().mean(0)
    torch.testing.assert_close(lib.interaction_graph(x).between("0"), expected, rtol=1e-8, atol=1e-12)
    # the older form at alpha near 1 is the derivative of a square at 0
    lib = LocalInteractionBasis(["0", "2"]).fit(net, x)
    functional = lib.interaction_graph(x, formula="functional")
    assert functional.between("0").abs().max() < 1e-12


def test_functional_edges_add_up_to_the_squared_output():
    """For a homogeneous section the sum over j of E_ij is the integral of d/dalpha, |fhat_i|^2 on average."""
    net, x = network(4, 6, 3), inputs(40, 4)
    lib = LocalInteractionBasis(["0", "2"], integration="gauss-legendre", n_intervals=4).fit(net, x)
    E = lib.interaction_graph(x, formula="functional").between("0")
    torch.testing.assert_close(E.sum(1), lib.transform(x, "2").square().mean(0), rtol=1e-8, atol=1e-10)


def test_linear_layers_interact_along_a_diagonal():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 7), nn.Linear(7, 4)).double()
    graph = LocalInteractionBasis(["0", "1", "2"]).fit(net, inputs(200, 5)).interaction_graph(inputs(200, 5))
    for E in graph.edges[:2]:
        inner = E[1:, 1:]
        assert (inner - torch.diag(inner.diag())).abs().max() < 1e-20 * 1e8
        assert inner.diag().min() > 1e-6


def test_turning_the_coordinates_of_a_linear_cut_changes_nothing():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    turned = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    turned.load_state_dict(net.state_dict())
    turned[0].weight.data, turned[0].bias.data = Q.T @ net[0].weight.data, net[0].bias.data @ Q
    turned[1].weight.data = net[1].weight.data @ Q
    same_graph(net, turned, ["1", "3"])


def test_rescaled_hidden_units_change_nothing():
    net = network(5, 8, 6, 3)
    scale = torch.rand(8, dtype=torch.float64) * 10 + 0.1
    scaled = network(5, 8, 6, 3)
    scaled[0].weight.data, scaled[0].bias.data = net[0].weight.data * scale[:, None], net[0].bias.data * scale
    scaled[2].weight.data = net[2].weight.data / scale
    same_graph(net, scaled, ["0", "2", "4"])
    x = inputs(300, 5)
    pca, other = (
        LocalInteractionBasis(["0", "2", "4"], basis="pca").fit(m, x).interaction_graph(x) for m in (net, scaled)
    )
    assert (pca.edges[0] - other.edges[0]).abs().max() > 0.1 * pca.edges[0].max()


def same_graph(one, two, cuts):
    x = inputs(300, 5)
    a, b = (LocalInteractionBasis(cuts).fit(m, x) for m in (one, two))
    for cut in cuts:
        torch.testing.assert_close(a.bases_[cut].Lambda, b.bases_[cut].Lambda, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(a.transform(x, cut).abs(), b.transform(x, cut).abs(), rtol=1e-6, atol=1e-8)
    for E, F in zip(a.interaction_graph(x).edges, b.interaction_graph(x).edges):
        torch.testing.assert_close(E, F, rtol=1e-7, atol=1e-10)


def test_duplicated_and_dead_neurons_add_no_features():
    net = network(4, 5, 3)
    wide = network(4, 11, 3)
    W, b = net[0].weight.data, net[0].bias.data
    wide[0].weight.data = torch.cat([W, W, torch.zeros(1, 4)])
    wide[0].bias.data = torch.cat([b, b, torch.tensor([-1.0])]).double()
    wide[2].weight.data = torch.cat([net[2].weight.data / 2, net[2].weight.data / 2, torch.ones(3, 1)], 1)
    wide[2].bias.data = net[2].bias.data
    x = inputs(300, 4)
    a, b = (LocalInteractionBasis(["0", "2"]).fit(m, x) for m in (net, wide))
    assert a.bases_["2"].features == b.bases_["2"].features
    torch.testing.assert_close(a.interaction_graph(x).edges[0], b.interaction_graph(x).edges[0], rtol=1e-8, atol=1e-12)


def test_nothing_relevant_is_lost():
    net, x = network(4, 6, 9, 6), inputs(200, 4)
    lib = LocalInteractionBasis(["0", "2"]).fit(net, x)
    torch.testing.assert_close(lib.inverse_transform(lib.transform(x, "0"), "0"), x, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="features"):
        lib.inverse_transform(torch.ones(2, 2).double(), "0")


def test_rules_of_quadrature_agree_and_relu_sections_do_not_need_them():
    gelu, x = network(4, 8, 3, act=nn.GELU), inputs(200, 4)
    fit = lambda net, **how: LocalInteractionBasis(["0", "2"], **how).fit(net, x).bases_["0"].Lambda
    gauss = fit(gelu, integration="gauss-legendre", n_intervals=20)
    torch.testing.assert_close(fit(gelu, integration="trapezoid", n_intervals=400), gauss, rtol=1e-3, atol=1e-6)
    assert (fit(gelu) - gauss).abs().max() > 0.01 * gauss.max()
    # with biases folded in, a ReLU section is homogeneous: its Jacobian at alpha f is that at f
    relu = network(4, 8, 3)
    torch.testing.assert_close(
        fit(relu, integration="gauss-legendre", n_intervals=5), fit(relu), rtol=1e-10, atol=1e-12
    )
    for rule in (quadrature("gauss-legendre", 4), quadrature("trapezoid", 4)):
        assert sum(weight for _, weight in rule) == pytest.approx(1)


def test_principal_components_are_scikit_learns():
    net, x = network(6, 8, 3), inputs(300, 6) @ torch.diag(torch.arange(1.0, 7.0).double())
    basis = LocalInteractionBasis(["0", "2"], basis="pca").fit(net, x).bases_["2"]
    theirs = PCA().fit(net[:2](x).detach().numpy())
    np.testing.assert_allclose(np.abs(basis.C[:-1, 1:].numpy()), np.abs(theirs.components_.T), atol=1e-9)
    np.testing.assert_allclose(basis.variances[1:].numpy() * 300 / 299, theirs.explained_variance_, rtol=1e-9)


def test_neurons_are_the_activations():
    net, x = network(4, 6, 3), inputs(50, 4)
    lib = LocalInteractionBasis(["0", "2"], basis="neuron", center=False).fit(net, x)
    torch.testing.assert_close(lib.transform(x, "2")[:, 1:], net[:2](x))
    lib = LocalInteractionBasis(["0", "2"], basis="neuron").fit(net, x)
    assert lib.transform(x, "2")[:, 1:].mean(0).abs().max() < 1e-12
    torch.testing.assert_close(lib.inverse_transform(lib.transform(x, "2"), "2"), net[:2](x))


def test_gradient_flow_looks_at_the_output():
    """On the last section it is the same basis; before it, what cannot reach the output is dropped."""
    net, x = network(5, 8, 8, 2), inputs(300, 5)
    lib, flow = (LocalInteractionBasis(cuts_of(net), basis=basis).fit(net, x) for basis in ("lib", "ngf"))
    torch.testing.assert_close(lib.bases_["4"].C, flow.bases_["4"].C)
    J = torch.func.vmap(torch.func.jacrev(net))(x)
    centred = x - x.mean(0)
    M = torch.einsum("nij,nik->jk", J, J) / len(x)
    expected = torch.linalg.eigvals(M @ centred.T @ centred / len(x)).real.sort(descending=True).values
    torch.testing.assert_close(flow.bases_["0"].Lambda[1:], expected, rtol=1e-7, atol=1e-10)


def test_the_oldest_form_is_the_gradient_of_a_square():
    net, x = network(4, 6, 3, act=nn.GELU), inputs(80, 4)
    lib = LocalInteractionBasis(["0", "2"], formula="(1-alpha)^2", integration="trapezoid").fit(net, x)
    basis = lib.bases_["2"]
    f = lib.chain_.advance(lib.chain_.start(x), 0, 1)
    half = (f / 2).requires_grad_()
    gap = (lib._section(1)(f) - lib._section(1)(half)).square().sum()
    (g,) = torch.autograd.grad(-gap, half)
    expected = (basis.C_pinv @ (g.T @ f / len(f)) @ basis.C).diag().abs()
    torch.testing.assert_close(
        basis.Lambda[: basis.features].sort().values, expected.sort().values, rtol=1e-7, atol=1e-9
    )


def test_rotated_output_and_an_inner_last_cut():
    net, x = network(4, 6, 6, 3), inputs(200, 4)
    lib = LocalInteractionBasis(["0", "2"], rotate_output=True).fit(net, x)
    outputs = lib.transform(x, "output")
    covariance = torch.cov(outputs.T)
    assert (covariance - torch.diag(covariance.diag())).abs().max() < 1e-9
    inner = LocalInteractionBasis(["0", "2"], output=False).fit(net, x)
    assert list(inner.bases_) == ["0", "2"]
    assert inner.interaction_graph(x).edges[0].shape == (7, inner.bases_["0"].features)
    torch.testing.assert_close(inner.chain_(x), net(x))


# Positions ------------------------------------------------------------------------------------------------------------


def small_transformer():
    torch.manual_seed(0)
    return addition_transformer(7, width=12, heads=3, head_width=4, hidden=20).double()


def test_sums_over_positions():
    """At the attention, against Jacobians by hand; the MLP behind sees one position."""
    model = small_transformer()
    tokens = torch.randint(0, 8, (25, 3), generator=torch.Generator().manual_seed(0))
    lib = LocalInteractionBasis(["attention", "mlp", "unembed"]).fit(model, tokens)
    f = lib.chain_.start(tokens)
    here, there = lib.bases_["attention"], lib.bases_["mlp"]
    J = torch.func.vmap(torch.func.jacrev(lambda row: lib._section(0)(row[None])[0] @ there.C))(f)  # n i s j
    M = torch.einsum("nisj,nisk->jk", J, J) / (len(f) * 3)
    assert (here.C_pinv @ M @ here.C_pinv.T)[1:, 1:].sub(torch.eye(here.features - 1)).abs().max() < 1e-7
    features = lib.transform(tokens, "attention")
    Jhat = torch.einsum("nisj,kj->nisk", J, here.C_pinv)
    expected = torch.einsum("nisk,nsk->nik", Jhat, features).square().sum(0) / (len(f) * 3)
    torch.testing.assert_close(lib.interaction_graph(tokens).between("attention"), expected, rtol=1e-6, atol=1e-10)


def test_positions_of_an_elementwise_section_are_examples():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x = inputs(60, 4)
    flat = LocalInteractionBasis(["0", "2"]).fit(net, x)
    folded = LocalInteractionBasis(["0", "2"]).fit(net, x.view(20, 3, 4))
    for cut in ("0", "2"):
        torch.testing.assert_close(folded.bases_[cut].C.abs(), flat.bases_[cut].C.abs(), rtol=1e-8, atol=1e-10)
    for a, b in zip(flat.interaction_graph(x).edges, folded.interaction_graph(x.view(20, 3, 4)).edges):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "kind", [{"position_sources": 1}, {"feature_sources": 1}, {"position_sources": 1, "feature_sources": 1}]
)
def test_random_signs_are_unbiased_and_get_better_as_one_over_the_root(kind):
    torch.manual_seed(0)
    section = Section(
        *(LocalInteractionBasis(["0"]).fit(attention_only(), inputs(12, 8).view(3, 4, 8)).chain_.sections[0])
    )
    f = torch.cat([inputs(12, 8).view(3, 4, 8), torch.ones(3, 4, 1)], -1).double()
    with torch.no_grad():
        rule = [(1.0, 1.0)]
        exact = mean_squared_jacobian(section, lambda: iter([f]), None, rule, None, 2**24)

        def error(r):
            draws = dict.fromkeys(kind, r)
            total = []
            for seed in range(4):
                sources = Sources(
                    draws.get("position_sources"), draws.get("feature_sources"), torch.Generator().manual_seed(seed)
                )
                total.append(mean_squared_jacobian(section, lambda: iter([f]), None, rule, sources, 2**24) - exact)
            return float(torch.stack(total).norm() / exact.norm() / 2)

        few, many = error(1), error(12)
    assert many < 0.6 * few
    assert many < 0.5


def attention_only():
    return nn.Sequential(Residual(CausalSelfAttention(8, 2)), nn.Linear(8, 3)).double()


def test_random_sources_in_fit_come_close_and_repeat():
    x = inputs(600, 8).view(100, 6, 8)
    fit = partial(LocalInteractionBasis, ["0"])
    exact = fit().fit(attention_only_seeded(), x).bases_["0"].Lambda
    drawn = fit(position_sources=3).fit(attention_only_seeded(), x).bases_["0"].Lambda
    assert (drawn - exact).norm() < 0.1 * exact.norm()
    torch.testing.assert_close(
        fit(position_sources=3).fit(attention_only_seeded(), x).bases_["0"].Lambda, drawn, rtol=0, atol=0
    )


def attention_only_seeded():
    torch.manual_seed(3)
    return attention_only()


def test_a_layer_norms_variance_stays_a_feature_of_its_own():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    block = nn.Sequential(nn.Linear(5, 8), Residual(nn.LayerNorm(8), nn.Linear(8, 8)), nn.Linear(8, 3)).double()
    for net, cut, at in ((plain, "1.out", 0), (block, "1.0.out", 8)):
        lib = LocalInteractionBasis([cut.removesuffix(".out"), cut, "2"]).fit(net, inputs(200, 5))
        basis = lib.bases_[cut]
        assert basis.fixed == 2
        column = basis.C[:-1, 1]
        assert column[at].abs() > 0
        assert (column.abs() > 1e-12).sum() == 1
        assert basis.C[at, 2:].abs().max() < 1e-12
        torch.testing.assert_close(lib.chain_(inputs(9, 5)), net(inputs(9, 5)), rtol=1e-10, atol=1e-10)


# Refusals and data ----------------------------------------------------------------------------------------------------


def test_data_loaders_and_tensors_give_the_same():
    net, x = network(4, 6, 3), inputs(100, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, torch.zeros(100)), batch_size=7)
    a, b = (
        LocalInteractionBasis(["0", "2"]).fit(net, x),
        LocalInteractionBasis(["0", "2"], batch_size=3).fit(net, loader),
    )
    torch.testing.assert_close(a.bases_["0"].C.abs(), b.bases_["0"].C.abs(), rtol=1e-9, atol=1e-11)


def test_the_model_stays_as_it_is_and_progress_is_told():
    net, x = network(4, 6, 3).float(), inputs(50, 4).float()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    inplace = nn.Sequential(nn.ReLU(inplace=True), *net)
    keep, seen = x.clone(), []
    LocalInteractionBasis(["1", "3"], dtype=torch.float32).fit(
        inplace, x, progress=lambda f, name: seen.append((f, name))
    )
    assert torch.equal(x, keep)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    assert [name for _, name in seen] == ["output", "3", "1", "1"]
    assert seen[-1][0] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"node_layers": []}, "node_layers"),
        ({"node_layers": "0"}, "node_layers"),
        ({"node_layers": ["0"], "output": False}, "two cuts"),
        ({"basis": "ica"}, "basis"),
        ({"integration": "simpson"}, "integration"),
        ({"n_intervals": -1}, "n_intervals"),
        ({"formula": "hessian"}, "formula"),
        ({"tol": -1.0}, "tol"),
        ({"tol": "small"}, "tol"),
        ({"batch_size": 0}, "batch_size"),
        ({"dtype": torch.float16}, "dtype"),
        ({"position_sources": 0}, "position_sources"),
        ({"feature_sources": 2, "formula": "(1-0)*alpha"}, "feature_sources"),
    ],
)
def test_impossible_arguments_are_named(arguments, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        LocalInteractionBasis(**{"node_layers": ["0"]} | arguments)


def test_impossible_data_is_named(without_shape_checks):
    net, lib = network(4, 6, 3), LocalInteractionBasis(["0", "2"])
    with pytest.raises(ValueError, match="data holds NaN"):
        lib.fit(net, torch.full((5, 4), torch.nan))
    with pytest.raises(ValueError, match="data must hold examples"):
        lib.fit(net, torch.empty(0, 4))
    with pytest.raises(ValueError, match="data is empty"):
        list(lib._batches([]))
    with pytest.raises(TypeError, match="several times"):
        lib.fit(net, iter([inputs(5, 4)]))
    huge = network(4, 6, 3)
    huge[0].weight.data.fill_(1e308)
    with pytest.raises(ValueError, match="activations at 2 hold NaN"):
        lib.fit(huge, torch.full((5, 4), 10.0).double())
    with pytest.raises(RuntimeError, match="fit first"):
        lib.interaction_graph(inputs(5, 4))
    with pytest.raises(ValueError, match="layer must be one of 0, 2, output"):
        LocalInteractionBasis(["0", "2"]).fit(net, inputs(50, 4)).transform(inputs(5, 4), "1")


def test_last_position_and_embedding_shapes():
    assert LastPosition()(torch.ones(2, 3, 4)).shape == (2, 4)
    model = small_transformer()
    assert model(torch.zeros(5, 3, dtype=torch.long)).shape == (5, 8)
