"""Follow the leader: exact on the block, monotone, local, free of order; ridge regression is what it converges to."""

import tracemalloc

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import check_estimator

from locally.control.world_model import (
    LosseEncoder,
    LosseFTLRegressor,
    LosseStreams,
    forgetting_matrix,
    piecewise_random_walk,
    squared_losses,
)
from locally.control.world_model.gram import DenseGram, RowGram

GOLDEN = "26-losse-ftl/losse_rho{}.npz"


def sample(n, seed=0, width=2):
    X = np.random.default_rng(seed).uniform(-1, 1, (n, width))
    return X, np.column_stack([np.sin(3 * X[:, 0]), X[:, 0] * X[:, 1]])


@pytest.mark.parametrize("storage", ["dense", "rows"])
@pytest.mark.parametrize("rho", [1, 2, 3])
def test_the_stream_goes_as_the_reference_goes(golden, rho, storage):
    with np.load(golden / GOLDEN.format(rho)) as reference:
        _, _, kappa, n_bins, _, steps = (int(p) for p in reference["params"])
        model = LosseFTLRegressor(
            kappa, rho, n_bins, eps=float(reference["eps"]), projection=reference["projection"], storage=storage
        )
        X, Y = reference["X"], reference["Y"]
        for t in range(steps):
            guess = model.predict(X[t : t + 1]) if t else np.zeros((1, Y.shape[1]))
            np.testing.assert_allclose(guess[0], reference["online_pred"][t], atol=1e-9)
            model.partial_fit(X[t : t + 1], Y[t : t + 1])
        np.testing.assert_allclose(model.predict(reference["Xq"]), reference["final_pred"], atol=1e-9)
        np.testing.assert_allclose(model.coef_, reference["w"], atol=1e-9)
        np.testing.assert_allclose(model.xty_, reference["xty"], atol=1e-12)
        gram = sp.coo_array(
            (reference["gram_vals"], (reference["gram_rows"], reference["gram_cols"])), model.gram_.shape
        )
        assert abs(model.gram_ - gram).max() < 1e-12


def test_after_each_update_the_block_is_stationary_and_the_loss_has_not_risen():
    X, Y = sample(120)
    model = LosseFTLRegressor(8, random_state=0).fit(X[:1], Y[:1])
    for t in range(1, len(X)):
        model.leader_.add(*(part[0] for part in model.encoder_.encode(X[t : t + 1])), Y[t])
        total = np.sum(Y[: t + 1] ** 2)
        before = model.leader_.objective(total)
        S = model.encoder_.encode(X[t : t + 1])[0][0]
        model.leader_.solve_block(S)
        assert model.leader_.objective(total) <= before * (1 + 1e-12)
        assert np.linalg.norm(model.leader_.gradient()[S]) < 1e-9


def test_the_solved_block_is_the_batch_solution_with_the_other_weights_held():
    X, Y = sample(150, seed=1)
    model = LosseFTLRegressor(10, random_state=1).fit(X, Y)
    Phi = model.encoder_.transform(X).toarray()
    S = model.encoder_.encode(X[-1:])[0][0]
    rest = np.delete(np.arange(Phi.shape[1]), S)
    ridge = Ridge(alpha=1e-5 * len(X), fit_intercept=False, solver="svd")
    batch = ridge.fit(Phi[:, S], Y - Phi[:, rest] @ model.coef_[rest]).coef_.T
    np.testing.assert_allclose(model.coef_[S], batch, rtol=1e-8, atol=1e-8)


def test_where_one_cell_holds_all_data_it_is_ridge_regression():
    X = 1e-3 * np.random.default_rng(0).uniform(0.5, 1, (40, 2))
    y = X[:, 0]
    projection = np.abs(np.random.default_rng(1).normal(size=(2, 12)))  # all on one side of the middle node
    model = LosseFTLRegressor(6, 2, 4, projection=projection, eps=1e-3).fit(X, y)
    assert len(np.unique(model.encoder_.encode(X)[0])) == model.encoder_.n_active_
    Phi = model.encoder_.transform(X).toarray()
    ridge = Ridge(alpha=1e-3 * 40, fit_intercept=False).fit(Phi, y)
    np.testing.assert_allclose(model.predict(X), ridge.predict(Phi), rtol=1e-8)


