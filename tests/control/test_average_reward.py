"""LOOP's planner against enumeration and reference vectors; Upsilon, switches, coverage, resuming, refusals."""

import copy
import json

import gymnasium
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.control.agents import Agent, play
from locally.control.average_reward import (
    LOOP,
    MLELOOP,
    OLSVI,
    PSRL,
    TSDE,
    UCRL2,
    DifferentialQLearning,
    FiniteModels,
    FiniteValue,
    HypothesisClass,
    KernelValue,
    LinearMixture,
    LinearValue,
    OptimisticQLearning,
    TabularValue,
    Walk,
    agec_linear,
    agec_of_run,
    agec_of_visits,
    optimistic_plan,
    run_continuing,
)
from locally.control.dynamic_programming import solve_average_reward
from locally.control.environments import (
    one_hot_features,
    random_linear_mdp,
    random_linear_mixture,
    riverswim,
    worlds,
)

seeds = st.integers(0, 2**32 - 1)
RIVER = riverswim()
SPAN = RIVER.solve().span
LINEAR = random_linear_mdp(6, 2, 3, rng=0)
MIXTURE = random_linear_mixture(5, 2, 3, rng=0)
CANDIDATES = [riverswim(up=up) for up in (0.1, 0.2, 0.35, 0.5)]
MODELS = [m.P for m in CANDIDATES], [m.R for m in CANDIDATES]

HORIZON = 2000
SETTING = {"horizon": HORIZON, "span": SPAN}
AGENTS = {
    "tables": (RIVER, lambda: LOOP(TabularValue(6, 2), rng=1, **SETTING)),
    "tables, span by data": (RIVER, lambda: LOOP(TabularValue(6, 2), horizon=HORIZON, span="auto", rng=1)),
    "features": (LINEAR, lambda: LOOP(LinearValue(LINEAR.features), rng=1, **SETTING)),
    "FOPO": (LINEAR, lambda: LOOP(LinearValue(LINEAR.features, trigger="determinant"), rng=1, **SETTING)),
    "kernel": (LINEAR, lambda: LOOP(KernelValue(np.full((12, 12), 0.2) + 0.8 * np.eye(12), 6), rng=1, **SETTING)),
    "mixture": (MIXTURE, lambda: LOOP(LinearMixture(MIXTURE.mixture, rewards=MIXTURE.R), rng=1, **SETTING)),
    "list": (RIVER, lambda: LOOP(FiniteValue.of_models(*MODELS), rng=1, **SETTING)),
    "models": (RIVER, lambda: MLELOOP(FiniteModels(*MODELS), rng=1, **SETTING)),
    "UCRL2": (RIVER, lambda: UCRL2(6, 2)),
    "PSRL": (RIVER, lambda: PSRL(6, 2, rng=1)),
    "TSDE": (RIVER, lambda: TSDE(6, 2, rng=1)),
    "optimistic Q": (RIVER, lambda: OptimisticQLearning(6, 2, **SETTING)),
    "differential Q": (RIVER, lambda: DifferentialQLearning(6, 2, rng=1)),
    "OLSVI": (LINEAR, lambda: OLSVI(LINEAR.features, **SETTING)),
}
CLASSES = ["tables", "features", "FOPO", "kernel", "mixture"]


# Planning -------------------------------------------------------------------------------------------------------------


def test_planner_reaches_the_enumerated_optimum(golden):
    known = json.loads((golden / "23-loop" / "optimistic_planner.json").read_text())["instances"]
    equal = 0
    for instance in known:
        P, r, n = (np.array(instance[k]) for k in ("P_hat", "r_hat", "n"))
        exact = optimistic_plan(P, r, 1 / n, instance["beta"], planner="enumerate")
        assert exact.gain == pytest.approx(instance["J_optimistic"], abs=1e-6)
        assert exact.policy.tolist() == instance["policy"]
        climbed = optimistic_plan(P, r, 1 / n, instance["beta"], rng=0)
        assert climbed.gain <= instance["J_optimistic"] + 1e-6
        equal += climbed.gain >= instance["J_optimistic"] - 1e-6
        plain = optimistic_plan(P, r, 1 / n, 0.0)
        assert plain.gain == pytest.approx(instance["J_plain"], abs=1e-6)
    assert equal >= 10


