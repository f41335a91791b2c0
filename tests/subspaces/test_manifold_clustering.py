"""Coding rates and projections: closed forms, invariances, derivatives, golden vectors, peers and refusals."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from locally.subspaces.manifold_clustering import (
    Status,
    balance,
    coding_length,
    coding_rate,
    coding_rate_membership,
    euclidean_projection,
    ideal_rate_reduction,
    mean_cosine_between,
    numerical_rank,
    sinkhorn_projection,
    sinkhorn_projection_,
)

seeds = st.integers(0, 2**32 - 1)


def unit(n: int, d: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d, dtype=torch.float64, generator=generator), dim=1)


def rate_by_lu(Z, G, eps_sq):
    """Cluster by cluster with a general determinant, as public code of coding rates does it."""
    n, d = Z.shape
    total = 0.0
    for column in G.T:
        size = column.sum()
        total += size / n * torch.logdet(torch.eye(d, dtype=Z.dtype) + d / (size * eps_sq) * (Z.T * column) @ Z)
    return total


# Coding rates ---------------------------------------------------------------------------------------------------------


def test_every_point_alone_costs_the_rate_of_one_vector():
    Z = unit(60, 12, 0)
    value = coding_rate_membership(Z, torch.eye(60, dtype=torch.float64), 0.2)
    assert float(value) == pytest.approx(math.log1p(12 / 0.2), rel=1e-12)
    assert float(value) == pytest.approx(4.110873864, abs=1e-9)


@given(n=st.integers(2, 20), d=st.integers(1, 8), eps_sq=st.floats(0.05, 2), seed=seeds)
def test_one_cluster_for_all_gains_nothing(n, d, eps_sq, seed):
    Z = unit(n, d, seed)
    uniform = torch.full((n, n), 1 / n, dtype=torch.float64)
    torch.testing.assert_close(coding_rate_membership(Z, uniform, eps_sq), coding_rate(Z, eps_sq))


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=seeds)
def test_block_constant_membership_is_the_rate_of_hard_labels(sizes, seed):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    Z = unit(len(labels), 5, seed)
    hard = F.one_hot(labels).double()
    blocks = (hard / hard.sum(0)) @ hard.T
    expected = coding_rate_membership(Z, hard, 0.2)
    torch.testing.assert_close(coding_rate_membership(Z, blocks, 0.2), expected)
    torch.testing.assert_close(expected, rate_by_lu(Z, hard, 0.2))


def test_orthogonal_subspaces_reach_the_ideal_and_nothing_exceeds_it():
    d, k, r = 12, 3, 4
    Z = torch.eye(d, dtype=torch.float64).repeat(5, 1)
    labels = (torch.arange(d) // r).repeat(5)
    hard = F.one_hot(labels).double()
    whole, parts = float(coding_rate(Z, 0.2)), float(coding_rate_membership(Z, hard, 0.2))
    assert whole == pytest.approx(21.50111363, abs=1e-8)
    assert parts == pytest.approx(11.09035489, abs=1e-8)
    best = ideal_rate_reduction(d, k, 0.2)
    assert whole - parts == pytest.approx(best, rel=1e-12)
    for seed in range(20):
        other = unit(60, d, seed)
        assert float(coding_rate(other, 0.2) - coding_rate_membership(other, hard, 0.2)) < best


@given(n=st.integers(1, 12), d=st.integers(1, 12), seed=seeds)
def test_both_gram_matrices_have_the_same_determinant(n, d, seed):
    Z = unit(n, d, seed)
    a = d / (n * 0.3)
    wide = torch.logdet(torch.eye(n, dtype=torch.float64) + a * Z @ Z.T)
    tall = torch.logdet(torch.eye(d, dtype=torch.float64) + a * Z.T @ Z)
    torch.testing.assert_close(wide, tall)
    torch.testing.assert_close(coding_rate(Z, 0.3), tall)


@given(n=st.integers(2, 10), d=st.integers(1, 6), chunk=st.integers(1, 11), seed=seeds)
def test_rotation_order_and_chunks_change_nothing(n, d, chunk, seed):
    Z = unit(n, d, seed)
    generator = torch.Generator().manual_seed(seed)
    G = torch.rand(n, n, dtype=torch.float64, generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=generator))[0]
    order = torch.randperm(n, generator=generator)
    expected = coding_rate_membership(Z, G, 0.2)
    torch.testing.assert_close(coding_rate(Z[order] @ rotation, 0.2), coding_rate(Z, 0.2))
    torch.testing.assert_close(coding_rate_membership(Z[order] @ rotation, G[order][:, order], 0.2), expected)
    torch.testing.assert_close(coding_rate_membership(Z, G, 0.2, chunk=chunk), expected)


@pytest.mark.parametrize("chunk", [None, 2])
def test_derivatives_of_the_rates(chunk):
    Z = unit(7, 4, 1).requires_grad_()
    G = torch.rand(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda Z: coding_rate(Z, 0.2), (Z,))
    assert torch.autograd.gradcheck(lambda Z: coding_rate(Z[:3], 0.2), (Z,))
    assert torch.autograd.gradcheck(lambda Z, G: coding_rate_membership(Z, G, 0.2, chunk), (Z, G))
    (alone,) = torch.autograd.grad(coding_rate_membership(Z, G.detach(), 0.2), Z)
    (both,) = torch.autograd.grad(rate_by_lu(Z, G.detach(), 0.2), Z)
    torch.testing.assert_close(alone, both)


def test_empty_clusters_and_zero_rows_count_nothing():
    Z = torch.cat([unit(4, 3, 0), torch.zeros(1, 3, dtype=torch.float64)]).requires_grad_()
    G = torch.cat([torch.ones(5, 1), torch.zeros(5, 1)], dim=1).double().requires_grad_()
    value = coding_rate_membership(Z, G, 0.2)
    torch.testing.assert_close(value, coding_rate(Z, 0.2))
    value.backward()
    assert Z.grad.isfinite().all()
    assert G.grad[:, 0].isfinite().all()


def test_half_precision_is_worked_on_in_single():
    Z = unit(10, 4, 0)
    low = coding_rate(Z.bfloat16(), 0.2)
    assert low.dtype == torch.float32
    assert float(low) == pytest.approx(float(coding_rate(Z, 0.2)), rel=1e-2)


def test_coding_length_prefers_the_true_clusters():
    generator = torch.Generator().manual_seed(0)
    Z = torch.zeros(60, 6, dtype=torch.float64)
    for k in range(3):
        Z[20 * k : 20 * k + 20, 2 * k : 2 * k + 2] = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    Z = F.normalize(Z, dim=1)
    true = torch.arange(60) // 20
    for wrong in (true // 2, torch.arange(60) // 10, true[torch.randperm(60, generator=generator)]):
        assert coding_length(Z, true) < coding_length(Z, wrong)
    assert mean_cosine_between(Z, true) < 1e-12


def test_numerical_rank():
    assert numerical_rank(torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.01]))) == 3
    assert numerical_rank(torch.eye(5), energy=1.0) == 5
    assert numerical_rank(torch.zeros(4, 2)) == 0
    with pytest.raises(ValueError, match="Z holds NaN"):
        numerical_rank(torch.full((2, 2), torch.nan))


# Projections ----------------------------------------------------------------------------------------------------------


def affinities(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@given(n=st.integers(2, 12), eta=st.floats(0.02, 5), seed=seeds)
def test_cosines_converge_by_halves_at_any_entropy(n, eta, seed):
    C = unit(n, 4, seed)
    found = balance(C @ C.T, eta, tol=1e-9, symmetric=True)
    assert found.status is Status.CONVERGED
    assert found.error < 1e-8
    assert found.steps < 45 + math.log2(1 + 2 / eta)
    assert (found.membership >= 0).all()
    torch.testing.assert_close(found.membership, found.membership.T, atol=1e-15, rtol=1e-14)


@given(n=st.integers(1, 12), eta=st.floats(1, 5), seed=seeds)
def test_converged_membership_is_doubly_stochastic(n, eta, seed):
    found = balance(affinities(n, seed), eta, tol=1e-9)
    assert found.status is Status.CONVERGED
    assert found.error < 1e-8
    C = unit(n, 4, seed)
    twice = balance(C @ C.T, eta, tol=1e-10).membership
    torch.testing.assert_close(twice, twice.T, atol=1e-7, rtol=0)
    once = balance(C @ C.T, eta, tol=1e-10, symmetric=True).membership
    torch.testing.assert_close(once, twice, atol=1e-7, rtol=0)
    far = 1e4 * C @ C.T  # beyond what scalings can hold: the log domain
    found = balance(far, eta, tol=1e-8, symmetric=True)
    assert found.status is Status.CONVERGED


@given(n=st.integers(1, 8), half_steps=st.integers(1, 9), eta=st.floats(0.05, 3), seed=seeds)
def test_scaling_is_the_log_domain_iteration(n, half_steps, eta, seed):
    S = affinities(n, seed)
    K = S / eta
    u, v = torch.zeros(n, 1, dtype=torch.float64), torch.zeros(1, n, dtype=torch.float64)
    for step in range(half_steps):
        if step % 2 == 0:
            u = -torch.logsumexp(K + v, 1, keepdim=True)
        else:
            v = -torch.logsumexp(K + u, 0, keepdim=True)
    expected = (K + u + v).exp()
    torch.testing.assert_close(sinkhorn_projection(S, eta, half_steps), expected)
    torch.testing.assert_close(sinkhorn_projection(S, eta, half_steps, spread=1e9), expected)  # takes the log domain
    torch.testing.assert_close(sinkhorn_projection_(S.clone(), eta, half_steps), expected)
    sums = expected.sum(1 if half_steps % 2 else 0)
    torch.testing.assert_close(sums, torch.ones_like(sums))


@pytest.mark.parametrize("half_steps", [1, 2, 5, 6])
@pytest.mark.parametrize("detach_v", [False, True])
def test_gradient_through_the_half_steps(half_steps, detach_v):
    S = torch.stack([affinities(5, 0), affinities(5, 1)]).requires_grad_()
    cotangent = torch.stack([affinities(5, 2), affinities(5, 3)])
    if not detach_v:
        assert torch.autograd.gradcheck(lambda S: sinkhorn_projection(S, 0.5, half_steps), (S,))
    by_scaling = sinkhorn_projection(S, 0.5, half_steps, detach_v=detach_v)
    by_autograd = sinkhorn_projection(S, 0.5, half_steps, detach_v=detach_v, spread=1e9)
    (ours,) = torch.autograd.grad(by_scaling, S, cotangent)
    (theirs,) = torch.autograd.grad(by_autograd, S, cotangent)
    torch.testing.assert_close(ours, theirs)


def test_implicit_gradient_is_that_of_many_half_steps():
    S = affinities(8, 5).requires_grad_()
    cotangent = affinities(8, 6)
    (unrolled,) = torch.autograd.grad(sinkhorn_projection(S, 0.5, 2000), S, cotangent)
    (implicit,) = torch.autograd.grad(balance(S, 0.5, tol=1e-13).membership, S, cotangent)
    torch.testing.assert_close(implicit, unrolled, atol=1e-9, rtol=1e-7)
    assert not balance(S, 0.5, gradient="none").membership.requires_grad


@given(n=st.integers(2, 8), seed=seeds)
def test_constants_on_rows_and_columns_do_not_matter(n, seed):
    S, a, b = affinities(n, seed), affinities(n, seed + 1)[0], affinities(n, seed + 2)[0]
    expected = balance(S, 0.5, tol=1e-10).membership
    torch.testing.assert_close(balance(S + a[:, None] + b, 0.5, tol=1e-10).membership, expected, atol=1e-7, rtol=0)


def test_limits_of_the_entropy_weight():
    S = affinities(6, 0)
    uniform = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    torch.testing.assert_close(balance(S, 1e6).membership, uniform, atol=1e-6, rtol=0)
    C = unit(6, 6, 0)
    sharp = balance(C @ C.T, 0.002, symmetric=True).membership
    torch.testing.assert_close(sharp, torch.eye(6, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("half_steps", [5, 6])
def test_extreme_affinities_stay_finite_in_single_precision(half_steps):
    S = (1000 * affinities(20, 0)).float().requires_grad_()
    G = sinkhorn_projection(S, 1.0, half_steps)
    assert G.isfinite().all()
    G.square().sum().backward()
    assert S.grad.isfinite().all()
    assert balance(S.detach(), 1.0, max_half_steps=50).membership.isfinite().all()


def test_a_projection_that_does_not_converge_says_so():
    found = balance(30 * affinities(20, 0), 1.0, tol=1e-12, max_half_steps=4)
    assert found.status is Status.STEP_LIMIT
    assert found.error > 1e-12
    assert found.steps == 4
    assert euclidean_projection(30 * affinities(20, 0), 1.0, max_rounds=2).status is Status.STEP_LIMIT


@given(n=st.integers(1, 8), eta=st.floats(0.2, 5), seed=seeds)
def test_euclidean_projection_is_the_nearest(n, eta, seed):
    S = affinities(n, seed)
    found = euclidean_projection(S, eta, tol=1e-9)
    assert found.status is Status.CONVERGED
    G = found.membership
    assert (G >= 0).all()
    # variational inequality of a projection, against vertices of the polytope
    rng = np.random.default_rng(seed)
    for _ in range(10):
        vertex = torch.eye(n, dtype=torch.float64)[torch.from_numpy(rng.permutation(n))]
        assert float(((S / eta - G) * (vertex - G)).sum()) <= 1e-5 * (1 + float((S / eta).abs().max()))


def test_in_place_projection_allocates_nothing_of_its_size():
    n = 256
    C = F.normalize(torch.randn(2, n, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    S, workspace = C @ C.mT, torch.empty(2, 2, n)
    expected = sinkhorn_projection(S, 0.175, 6)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        found = sinkhorn_projection_(S, 0.175, 6, workspace)
    assert found is S
    torch.testing.assert_close(found, expected)
    most = max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0)
    assert most < n * n * 4


# Golden vectors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlc_a", "mlc_b"])
def test_golden_vectors(golden, name):
    with np.load(golden / "08-manifold-linearizing" / f"{name}.npz", allow_pickle=False) as file:
        g = {key: file[key] for key in file.files}
    Z, C = torch.tensor(g["Z"], requires_grad=True), torch.tensor(g["C"])
    eta, eps_sq = float(g["eta"]), float(g["eps_sq"])
    G = sinkhorn_projection((C @ C.T).abs(), eta, int(g["half_iters"]))
    np.testing.assert_allclose(G.numpy(), g["Gamma_abs"], rtol=1e-4, atol=1e-6)
    half_R, half_Rc = coding_rate(Z, eps_sq) / 2, coding_rate_membership(Z, G, eps_sq) / 2
    assert half_R.item() == pytest.approx(float(g["half_R"]), rel=1e-4)
    assert half_Rc.item() == pytest.approx(float(g["half_Rc"]), rel=1e-4)
    loss = half_Rc - half_R
    assert loss.item() == pytest.approx(float(g["loss"]), rel=1e-4)
    loss.backward()
    np.testing.assert_allclose(Z.grad.numpy(), g["grad_Z"], rtol=1e-3, atol=1e-4 * np.abs(g["grad_Z"]).max())
    found = balance(C @ C.T, eta)
    np.testing.assert_allclose(found.membership.numpy(), g["Gamma_noabs_converged"], rtol=1e-4, atol=1e-5)
    without = coding_rate_membership(Z, found.membership, eps_sq) / 2
    assert without.item() == pytest.approx(float(g["half_Rc_noabs"]), rel=1e-4)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_bad_arguments_are_named(without_shape_checks):
    Z, S = unit(4, 3, 0), affinities(4, 0)
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="eps_sq"):
            coding_rate(Z, bad)
        with pytest.raises(ValueError, match="eta"):
            sinkhorn_projection(S, bad)
    with pytest.raises(ValueError, match="membership must have a row"):
        coding_rate_membership(Z, S[:3], 0.2)
    with pytest.raises(ValueError, match="square"):
        sinkhorn_projection(Z, 0.2)
    with pytest.raises(ValueError, match="half_steps"):
        sinkhorn_projection(S, 0.2, 0)
    with pytest.raises(ValueError, match="S holds NaN"):
        balance(torch.full((3, 3), torch.nan), 0.2)
    with pytest.raises(ValueError, match="S holds NaN"):
        euclidean_projection(torch.full((3, 3), torch.inf), 0.2)
    with pytest.raises(ValueError, match="workspace"):
        sinkhorn_projection_(S, 0.2, 5, torch.empty(1, 4))
    with pytest.raises(ValueError, match="requires gradients"):
        sinkhorn_projection_(S.clone().requires_grad_(), 0.2)
    with pytest.raises(ValueError, match="d must be a multiple"):
        ideal_rate_reduction(10, 3, 0.2)
    with pytest.raises(ValueError, match="labels"):
        coding_length(Z, torch.zeros(3, dtype=torch.long))