@pytest.mark.parametrize("ridge", ["relative", "absolute"])
def test_sweeping_on_leads_to_ridge_regression(ridge):
    X, Y = sample(60)
    model = LosseFTLRegressor(4, 2, 3, eps=1e-2, ridge=ridge, n_sweeps=1, random_state=0).fit(X, Y)
    alpha = 1e-2 * (60 if ridge == "relative" else 1)
    model.sweep(6000)
    Phi = model.encoder_.transform(X)
    batch = Ridge(alpha=alpha, fit_intercept=False, solver="cholesky").fit(Phi.toarray(), Y)
    np.testing.assert_allclose(model.coef_, batch.coef_.T, atol=1e-6)
    assert model.grad_norm_ < 1e-6


def test_sweeps_during_the_stream_lower_the_loss():
    X, Y = sample(200)
    plain, swept = (LosseFTLRegressor(6, n_sweeps=n, random_state=0).fit(X, Y) for n in (0, 5))
    assert swept.grad_norm_ < plain.grad_norm_
    total = np.sum(Y**2)
    assert swept.leader_.objective(total) < plain.leader_.objective(total)


def test_the_full_leader_is_ridge_regression_after_every_sample():
    X, Y = sample(60)
    model = LosseFTLRegressor(5, 2, 3, eps=1e-3, solver="full", random_state=0)
    for t in range(len(X)):
        model.partial_fit(X[t : t + 1], Y[t : t + 1])
        Phi = model.encoder_.transform(X[: t + 1]).toarray()
        batch = Ridge(alpha=1e-3, fit_intercept=False, solver="svd").fit(Phi, Y[: t + 1])
        np.testing.assert_allclose(
            model.predict(X), batch.predict(model.encoder_.transform(X).toarray()), rtol=1e-8, atol=1e-8
        )
        loss = np.sum((batch.predict(Phi) - Y[: t + 1]) ** 2) + 1e-3 * np.sum(batch.coef_**2)
        assert model.hindsight_loss_ == pytest.approx(loss, rel=1e-8)


@given(seed=st.integers(0, 2**31))
def test_sums_and_the_full_leader_do_not_depend_on_the_order(seed):
    X, Y = sample(30)
    order = np.random.default_rng(seed).permutation(30)
    one, other = (LosseFTLRegressor(4, random_state=0, storage="rows").fit(X[o], Y[o]) for o in (slice(None), order))
    assert abs(one.gram_ - other.gram_).max() < 1e-12
    np.testing.assert_allclose(one.xty_, other.xty_, atol=1e-12)
    one, other = (
        LosseFTLRegressor(4, random_state=0, solver="full", eps=0.1).fit(X[o], Y[o]) for o in (slice(None), order)
    )
    np.testing.assert_allclose(one.predict(X), other.predict(X), atol=1e-10)


def test_an_update_leaves_predictions_far_away_as_they_were():
    model = LosseFTLRegressor(1, 1, 8, projection=np.ones((1, 1)))
    rng = np.random.default_rng(0)
    model.fit(rng.uniform(-4, 4, (200, 1)), rng.normal(size=200))
    far, near = np.array([[-3.0]]), np.array([[3.0]])
    assert not set(model.encoder_.encode(far)[0][0]) & set(model.encoder_.encode(near)[0][0])
    before = model.predict(far).copy()
    model.partial_fit(near, [5.0])
    assert (model.predict(far) == before).all()


def test_one_grid_of_one_dimension_is_linear_interpolation():
    model = LosseFTLRegressor(1, 1, 6, projection=np.ones((1, 1)))
    rng = np.random.default_rng(0)
    model.fit(rng.uniform(-3, 3, (100, 1)), rng.normal(size=100))
    x = np.linspace(-5, 5, 101)
    nodes = np.interp(6 / (1 + np.exp(-x)), np.arange(7), model.coef_[:, 0])
    np.testing.assert_allclose(model.predict(x[:, None]), nodes, atol=1e-12)


@given(D=st.integers(4, 60), updates=st.integers(1, 25), seed=st.integers(0, 2**31))
def test_rows_hold_what_the_dense_matrix_holds(D, updates, seed):
    rng = np.random.default_rng(seed)
    rows, dense = RowGram(D), DenseGram(D)
    W = rng.normal(size=(D, 2))
    for _ in range(updates):
        S = np.sort(rng.choice(D, size=rng.integers(1, D), replace=False)).astype(np.int64)
        v = rng.random(len(S))
        rows.add(S, v)
        dense.add(S, v)
        for one, other in zip(rows.block(S, W), dense.block(S, W)):
            np.testing.assert_allclose(one, other, atol=1e-12)
    np.testing.assert_allclose(rows.to_csr().toarray(), dense.matrix, atol=1e-12)
    again = RowGram(D)
    again.load_csr(rows.to_csr())
    again.add(S, v)
    rows.add(S, v)
    assert (again.to_csr() != rows.to_csr()).nnz == 0