def estimate(seed, S=4, A=2):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(S), (S, A)), rng.random((S, A)), rng.integers(1, 60, (S, A)).astype(float)


@given(seed=seeds)
@settings(max_examples=6)
def test_no_optimism_is_certainty_equivalence_and_more_radius_never_claims_less(seed):
    P, r, n = estimate(seed)
    gains = [optimistic_plan(P, r, 1 / n, beta, planner="enumerate").gain for beta in (0.0, 0.01, 0.1, 1.0)]
    assert gains[0] == pytest.approx(solve_average_reward(P, r).gain, abs=1e-7)
    assert (np.diff(gains) >= -1e-9).all()


@given(seed=seeds)
@settings(max_examples=6)
def test_without_rewards_the_gain_is_homogeneous_in_the_radius(seed):
    P, r, n = estimate(seed)
    one, four = (optimistic_plan(P, 0 * r, 1 / n, beta, planner="enumerate").gain for beta in (0.1, 0.4))
    assert four == pytest.approx(2 * one, rel=1e-6)


@given(seed=seeds, span=st.floats(0.05, 3), beta=st.floats(0.01, 5))
@settings(max_examples=15)
def test_a_plan_solves_the_clipped_equation_inside_its_ellipsoid(seed, span, beta):
    P, r, n = estimate(seed)
    P = P * (n / (n + 1))[:, :, None]  # with the mass that a ridge leaves out
    plan = optimistic_plan(P, r, 1 / (n + 1), beta, span=span, ceiling=1.0, n_starts=2, rng=0)
    assert plan.converged
    np.testing.assert_allclose(plan.w, r + plan.bonus + P @ plan.V, atol=1e-9)
    top = np.minimum(plan.w, 1 + plan.V.max()).max(axis=1)
    np.testing.assert_allclose(np.minimum(top - plan.gain, span), plan.V, atol=1e-6)
    assert ((n + 1) * plan.bonus**2).sum() <= beta * (1 + 1e-9)
    assert plan.gain <= 1 + 1e-9
    assert plan.V.min() == 0


def test_the_bonus_direction_is_the_gradient_of_the_gain():
    """Raising any bonus by a little raises the gain by the long-run share of time there, clipped values included."""
    P, r, n = estimate(5)
    plan = optimistic_plan(P, r, 1 / n, 0.3, span=0.2, n_starts=1)
    assert plan.clipped
    share = plan.bonus * n / np.sqrt(0.3 * (plan.bonus**2 * n).sum() / 0.3)
    for cell in np.ndindex(4, 2):
        bump = np.zeros_like(r)
        bump[cell] = 1e-5
        up, down = (
            optimistic_plan(P, r + plan.bonus + s * bump, 1 / n, 0.0, span=0.2, tol=1e-12).gain for s in (1, -1)
        )
        slope = (up - down) / 2e-5
        assert (slope > 1e-4) == (share[cell] > 1e-6)


# Discrepancy and switches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CLASSES)
def test_upsilon_is_what_a_fresh_sum_gives_at_every_step(name, without_shape_checks):
    mdp, make = AGENTS[name]
    agent, walk = make(), Walk(mdp, seed=3)
    for _ in range(HORIZON if name == "tables" else 600):
        s, a = walk.state, agent.act(walk.state)
        following, reward = walk.step(a)
        agent.observe(s, a, reward, following)
        assert agent.upsilon_ == pytest.approx(agent.hypotheses.recomputed_discrepancy(), rel=1e-6, abs=1e-7)
    assert agent.n_switches_ > 0


@pytest.mark.parametrize("name", CLASSES)
def test_a_new_plan_lies_in_the_confidence_set_and_the_old_one_had_left_it(name, without_shape_checks):
    mdp, make = AGENTS[name]
    agent = make()
    upsilons = []
    for _ in range(600):
        before = agent.n_switches_, agent.upsilon_, agent.beta_
        run_continuing_step(agent, mdp, upsilons)
        if agent.n_switches_ > before[0] and name != "FOPO":
            assert before[1] >= 4 * before[2]
    for epoch in agent.epochs_:
        assert epoch.plan.converged
        if name != "mixture":  # whose simplex may miss the ellipsoid
            assert epoch.discrepancy <= epoch.beta * (1 + 1e-4)
    assert all(u < 4 * agent.beta_ for u in upsilons) or name == "FOPO"


