"""The learners: distributions, estimators and fits against closed forms, SciPy, golden vectors; regret; open asks."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import brentq, lsq_linear

from locally.solvers.omega_bandit import (
    BinnedTsallisINF,
    ChebCB,
    Choice,
    ParameterBandit,
    TsallisINF,
    box_least_squares,
    inverse_gap_weights,
    tsallis_weights,
)

GRID = np.linspace(1, 1.95, 20)
LEARNERS = {
    "iw": lambda rng: TsallisINF(GRID, rng=rng),
    "rv": lambda rng: TsallisINF(GRID, estimator="rv", rng=rng),
    "binned": lambda rng: BinnedTsallisINF(GRID, (0.0, 1.0), n_bins=3, rng=rng),
    "chebyshev": lambda rng: ChebCB(GRID, (0.0, 1.0), rng=rng),
}
learners = pytest.mark.parametrize("make", LEARNERS.values(), ids=LEARNERS.keys())
losses = hnp.arrays(np.float64, st.integers(1, 25), elements=st.floats(0, 1e7))
etas = st.floats(1e-4, 10)


@pytest.fixture
def vectors(golden):
    with np.load(golden / "09-learning-to-relax" / "sor_bandit.npz") as z:
        return dict(z)


# Tsallis-INF


@given(losses, etas)
def test_tsallis_weights_are_a_distribution_that_falls_with_the_loss(k, eta):
    p, x = tsallis_weights(k, eta)
    assert abs(p.sum() - 1) <= 1e-10
    assert (p > 0).all()
    assert x < k.min()
    assert (np.diff(p[np.argsort(k)]) <= 1e-15).all()
    np.testing.assert_allclose(p, 4 / (eta * (k - x)) ** 2, rtol=1e-6)


@given(losses, etas, st.floats(-1e6, 1e6))
def test_tsallis_weights_do_not_see_a_constant_added_to_all_losses(k, eta, constant):
    k = np.round(k)  # so that the sum is exact
    constant = float(np.round(constant))
    p, x = tsallis_weights(k, eta)
    shifted, moved = tsallis_weights(k + constant, eta)
    np.testing.assert_array_equal(p, shifted)
    assert moved == pytest.approx(x + constant, rel=1e-9, abs=1e-3)


@given(st.floats(0, 1e5), st.floats(0, 1e5), etas)
def test_two_arms_solve_the_normalisation_exactly(first, second, eta):
    gap = eta * abs(first - second)
    # in z = eta (min - x): 4/z^2 + 4/(gap + z)^2 = 1
    z = brentq(lambda z: 4 / z**2 + 4 / (gap + z) ** 2 - 1, 2 * (1 - 1e-12), 2 * np.sqrt(2) * (1 + 1e-12), xtol=1e-14)
    p, _ = tsallis_weights(np.array([first, second]), eta)
    np.testing.assert_allclose(p.max(), 4 / z**2, rtol=1e-9)


def test_equal_losses_are_uniform_and_one_arm_is_certain():
    p, x = tsallis_weights(np.full(16, 3.0), 0.5)
    np.testing.assert_allclose(p, 1 / 16)
    assert x == pytest.approx(3 - 2 * 4 / 0.5)
    assert tsallis_weights(np.array([7.0]), 0.5)[0] == pytest.approx([1.0])


def test_tsallis_weights_are_the_golden_ones(vectors):
    for k, eta, p, x in zip(vectors["ts_loss"], vectors["ts_eta"], vectors["ts_prob"], vectors["ts_x"]):
        ours, at = tsallis_weights(k, float(eta))
        np.testing.assert_allclose(ours, p, rtol=1e-10)
        assert at == pytest.approx(x, rel=1e-10)


@pytest.mark.parametrize("estimator", ["iw", "rv"])
def test_loss_estimates_are_unbiased(estimator):
    """Sum over arms of p_i (estimate after playing i) is the true loss of every arm."""
    rng = np.random.default_rng(0)
    bandit = TsallisINF(GRID[:4], estimator=estimator, scale=10.0, rng=rng)
    for _ in range(60):  # past the rounds at which the reduced-variance baseline is zero
        bandit.tell(rng.uniform(1, 11), bandit.ask())
    state, p = bandit.state_dict(), bandit.distribution()
    costs = np.array([3.0, 9.0, 5.0, 1.0])
    before = np.array(state["state"]["bins"][0]["cumulative"])
    expected = np.zeros(4)
    for arm in range(4):
        bandit.load_state_dict(state)
        memory = bandit._remember(None, p, arm)
        if estimator == "rv":
            assert max(memory) == 5.0
        bandit._learn(Choice(0, arm, 0.0, float(p[arm])), memory, float(costs[arm]))
        expected += p[arm] * (np.array(bandit.state_dict()["state"]["bins"][0]["cumulative"]) - before)
    np.testing.assert_allclose(expected, costs - 1, rtol=1e-10)


@pytest.mark.parametrize("estimator", ["iw", "rv"])
def test_mean_regret_on_two_bernoulli_arms_is_below_the_bound(estimator, without_shape_checks):
    T, gap, regrets = 10_000, 0.2, []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        bandit = TsallisINF([1.0, 2.0], scale=1.0, estimator=estimator, min_cost=0.0, rng=rng)
        wrong = 0
        for heads in rng.random(T).tolist():
            choice = bandit.ask()
            wrong += choice.arm
            bandit.tell(float(heads < 0.4 + gap * choice.arm), choice)
        regrets.append(gap * wrong)
    assert np.mean(regrets) < 4 * np.sqrt(2 * T) / 4  # bound for any sequence; with a gap the regret is logarithmic


def test_recovers_when_the_best_arm_changes_against_it():
    T = 4000
    bandit = TsallisINF([1.0, 2.0], scale=1.0, min_cost=0.0, rng=0)
    total = 0.0
    for t in range(T):
        choice = bandit.ask()
        cost = float(choice.arm == 0) if t >= T // 4 else float(choice.arm == 1)
        total += cost
        bandit.tell(cost, choice)
    assert total - T / 4 <= 4 * np.sqrt(2 * T) + 1  # arm 1 is the best fixed arm and costs T/4
    assert bandit.distribution()[1] > 0.95


def test_distribution_follows_the_scale_of_the_costs():
    """Ten times the excess cost on the same choices leaves every distribution as it was."""
    one, ten = TsallisINF(GRID, rng=5), TsallisINF(GRID, rng=5)
    rng = np.random.default_rng(1)
    for excess in rng.uniform(0, 50, 200).tolist():
        a, b = one.ask(), ten.ask()
        assert a.arm == b.arm
        one.tell(1 + excess * a.value, a)
        ten.tell(1 + 10 * excess * b.value, b)
        np.testing.assert_allclose(one.distribution(), ten.distribution(), rtol=1e-9)


def test_costs_at_their_minimum_leave_nothing_to_scale():
    bandit = TsallisINF(GRID, rng=0)
    for cost in (1, 1, 0):  # a solve that needed no iteration counts as one that needed the fewest
        bandit.tell(cost, bandit.ask())
    np.testing.assert_allclose(bandit.distribution(), 1 / 20)


def test_bins_learn_apart_and_contexts_go_to_the_nearest_centre():
    bandit = BinnedTsallisINF(GRID, (0.0, 1.0), n_bins=4, rng=0)
    for _ in range(20):
        choice = bandit.ask(0.3)
        bandit.tell(1 + 10 * choice.arm, choice)
    learnt = bandit.distribution(0.3)
    assert learnt[0] > 1 / 20
    for context in (0.26, 0.49):
        np.testing.assert_array_equal(bandit.distribution(context), learnt)
    for context in (0.24, 0.51, 0.0, 1.0):
        np.testing.assert_allclose(bandit.distribution(context), 1 / 20)


# ChebCB


@given(hnp.arrays(np.float64, st.integers(1, 25), elements=st.floats(-1e3, 1e3)), st.floats(0, 1e8))
def test_inverse_gap_weights_are_a_distribution_that_favours_the_best(y, eta):
    p = inverse_gap_weights(y, eta)
    assert p.sum() == pytest.approx(1, abs=1e-12)
    assert ((p > 0) & (p <= 1)).all()
    assert p[y.argmin()] == pytest.approx(p.max())
    assert p[y.argmin()] >= 1 / y.size - 1e-12


def test_inverse_gap_weights_at_the_ends():
    y = np.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(inverse_gap_weights(y, 0.0), 1 / 3)
    np.testing.assert_allclose(inverse_gap_weights(y, 1e12), [0, 1, 0], atol=1e-11)
    np.testing.assert_allclose(inverse_gap_weights(np.ones(5), 1e12), 1 / 5)


def test_features_are_chebyshev_polynomials():
    bandit = ChebCB(GRID, (-0.15, 0.65), degree=7)
    for context in np.linspace(-0.15, 0.65, 9).tolist():
        u = 2 * (context + 0.15) / 0.8 - 1
        np.testing.assert_allclose(bandit._features(context), np.polynomial.chebyshev.chebvander([u], 7)[0], atol=1e-12)


@given(
    st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32 - 1), st.floats(1e-3, 3), st.booleans()
)  # fmt: skip
def test_box_least_squares_agrees_with_scipy(rows, m, seed, width, collinear):
    rng = np.random.default_rng(seed)
    A, b, bound = rng.standard_normal((rows, m)), 3 * rng.standard_normal(rows), width * rng.uniform(0.1, 1, m)
    if collinear and m > 1:
        A[:, -1] = A[:, 0]
    x, squares = box_least_squares(A, b, bound)
    assert (np.abs(x) <= bound * (1 + 1e-12)).all()
    peer = lsq_linear(A, b, (-bound, bound), method="bvls", tol=1e-13)
    assert squares <= 2 * peer.cost * (1 + 1e-7) + 1e-12 * (b @ b)


def test_fixed_coefficients_stay_fixed():
    x, squares = box_least_squares(np.eye(3), np.array([1.0, -5.0, 0.2]), np.array([0.0, 2.0, 1.0]))
    np.testing.assert_allclose(x, [0, -2, 0.2])
    assert squares == pytest.approx(1 + 9)


def test_replay_with_forced_actions_is_the_golden_one(vectors):
    bandit = ChebCB(vectors["omegas"], (-0.15, 0.65), degree=5)
    for t, arm in enumerate(vectors["cheb_actions"].tolist()):
        context = float(vectors["c"][t])
        p = bandit.distribution(context)
        np.testing.assert_allclose(p, vectors["cheb_probs"][t], rtol=1e-8, atol=1e-12)
        choice = Choice(t, arm, float(bandit.grid[arm]), float(p[arm]), context)
        bandit._learn(choice, bandit._remember(context, p, arm), float(vectors["sor_counts"][t, arm]))
        assert bandit.eta == pytest.approx(vectors["cheb_eta"][t], rel=1e-9)
        assert bandit.scale == pytest.approx(vectors["cheb_scale"][t], rel=1e-12)
    np.testing.assert_allclose(bandit.theta, vectors["cheb_theta"], atol=1e-10)


def test_a_smooth_cost_without_noise_is_fitted_exactly():
    """Polynomials of degree <= 3 inside the box: predictions are exact at contexts never seen."""
    cost = lambda arm, u: 100 + 3 * arm + 4 * u + 2 * u**2 - u**3
    bandit = ChebCB([1.0, 1.5], (-1.0, 1.0), degree=3, rng=0)
    for u in np.random.default_rng(0).uniform(-1, 1, 200).tolist():
        choice = bandit.ask(u)
        bandit.tell(cost(choice.arm, u), choice)
    for u in (-0.9, 0.05, 0.77):
        np.testing.assert_allclose(bandit.predict(u), [cost(0, u), cost(1, u)], rtol=1e-9)


def test_one_factor_holds_the_whole_history():
    """The running triangular factor gives the least-squares fit of all rounds of an arm."""
    bandit = ChebCB([1.0], (0.0, 1.0), degree=4, lipschitz=1e4, rng=0)
    rng = np.random.default_rng(2)
    contexts, costs = rng.random(50), 50 + rng.random(50)
    for context, cost in zip(contexts.tolist(), costs.tolist()):
        bandit.tell(cost, bandit.ask(context))
    features = np.polynomial.chebyshev.chebvander(2 * contexts - 1, 4)
    expected = np.linalg.lstsq(features, costs - 1, rcond=None)[0]
    np.testing.assert_allclose(bandit.scale * bandit.theta[0], expected, rtol=1e-9)


def test_a_given_lipschitz_constant_shapes_the_box():
    """With slope 0.5 allowed, a cost of slope 40 is predicted with at most what the coefficient bounds allow."""
    bandit = ChebCB([1.0], (0.0, 1.0), degree=1, lipschitz=0.5, rng=0)
    for context in np.linspace(0, 1, 50).tolist():
        bandit.tell(50 + 40 * context, bandit.ask(context))
    assert bandit.predict(1.0)[0] - bandit.predict(0.0)[0] <= 2 * 2 * 0.5 + 1e-9
    assert bandit.scale == pytest.approx(90 * (2 + 4 * 0.5 / 90 * (1 + np.log(2))))


def test_zero_costs_are_survived():
    bandit = ChebCB(GRID, (0.0, 1.0), min_cost=0.0, rng=0)
    for _ in range(5):
        bandit.tell(0.0, bandit.ask(0.5))
    np.testing.assert_allclose(bandit.distribution(0.5), 1 / 20)


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: TsallisINF(GRID, rng=1), 1.35),
        (lambda: BinnedTsallisINF(GRID, (0.0, 1.0), rng=1), 1.15),
        (lambda: ChebCB(GRID, (0.0, 1.0), rng=1), 0.75),
    ],
)
def test_context_pays_where_the_best_parameter_moves(make, limit):
    """Cost 20 + 400 (omega - best(c))^2: last-half cost beside that of the best fixed parameter."""
    bandit, rng = make(), np.random.default_rng(0)
    costs, fixed = [], []
    for context in rng.random(2000).tolist():
        every = 20 + 400 * (GRID - 1.1 - 0.7 * context) ** 2
        choice = bandit.ask(context)
        bandit.tell(float(every[choice.arm]), choice)
        costs.append(every[choice.arm])
        fixed.append(every)
    best = np.mean(fixed, axis=0).min()
    assert np.mean(costs[1000:]) <= limit * best


# Bookkeeping


@learners
def test_learners_keep_the_protocol_and_their_distributions_sum_to_one(make):
    bandit = make(0)
    assert isinstance(bandit, ParameterBandit)
    rng = np.random.default_rng(0)
    for context in rng.random(50).tolist():
        p = bandit.distribution(context)
        assert p.sum() == pytest.approx(1, abs=1e-10)
        assert (p > 0).all()
        choice = bandit.ask(context)
        assert choice.value == GRID[choice.arm]
        assert choice.probability == p[choice.arm]
        bandit.tell(rng.uniform(1, 100), choice)


@learners
def test_same_seed_same_choices(make):
    def play(bandit):
        arms = []
        for t in range(60):
            choice = bandit.ask(t / 60)
            arms.append(choice.arm)
            bandit.tell(10 + 5 * choice.arm, choice)
        return arms

    assert play(make(3)) == play(make(3))
    assert play(make(3)) != play(make(4))


def test_arms_are_drawn_with_their_probabilities():
    bandit = TsallisINF([1.0, 1.5, 1.9], rng=0)
    for cost in (5, 9, 2):
        bandit.tell(cost, bandit.ask())
    p, n = bandit.distribution(), 20_000
    frequencies = np.bincount([bandit.ask().arm for _ in range(n)], minlength=3) / n
    np.testing.assert_allclose(frequencies, p, atol=5 * np.sqrt(0.25 / n))


@learners
@pytest.mark.parametrize("generator", [np.random.PCG64, np.random.MT19937])
def test_a_checkpoint_through_json_continues_exactly(make, generator):
    def step(bandit, t):
        choice = bandit.ask((t % 7) / 7)
        bandit.tell(10 + choice.arm * (1 + t % 3), choice)
        return choice

    first = make(np.random.Generator(generator(11)))
    for t in range(40):
        step(first, t)
    waiting = first.ask(0.2)
    saved = json.loads(json.dumps(first.state_dict()))
    second = make(np.random.Generator(generator(0)))
    second.load_state_dict(saved)
    pickled = pickle.loads(pickle.dumps(first))
    assert second.open_asks == (waiting,)
    for bandit in (first, second, pickled):
        bandit.tell(33.0, waiting.token)
    for t in range(40):
        choice = step(first, t)
        assert step(second, t) == choice
        assert step(pickled, t) == choice


@learners
def test_a_state_of_another_learner_is_refused_and_changes_nothing(make):
    bandit, other = make(0), TsallisINF([1.0, 1.5])
    before = bandit.state_dict()
    with pytest.raises(ValueError, match=r"state must be of a learner with (learner|grid)"):
        bandit.load_state_dict(other.state_dict())
    foreign = make(np.random.Generator(np.random.Philox(0))).state_dict()
    with pytest.raises(ValueError, match="PCG64"):
        bandit.load_state_dict(foreign)
    changed = bandit.state_dict()
    changed["state"]["settings"] = {}
    with pytest.raises(ValueError, match="state must be of a learner with"):
        bandit.load_state_dict(changed)
    assert bandit.state_dict() == before


@learners
def test_a_damaged_state_is_refused_and_changes_nothing(make):
    """Compiled loops index by what a state holds and do not look."""
    bandit = make(0)
    bandit.tell(3.0, bandit.ask(0.2))
    bandit.ask(0.2)
    before = json.loads(json.dumps(bandit.state_dict()))
    for arm in (len(bandit.grid), -1):
        damaged = json.loads(json.dumps(before))
        damaged["open"][0][0]["arm"] = arm
        with pytest.raises(ValueError, match="state must hold asks of arms"):
            bandit.load_state_dict(damaged)
    inner = before["state"]
    for place in list(range(len(inner.get("bins", [])))) or ["theta", "factors", "played"]:
        damaged = json.loads(json.dumps(before))
        if isinstance(place, int):
            damaged["state"]["bins"][place]["cumulative"].pop()
        else:
            damaged["state"][place].pop()
        with pytest.raises(ValueError, match="state must hold"):
            bandit.load_state_dict(damaged)
    assert bandit.state_dict() == before


@learners
def test_costs_may_come_late_and_in_any_order(make):
    bandit = make(0)
    choices = [bandit.ask(t / 8) for t in range(8)]
    assert bandit.open_asks == tuple(choices)
    for choice in reversed(choices):
        bandit.tell(10.0 + choice.arm, choice)
    assert bandit.open_asks == ()
    with pytest.raises(RuntimeError, match="no open ask has token"):
        bandit.tell(10.0, choices[0])


def test_order_of_late_costs_does_not_matter_to_tsallis_inf():
    one, two = TsallisINF(GRID, rng=0), TsallisINF(GRID, rng=0)
    asked = [(one.ask(), two.ask()) for _ in range(6)]
    for a, _ in asked:
        one.tell(5.0 + a.token, a)
    for _, b in reversed(asked):
        two.tell(5.0 + b.token, b)
    np.testing.assert_allclose(one.distribution(), two.distribution(), rtol=1e-12)


def test_tell_without_a_choice_needs_exactly_one_open_ask():
    bandit = TsallisINF(GRID, rng=0)
    with pytest.raises(RuntimeError, match="0 asks are open"):
        bandit.tell(10.0)
    bandit.ask()
    bandit.tell(10.0)
    bandit.ask(), bandit.ask()
    with pytest.raises(RuntimeError, match="2 asks are open"):
        bandit.tell(10.0)


def test_a_cancelled_ask_teaches_nothing():
    bandit = TsallisINF(GRID, rng=0)
    before = bandit.distribution()
    choice = bandit.ask()
    bandit.cancel(choice)
    np.testing.assert_array_equal(bandit.distribution(), before)
    with pytest.raises(RuntimeError, match="no open ask"):
        bandit.tell(10.0, choice)


@pytest.mark.parametrize("cost", [float("nan"), float("inf"), -1.0])
def test_impossible_costs_are_refused_and_leave_the_ask_open(cost):
    bandit = TsallisINF(GRID, rng=0)
    choice = bandit.ask()
    with pytest.raises(ValueError, match="cost"):
        bandit.tell(cost, choice)
    assert bandit.open_asks == (choice,)


@pytest.mark.parametrize("make", [BinnedTsallisINF, ChebCB])
@pytest.mark.parametrize("outside", ["clip", "raise"])
def test_contexts_out_of_bounds(make, outside):
    bandit = make(GRID, (0.0, 1.0), outside=outside, rng=0)
    for context in np.linspace(0, 1, 40).tolist():
        choice = bandit.ask(context)
        bandit.tell(10 + choice.arm * (1 + context), choice)
    if outside == "clip":
        np.testing.assert_array_equal(bandit.distribution(-3.0), bandit.distribution(0.0))
        np.testing.assert_array_equal(bandit.distribution(3.0), bandit.distribution(1.0))
    else:
        with pytest.raises(ValueError, match=r"context must lie in \[0, 1\]"):
            bandit.ask(3.0)
    for context in (None, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="context must be a finite number"):
            bandit.ask(context)
    assert bandit.open_asks == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TsallisINF([]), "grid"),
        (lambda: TsallisINF([1.0, 1.0]), "distinct"),
        (lambda: TsallisINF([1.0, np.inf]), "grid"),
        (lambda: TsallisINF(np.ones((2, 2))), "grid"),
        (lambda: TsallisINF(GRID, min_cost=-1.0), "min_cost"),
        (lambda: TsallisINF(GRID, scale=0.0), "scale"),
        (lambda: TsallisINF(GRID, lr=-1.0), "lr"),
        (lambda: BinnedTsallisINF(GRID, (1.0, 1.0)), "bounds"),
        (lambda: BinnedTsallisINF(GRID, (0.0, np.inf)), "bounds"),
        (lambda: BinnedTsallisINF(GRID, (0.0, 1.0), n_bins=0), "n_bins"),
        (lambda: ChebCB(GRID, (0.0, 1.0), degree=-1), "degree"),
        (lambda: ChebCB(GRID, (0.0, 1.0), lipschitz=0.0), "lipschitz"),
        (lambda: tsallis_weights(np.array([np.nan]), 1.0), "losses"),
        (lambda: tsallis_weights(np.zeros(2), 0.0), "eta"),
        (lambda: inverse_gap_weights(np.zeros(2), -1.0), "eta"),
        (lambda: box_least_squares(np.eye(2), np.ones(2), np.array([1.0, -1.0])), "bound"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"estimator": "none"}, "estimator"), ({"scale": "walking"}, "scale")],
)
def test_bad_choices_are_named(arguments, message, without_shape_checks):
    with pytest.raises(ValueError, match=message):
        TsallisINF(GRID, **arguments)