def test_codes_of_a_million_nodes_fit_into_little_memory():
    tracemalloc.start()
    model = LosseFTLRegressor(8, 2, 353, random_state=0, memory_limit=256)
    X, Y = sample(300)
    model.fit(X, Y)
    peak = tracemalloc.get_traced_memory()[1] / 2**20
    tracemalloc.stop()
    assert model.encoder_.n_codes_ > 1_000_000
    assert peak < 150  # the dense matrix would take 8 TB
    pairs = model.leader_.gram.n_pairs
    assert pairs <= 300 * 32**2
    assert model.leader_.gram.columns.nbytes + model.leader_.gram.values.nbytes < 12 * 3 * pairs + 2**20
    dense = LosseFTLRegressor(8, 2, 353, random_state=0, storage="dense")
    with pytest.raises(MemoryError, match="dense Gram matrix of 1002528 x 1002528"):
        dense.fit(X, Y)


def test_the_sample_that_needs_more_memory_than_allowed_changes_nothing():
    X, Y = sample(400)
    model = LosseFTLRegressor(10, 2, 40, storage="rows", memory_limit=1.0, random_state=0)
    with pytest.raises(MemoryError, match="memory_limit is 1 MiB"):
        model.fit(X, Y)
    t = model.n_seen_
    before = model.coef_.copy(), model.gram_
    with pytest.raises(MemoryError):
        model.partial_fit(X[t : t + 1], Y[t : t + 1])
    small = LosseFTLRegressor(10, 2, 40, solver="full", memory_limit=0.01)
    with pytest.raises(MemoryError, match="full"):
        small.fit(X, Y)
    again = LosseFTLRegressor(10, 2, 40, storage="rows", random_state=0).fit(X[:t], Y[:t])
    np.testing.assert_array_equal(before[0], again.coef_)
    assert (before[1] != again.gram_).nnz == 0


def test_single_precision_weights_are_close(without_shape_checks):
    X, Y = sample(2000)
    one, other = (LosseFTLRegressor(6, dtype=d, random_state=0).fit(X, Y) for d in ("float64", "float32"))
    assert other.coef_.dtype == np.float32
    assert np.abs(one.predict(X) - other.predict(X)).max() < 1e-3 * np.abs(one.predict(X)).max()


def test_a_batch_is_solved_on_the_union_of_its_nodes():
    X, Y = sample(30)
    model = LosseFTLRegressor(5, update="batch", random_state=0).fit(X, Y)
    batch = Ridge(alpha=1e-5 * 30, fit_intercept=False, solver="svd").fit(model.encoder_.transform(X).toarray(), Y)
    np.testing.assert_allclose(model.predict(X), batch.predict(model.encoder_.transform(X).toarray()), atol=1e-7)


@pytest.mark.parametrize(
    "changes", [{}, {"storage": "rows"}, {"solver": "full"}, {"n_sweeps": 2}, {"dtype": "float32"}]
)
def test_resuming_goes_on_as_if_nothing_had_happened(changes):
    X, Y = sample(80)
    model = LosseFTLRegressor(6, random_state=3, sweep_memory=20, **changes).fit(X[:50], Y[:50])
    state = model.state_dict()
    model.partial_fit(X[50:], Y[50:])
    again = LosseFTLRegressor(6, random_state=99, sweep_memory=20, **changes)  # another seed: the state brings its own
    again.load_state_dict(state)
    again.partial_fit(X[50:], Y[50:])
    np.testing.assert_array_equal(model.predict(X), again.predict(X))
    with pytest.raises(ValueError, match="state must be of"):
        LosseFTLRegressor(7, **changes).load_state_dict(state)