def run_continuing_step(agent, mdp, upsilons):
    walk = agent.__dict__.setdefault("walk", Walk(mdp, seed=4))
    s, a = walk.state, agent.act(walk.state)
    upsilons.append(agent.upsilon_)
    following, reward = walk.step(a)
    agent.observe(s, a, reward, following)


@pytest.mark.parametrize("make", [FiniteValue.of_models, FiniteModels])
def test_the_truth_alone_is_never_given_up(make):
    agent = (LOOP if make is FiniteValue.of_models else MLELOOP)(make([RIVER.P], [RIVER.R]), beta_scale=1.0, **SETTING)
    found = run_continuing(RIVER, agent, HORIZON, seed=0)
    assert found.n_switches == 0
    assert found.expected[-1] == pytest.approx(0, abs=1e-9)


def test_a_list_of_values_keeps_the_losses_of_a_batch_computation():
    agent, walk = LOOP(FiniteValue.of_models(*MODELS), rng=0, **SETTING), Walk(RIVER, seed=0)
    steps = []
    for _ in range(300):
        s, a = walk.state, agent.act(walk.state)
        following, reward = walk.step(a)
        agent.observe(s, a, reward, following)
        steps.append((s, a, reward, following))
    hypotheses = agent.hypotheses
    s, a, r, following = (np.array(x) for x in zip(*steps, strict=True))
    for f, model in enumerate(CANDIDATES):
        solution = model.solve()
        targets = r + solution.bias[following]
        own = ((solution.q + solution.gain)[s, a.astype(int)] - targets) ** 2
        assert hypotheses.own_loss[f] == pytest.approx(own.sum(), rel=1e-8)
        for g, other in enumerate(CANDIDATES):
            backup = (other.R + other.P @ solution.bias)[s, a.astype(int)]
            assert hypotheses.other_loss[f, g] == pytest.approx(((backup - targets) ** 2).sum(), rel=1e-8)
    assert (hypotheses.excess() >= 0).all()


def test_likelihoods_and_distances_of_models_match_their_definitions():
    models = FiniteModels(*MODELS)
    models.plan(1.0, 1.0, np.random.default_rng(0))
    models.add(2, 1, 0.0, 3)
    models.add(5, 1, 1.0, 5)
    expected = [
        np.log(m.P[2, 1, 3]) + np.log(1 - m.R[2, 1]) + np.log(m.P[5, 1, 5]) + np.log(m.R[5, 1]) for m in CANDIDATES
    ]
    np.testing.assert_allclose(models.likelihoods, expected)
    f, likeliest = 3, models.likeliest()  # the strongest current has the largest gain
    tv = sum(np.abs(CANDIDATES[f].P[c] - CANDIDATES[likeliest].P[c]).sum() / 2 for c in ((2, 1), (5, 1)))
    assert models.discrepancy() == pytest.approx(tv)


def test_a_model_class_that_allows_nothing_observed_says_so():
    P = np.array(MODELS[0][:1])
    agent = MLELOOP(FiniteModels(list(P), MODELS[1][:1]), **SETTING)
    agent.act(0)
    agent.observe(0, 0, 0.0, 5)  # washed up at the far end
    agent._due = True
    with pytest.raises(ValueError, match="models must include one"):
        agent.act(5)


# Equivalences ---------------------------------------------------------------------------------------------------------


def test_tables_are_linear_in_one_hot_features():
    made = [TabularValue(6, 2), LinearValue(one_hot_features(6, 2))]
    agents = [LOOP(hypotheses, rng=5, **SETTING) for hypotheses in made]
    runs = [run_continuing(RIVER, agent, HORIZON, seed=2, keep=True) for agent in agents]
    np.testing.assert_array_equal(runs[0].switch_times, runs[1].switch_times)
    np.testing.assert_array_equal(runs[0].actions, runs[1].actions)


def test_a_linear_kernel_is_the_linear_class():
    flat = LINEAR.features.reshape(12, 3)
    agents = [
        LOOP(c, beta=0.5, rng=5, **SETTING) for c in (LinearValue(LINEAR.features), KernelValue(flat @ flat.T, 6))
    ]
    runs = [run_continuing(LINEAR, agent, HORIZON, seed=2, keep=True) for agent in agents]
    np.testing.assert_array_equal(runs[0].switch_times, runs[1].switch_times)
    np.testing.assert_array_equal(runs[0].actions, runs[1].actions)


def test_a_constant_added_to_listed_values_changes_nothing():
    solutions = [m.solve() for m in CANDIDATES]
    Q, J = np.array([s.q for s in solutions]), np.array([s.gain for s in solutions])
    runs = []
    for constant in (0.0, 3.0):
        agent = LOOP(FiniteValue(Q + constant, J), rng=0, **SETTING)
        runs.append(run_continuing(RIVER, agent, 800, seed=1, keep=True))
    np.testing.assert_array_equal(runs[0].switch_times, runs[1].switch_times)
    np.testing.assert_array_equal(runs[0].actions, runs[1].actions)


@pytest.mark.parametrize("name", list(AGENTS))
def test_compiled_stretches_and_gymnasium_steps_are_the_same_run(name, without_shape_checks):
    mdp, make = AGENTS[name]
    fast, slow = make(), make()
    one = run_continuing(mdp, fast, 700, seed=9, keep=True)
    other = run_continuing(worlds.ContinuingWorld(mdp), slow, 700, seed=9, keep=True)
    np.testing.assert_array_equal(one.states, other.states)
    np.testing.assert_array_equal(one.actions, other.actions)
    np.testing.assert_array_equal(one.realised, other.realised)
    np.testing.assert_array_equal(one.switch_times, other.switch_times)


@pytest.mark.parametrize("name", list(AGENTS))
def test_an_agent_put_away_goes_on_as_if_nothing_had_happened(name, without_shape_checks):
    mdp, make = AGENTS[name]
    assert isinstance(make(), Agent)
    whole, walk = make(), Walk(mdp, seed=6)
    run_continuing(walk, whole, 500)
    state, place = copy.deepcopy(whole.state_dict()), copy.deepcopy(walk.state_dict())
    ahead = run_continuing(walk, whole, 500, keep=True)
    again, elsewhere = make(), Walk(mdp, seed=77)
    again.load_state_dict(state)
    elsewhere.load_state_dict(place)
    resumed = run_continuing(elsewhere, again, 500, keep=True)
    np.testing.assert_array_equal(ahead.actions, resumed.actions)
    np.testing.assert_array_equal(ahead.realised, resumed.realised)
    np.testing.assert_array_equal(ahead.switch_times, resumed.switch_times)


# What the theorems promise --------------------------------------------------------------------------------------------


def test_the_truth_stays_in_the_confidence_set_of_tables(without_shape_checks):
    """Radius of the theory, 30 walks of 400 steps: at every switch, with probability 1 - delta."""
    w = RIVER.R + RIVER.P @ RIVER.solve().bias
    inside = 0
    for seed in range(30):
        tables = TabularValue(6, 2, lam=1.0, n_starts=1)
        agent = LOOP(tables, horizon=400, span=SPAN, beta_scale=1.0, rng=seed)
        run_continuing(RIVER, agent, 400, seed=seed)
        targets = tables.rewards + tables.arrivals @ RIVER.solve().bias
        n = tables.visits + 1
        inside += (n * (w - targets / n) ** 2).sum() <= agent.beta_ + (w**2).sum()  # the ridge's own share
    assert inside >= 28


def test_the_truth_stays_in_the_confidence_set_of_features(without_shape_checks):
    mdp = random_linear_mdp(rng=3)
    solution = mdp.solve()
    phi = mdp.features.reshape(-1, 4)
    w = np.linalg.lstsq(phi, (solution.q + solution.gain).ravel())[0]
    inside = 0
    for seed in range(20):
        linear = LinearValue(mdp.features, lam=1.0, n_starts=1)
        agent = LOOP(linear, horizon=400, span=solution.span, beta_scale=1.0, rng=seed)
        run_continuing(mdp, agent, 400, seed=seed)
        gap = w - linear.inverse @ (linear.sums + linear.arrivals @ solution.bias)
        inside += gap @ linear.gram @ gap <= (np.sqrt(agent.beta_) + np.linalg.norm(w)) ** 2
        assert all(epoch.plan.gain >= solution.gain - 1e-3 for epoch in agent.epochs_)
    assert inside >= 19