def test_streams_in_lockstep_are_the_regressors(without_shape_checks):
    X, Y = sample(120)
    models = [LosseFTLRegressor(5, random_state=0).fit(X[e : e + 1], Y[e : e + 1]) for e in range(3)]
    streams = LosseStreams.of(models)
    for t in range(1, 30):
        rows = [3 * t + e for e in range(3)]
        streams.update(torch.from_numpy(X[rows]), torch.from_numpy(Y[rows]))
        for e, model in enumerate(models):
            model.partial_fit(X[rows[e] : rows[e] + 1], Y[rows[e] : rows[e] + 1])
    found = streams(torch.from_numpy(X).expand(3, -1, -1))
    for e, model in enumerate(models):
        np.testing.assert_allclose(found[e].numpy(), model.predict(X), atol=1e-8)
    with pytest.raises(ValueError, match="x must have shape"):
        streams.update(torch.zeros(2, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="y holds NaN"):
        streams.update(torch.zeros(3, 2), torch.full((3, 2), torch.nan))
    with pytest.raises(ValueError, match="soft bins"):
        LosseStreams(LosseEncoder(2, binning="hard").fit(X), 1)


def test_regret_grows_like_the_logarithm_of_time(without_shape_checks):
    rng = np.random.default_rng(0)
    X = rng.uniform(-1, 1, (1500, 1))
    y = X + 0.5 * rng.standard_normal((1500, 1))
    model = LosseFTLRegressor(4, 1, 4, solver="full", eps=1.0, random_state=0)
    losses = squared_losses(model, X, y)
    ends = np.unique(np.geomspace(30, 1500, 12).astype(int))
    prefixes = [LosseFTLRegressor(4, 1, 4, solver="full", eps=1.0, random_state=0).fit(X[:n], y[:n]) for n in ends]
    regret = np.cumsum(losses)[ends - 1] - [prefix.hindsight_loss_ for prefix in prefixes]
    assert (regret > 0).all()
    assert np.corrcoef(np.log(ends), regret)[0, 1] ** 2 > 0.95


def test_the_drifting_stream_has_one_law_at_every_difficulty():
    for d in (0.1, 0.5, 0.9):
        x, y = piecewise_random_walk(200_000, d, hold=2, rng=0)
        assert x.var() == pytest.approx(0.25, rel=0.1)
        np.testing.assert_allclose(y, np.sin(2 * np.pi * x**2))
    with pytest.raises(ValueError, match="difficulty"):
        piecewise_random_walk(10, 1.0)


def test_the_past_is_not_forgotten():
    x, y = piecewise_random_walk(1000, 0.9, hold=50, rng=0)
    model = LosseFTLRegressor(20, random_state=0)
    matrix = forgetting_matrix(model.partial_fit, model.predict, x, y, 5, threshold=0.1)
    assert np.triu(matrix).max() < 0.05
    with pytest.raises(ValueError, match="threshold"):
        forgetting_matrix(model.partial_fit, model.predict, x, y, 5, threshold=0.0)
    with pytest.raises(ValueError, match="equally many rows"):
        forgetting_matrix(model.partial_fit, model.predict, x[:3], y[:3], 5, threshold=0.1)


def test_scikit_learn_takes_it_for_its_own(without_shape_checks):
    check_estimator(LosseFTLRegressor(n_grids=20, n_bins=8), on_skip=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": 0.0}, "eps"),
        ({"solver": "exact"}, "solver"),
        ({"ridge": "relative", "solver": "full"}, 'ridge must be "absolute"'),
        ({"storage": "hash"}, "storage"),
        ({"dtype": "float16"}, "dtype"),
        ({"update": "row"}, "update"),
        ({"n_sweeps": -1}, "n_sweeps"),
        ({"memory_limit": 0.0}, "memory_limit"),
    ],
)
def test_arguments_out_of_range_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        LosseFTLRegressor(**changes).fit(*sample(3))


def test_data_that_do_not_fit_are_refused_before_any_update():
    X, Y = sample(10)
    model = LosseFTLRegressor(3, random_state=0).fit(X, Y)
    for bad in ((X[:, :1], Y), (X, Y[:, :1]), (X, Y[:, 0]), (np.full_like(X, np.nan), Y), (X, np.full_like(Y, np.inf))):
        with pytest.raises(ValueError, match=r"features|target|NaN|infinity"):
            model.partial_fit(*bad)
    assert model.n_seen_ == 10
    with pytest.raises(ValueError, match="remembered"):
        model.sweep(1)


def test_a_ridge_lost_in_rounding_is_raised_with_a_warning():
    X, Y = sample(40)
    model = LosseFTLRegressor(20, eps=1e-18, random_state=0)
    with pytest.warns(UserWarning, match="lost in rounding"):
        model.fit(X, Y)
    assert np.isfinite(model.coef_).all()