def test_loop_learns_to_swim_with_few_switches():
    agent = LOOP(TabularValue(6, 2), horizon=20_000, span=SPAN, rng=0)
    found = run_continuing(RIVER, agent, 20_000, seed=0, times=[5000, 10_000, 20_000])
    assert (agent.policy_ == 1).all()
    assert found.gain_gaps[-1] == pytest.approx(0, abs=1e-12)
    assert found.n_switches <= 12 * np.log2(20_000)
    assert found.expected[-1] < 0.1 * 20_000 * RIVER.solve().gain
    optimum = run_continuing(RIVER, MLELOOP(FiniteModels([RIVER.P], [RIVER.R]), **SETTING), 20_000, seed=0)
    assert optimum.realised[-1] == pytest.approx(0, abs=6 * np.sqrt(20_000))  # noise alone


def test_the_mixture_finds_its_parameter():
    mdp = random_linear_mixture(rng=5)
    hypotheses = LinearMixture(mdp.mixture, rewards=mdp.R)
    agent = LOOP(hypotheses, horizon=5000, span=mdp.solve().span, rng=0)
    found = run_continuing(mdp, agent, 5000, seed=0)
    assert found.gain_gaps[-1] < 0.01
    # value targets tell models apart by what they do to V alone
    theta = hypotheses._w
    assert theta.min() >= 0
    assert theta.sum() == pytest.approx(1)


def test_rewards_can_share_the_mixtures_parameter():
    mdp = random_linear_mixture(5, 2, 3, rng=2)
    psi = np.random.default_rng(0).random((5, 2, 3)) / 2
    theta = np.linalg.lstsq(mdp.mixture.reshape(-1, 3), mdp.P.ravel())[0]
    shared = type(mdp)(mdp.P, psi @ theta)
    agent = LOOP(LinearMixture(mdp.mixture, reward_features=psi), horizon=3000, span=shared.solve().span, rng=0)
    assert run_continuing(shared, agent, 3000, seed=0).gain_gaps[-1] < 0.02


# Coefficients ---------------------------------------------------------------------------------------------------------


def test_elliptical_potential_of_cells_is_that_of_one_hot_features():
    visits = np.array([[3, 0], [1, 5]])
    features = np.repeat(one_hot_features(2, 2).reshape(4, 4), visits.ravel(), axis=0)
    assert agec_linear(features, 0.5) == pytest.approx(agec_of_visits(visits, 0.5))


def test_estimated_coefficients_agree_with_the_definition_step_by_step():
    agent = LOOP(TabularValue(6, 2), rng=0, **SETTING)
    found = run_continuing(RIVER, agent, 400, seed=0, keep=True)
    plans = [next(e.plan for e in reversed(agent.epochs_) if e.start <= t) for t in range(400)]
    total = squares = past_sum = worst = 0.0
    for t, plan in enumerate(plans):
        error = np.minimum(plan.w, 1 + plan.V.max()) - RIVER.R - RIVER.P @ plan.V
        past = (error[found.states[:t], found.actions[:t]] ** 2).sum()
        here = abs(error[found.states[t], found.actions[t]])
        past_sum, worst = past_sum + past, max(worst, past)
        if past > 0:
            total, squares = total + here, squares + here**2
    estimate = agec_of_run(RIVER, agent.epochs_, found.states, found.actions)
    assert estimate.dominance == pytest.approx(total**2 / past_sum)
    assert estimate.transferability == pytest.approx(squares / (worst * np.log(400)))


# Refusals -------------------------------------------------------------------------------------------------------------


def test_bad_classes_are_refused_by_name():
    with pytest.raises(ValueError, match="features must have Euclidean norm"):
        LinearValue(np.ones((2, 2, 3)))
    with pytest.raises(ValueError, match="features holds NaN"):
        LinearValue(np.full((2, 2, 3), np.nan))
    with pytest.raises(ValueError, match="kernel must be positive semi-definite"):
        KernelValue(np.array([[0.0, 1.0], [1.0, 0.0]]), 2)
    with pytest.raises(ValueError, match="kernel must have n_states"):
        KernelValue(np.eye(3), 2)
    with pytest.raises(ValueError, match="mixture"):
        LinearMixture(MIXTURE.mixture * 2, rewards=MIXTURE.R)
    with pytest.raises(ValueError, match="exactly one of rewards"):
        LinearMixture(MIXTURE.mixture)
    with pytest.raises(ValueError, match=r"P\[0\] must sum to 1"):
        FiniteModels([RIVER.P * 0.5], [RIVER.R])
    with pytest.raises(ValueError, match=r"R\[0\] must lie in"):
        FiniteValue.of_models([RIVER.P], [RIVER.R * 3])
    with pytest.raises(ValueError, match="weakly communicating"):
        FiniteModels([np.eye(2)[:, None, :]], [np.array([[0.1], [0.2]])])
    with pytest.raises(ValueError, match="at most 4096 policies"):
        TabularValue(13, 2, planner="enumerate").plan(1.0, 1.0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"span": 0.0}, "span"),
        ({"span": -1.0}, "span"),
        ({"span": "wide"}, "span"),
        ({"span": np.nan}, "span"),
        ({"horizon": 0}, "horizon"),
        ({"delta": 1.0}, "delta"),
        ({"beta": -0.1}, "beta"),
        ({"beta_scale": 0.0}, "beta_scale"),
    ],
)
def test_bad_settings_are_refused_by_name(bad, name, without_shape_checks):
    with pytest.raises(ValueError, match=name):
        LOOP(TabularValue(2, 2), **(SETTING | bad))


def test_bad_steps_are_refused_and_leave_the_data_alone():
    agent = LOOP(TabularValue(6, 2), rng=0, **SETTING)
    agent.act(0)
    for step, name in {
        (0, 0, 1.5, 1): "reward",
        (0, 0, np.nan, 1): "reward",
        (6, 0, 0.0, 1): "observation",
        (0, 2, 0.0, 1): "action",
        (0, 0, 0.0, -1): "next_observation",
    }.items():
        with pytest.raises(ValueError, match=name):
            agent.observe(*step)
    with pytest.raises(TypeError, match="observation must be an integer"):
        agent.act(np.array([0.5]))
    with pytest.raises(ValueError, match="terminated"):
        agent.observe(0, 0, 0.0, 1, terminated=True)
    assert agent.hypotheses.visits.sum() == 0
    assert agent.n_steps_ == 0


def test_processes_and_agents_that_do_not_fit_are_refused_before_the_first_step(without_shape_checks):
    agent = LOOP(TabularValue(6, 2), rng=0, **SETTING)
    with pytest.raises(TypeError, match="observation_space must be Discrete"):
        run_continuing(gymnasium.make("MountainCarContinuous-v0"), agent, 10)
    with pytest.raises(TypeError, match=r"unwrapped\.mdp"):
        run_continuing(gymnasium.make("FrozenLake-v1"), agent, 10)
    with pytest.raises(ValueError, match="n_states = 8"):
        run_continuing(riverswim(8), agent, 10)
    with pytest.raises(TypeError, match="agent must have act"):
        run_continuing(RIVER, object(), 10)
    with pytest.raises(ValueError, match="times must ascend"):
        run_continuing(RIVER, agent, 10, times=[5, 5])
    assert agent.n_steps_ == 0


def test_the_wings_own_loop_plays_these_agents_too():
    agent = LOOP(TabularValue(6, 2), rng=0, **SETTING)
    rewards = play(agent, gymnasium.make("locally/RiverSwim-v0"), 300, seed=0)
    assert rewards.size == 300
    assert agent.n_steps_ == 300
    assert isinstance(agent.hypotheses, HypothesisClass)


def test_a_callback_ends_the_run():
    seen = []
    agent = UCRL2(6, 2)
    found = run_continuing(
        RIVER, agent, 1000, seed=0, times=[100, 200, 300], callback=lambda t: bool(seen.append(t)) or t == 200
    )
    assert seen == [100, 200]
    assert found.times.tolist() == [100, 200]
    assert agent.n_steps_ == 200
