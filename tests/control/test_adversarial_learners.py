"""Learners against the bandits that they become, against their own pieces, and as agents that stop and go on."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest

from locally.control.adversarial import (
    LSVIUCB,
    EpisodicAgent,
    Exp3,
    FixedPolicy,
    LinearMDPOptimizer,
    Parameters,
    PolicyOptimizer,
    covariance,
    dilated_bonus,
    exponential_weights,
    local_bonus,
    log_barrier_simplex,
    play_side_by_side,
    ridge_inverse,
)
from locally.control.agents import Agent, play
from locally.control.dynamic_programming import evaluate_policy, occupancy_measures
from locally.control.environments import AdversarialMDP, combination_lock, random_adversarial_mdp

K = 240
OPTIONS = {"eta_scale": 48.0, "beta_scale": 5e-4, "gamma": 4 / K}
MAKERS = {
    "log_barrier": lambda mdp: PolicyOptimizer(mdp.features, mdp.P, n_episodes=K, rng=1, **OPTIONS),
    "magnitude_reduced": lambda mdp: PolicyOptimizer(
        mdp.features, mdp.P, n_episodes=K, method="magnitude_reduced", n_estimate_samples=64, rng=1, **OPTIONS
    ),
    "dilated_hedge": lambda mdp: PolicyOptimizer(
        mdp.features, mdp.P, n_episodes=K, method="dilated_hedge", eta_scale=64.0, beta_scale=5e-4, rng=1
    ),
    "sampled": lambda mdp: PolicyOptimizer(
        mdp.features, mdp.P, n_episodes=K, covariance="sample", bonus="sample", rng=1, **OPTIONS
    ),
    "linear_mdp": lambda mdp: LinearMDPOptimizer(
        mdp.features,
        n_episodes=K,
        cover_episodes=30,
        known_up_to=60.0,
        gamma=0.3,
        eta_scale=48.0,
        beta_scale=5e-4,
        rng=1,
    ),
    "lsvi_ucb": lambda mdp: LSVIUCB(mdp.features, n_episodes=K),
    "exp3": lambda mdp: Exp3(3, 4, 6, n_episodes=K, eta_scale=16.0),
    "fixed": lambda mdp: FixedPolicy(np.full((3, 4, 6), 1 / 6), n_episodes=K),
}


@pytest.fixture(scope="module")
def mdp() -> AdversarialMDP:
    return random_adversarial_mdp(K, "drifting", rng=0)


@pytest.fixture(scope="module")
def bandit() -> AdversarialMDP:
    """One layer, one state, one-hot features: four arms."""
    thetas = np.random.default_rng(0).random((60, 1, 4))
    return AdversarialMDP(np.ones((1, 1, 4, 1)), np.eye(4).reshape(1, 1, 4, 4), thetas)


def bandit_rounds(learner, eta, weights):
    """Plays 60 rounds and holds the learner against FTRL on importance-weighted losses."""
    rng = np.random.default_rng(3)
    cumulative = np.zeros(4)
    for _ in range(60):
        p = weights(eta * cumulative)
        np.testing.assert_allclose(learner.policies[0, 0, 0], p, rtol=1e-6)
        a, loss = rng.choice(4, p=p), rng.random()
        cumulative[a] += loss / p[a]
        learner.tell(np.array([[0]]), np.array([[a]]), np.array([[loss]]))


def test_algorithm_1_is_the_log_barrier_bandit(bandit):
    learner = PolicyOptimizer(
        bandit.features, bandit.P, n_episodes=60, eta_scale=0.2, beta_scale=0.0, gamma=1e-12, rng=0
    )
    bandit_rounds(learner, learner.parameters[0].eta, log_barrier_simplex)


def test_algorithm_2_is_exp3(bandit):
    learner = PolicyOptimizer(
        bandit.features, bandit.P, n_episodes=60, method="magnitude_reduced", beta_scale=0.0, gamma=1e-12, rng=0
    )
    bandit_rounds(learner, learner.parameters[0].eta, exponential_weights)
    exp3 = Exp3(1, 1, 4, n_episodes=60)
    bandit_rounds(exp3, exp3.eta, exponential_weights)


@pytest.mark.parametrize("method", ["log_barrier", "magnitude_reduced"])
def test_one_episode_makes_the_golden_update(method, golden):
    path = golden / "19-adversarial-linear-mdp/small_linear_mdp.json"
    g = {name: np.array(value) for name, value in json.loads(path.read_text()).items()}
    P = np.einsum("hsad,hdt->hsat", g["phi"], g["mu"])
    theory = Parameters.of("log_barrier", n_actions=4, dim=3, horizon=3, n_episodes=100)
    learner = PolicyOptimizer(
        g["phi"],
        P / P.sum(axis=-1, keepdims=True),
        n_episodes=100,
        eta_scale=float(g["eta"]) / theory.eta,
        beta_scale=float(g["beta"] / (36 * g["eta"])),
        gamma=float(g["gamma"]),
        estimator="standard" if method == "log_barrier" else "magnitude_reduced",
        rng=0,
    )
    learner.load_state_dict(learner.state_dict() | {"cumulative": g["cum_cost"][None]})
    np.testing.assert_allclose(learner.policies[0], g["pi_logbarrier"], rtol=1e-9)
    s, a = g["trajectory"][:, :2].astype(int).T
    learner.tell(s[None], a[None], np.ascontiguousarray(g["trajectory"][:, 2])[None])
    estimate = g["Qhat_standard" if method == "log_barrier" else "Qhat_magnitude_reduced"]
    np.testing.assert_allclose(learner.cumulative[0], g["cum_cost"] + estimate - g["dilated_B"], rtol=1e-8, atol=1e-8)
    assert learner.lowest_scaled_estimate[0] == pytest.approx(float(g["eta"]) * min(estimate.min(), 0))


@pytest.mark.parametrize("name", ["log_barrier", "magnitude_reduced", "dilated_hedge", "lsvi_ucb"])
def test_runs_side_by_side_are_the_runs_alone(name, without_shape_checks):
    processes = [random_adversarial_mdp(K, "decoy", rng=seed) for seed in (0, 1)]
    stacked = SimpleNamespace(**{n: np.stack([getattr(p, n) for p in processes]) for n in ("features", "P")})
    both = MAKERS[name](stacked)
    alone = [MAKERS[name](p) for p in processes]
    if name == "magnitude_reduced":
        for learner in (both, *alone):
            learner.n_estimate_samples = None  # samples would come in another order
    rng = np.random.default_rng(0)
    for _ in range(20):
        states, actions = rng.integers(4, size=(2, 3)), rng.integers(6, size=(2, 3))
        losses = rng.random((2, 3))
        both.tell(states, actions, losses)
        for r, learner in enumerate(alone):
            learner.tell(states[[r]], actions[[r]], losses[[r]])
    np.testing.assert_allclose(both.policies, np.concatenate([l.policies for l in alone]), rtol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_an_agent_goes_on_from_its_state_as_if_nothing_had_happened(name, mdp, without_shape_checks):
    """Stops in the middle of an episode, in the epochs of Algorithm 3 as well."""
    pytest.importorskip("gymnasium")
    from locally.control.environments.worlds import AdversarialWorld

    def fresh():
        return EpisodicAgent.for_env(AdversarialWorld(mdp), MAKERS[name](mdp), rng=7)

    class Recording:
        """An environment that is handed on with the agent."""

        def __init__(self):
            self.env, self.actions = AdversarialWorld(mdp), []

        def reset(self, seed=None):
            return self.env.reset(seed=seed)

        def step(self, action):
            self.actions.append(action)
            return self.env.step(action)

    whole, first, second = fresh(), fresh(), fresh()
    assert isinstance(whole, Agent)
    uninterrupted = Recording()
    rewards = play(whole, uninterrupted, 400, seed=5)
    assert ((rewards == 0) | (rewards == -1)).all()

    interrupted = Recording()
    play(first, interrupted, 200, seed=5)  # 66 episodes and two steps
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), default=_plain), object_hook=_arrays))
    observation = np.array([interrupted.env.layer, interrupted.env.state])
    for _ in range(200):
        action = second.act(observation)
        following, reward, terminated, _, _ = interrupted.step(action)
        second.observe(observation, action, reward, following, terminated=terminated)
        observation = interrupted.reset()[0] if terminated else following
    assert interrupted.actions == uninterrupted.actions
    np.testing.assert_array_equal(second.learner.policies, whole.learner.policies)


def _plain(value):
    return {"array": value.tolist(), "dtype": str(value.dtype)}


def _arrays(value):
    return np.array(value["array"], value["dtype"]) if value.keys() == {"array", "dtype"} else value


@pytest.mark.parametrize("name", ["log_barrier", "magnitude_reduced", "exp3", "lsvi_ucb", "sampled"])
def test_learners_beat_the_uniform_policy_where_losses_stay(name, without_shape_checks):
    mdp = random_adversarial_mdp(K, "stationary", rng=2)
    uniform = mdp.regret(np.full((K, 3, 4, 6), 1 / 6))[-1]
    learner = MAKERS[name](mdp)
    found = play_side_by_side(learner, [mdp], rng=0)
    assert found.final[0] < 0.9 * uniform
    # drawn losses are the exact ones plus noise of at most 1 a step, in an episode with H steps
    assert abs(found.realised[0, -1] - found.final[0]) < 5 * 3 * np.sqrt(K) / 2


def test_only_the_shifted_estimate_keeps_its_bound(without_shape_checks):
    mdp = random_adversarial_mdp(600, "decoy", rng=0)
    options = OPTIONS | {"gamma": 4 / 600}
    shifted = PolicyOptimizer(mdp.features, mdp.P, n_episodes=600, method="magnitude_reduced", rng=0, **options)
    barrier = PolicyOptimizer(mdp.features, mdp.P, n_episodes=600, rng=0, **options)
    for learner in (shifted, barrier):
        play_side_by_side(learner, [mdp], rng=0)
    assert shifted.below_bound[0] == 0
    assert barrier.below_bound[0] > 0
    assert barrier.lowest_scaled_estimate[0] < shifted.lowest_scaled_estimate[0]


def test_many_samples_come_close_to_the_exact_update(mdp, without_shape_checks):
    options = OPTIONS | {"gamma": 0.1, "method": "magnitude_reduced", "n_episodes": K}
    exact = PolicyOptimizer(mdp.features, mdp.P, rng=0, **options)
    sampled = PolicyOptimizer(
        mdp.features, mdp.P, covariance="sample", n_covariance_samples=10**7, n_estimate_samples=10**7, rng=0, **options
    )
    resampled = PolicyOptimizer(mdp.features, mdp.P, covariance="resampling", rng=0, **options)
    episode = np.array([[0, 2, 1]]), np.array([[3, 0, 5]]), np.array([[0.5, 1.0, 0.0]])
    for learner in (exact, sampled, resampled):
        learner.tell(*episode)
    np.testing.assert_allclose(sampled.cumulative, exact.cumulative, atol=0.02)
    np.testing.assert_allclose(resampled.cumulative, exact.cumulative, atol=0.5)
    assert exact.simulator_calls == 0
    assert sampled.simulator_calls == 2 * 10**7
    assert resampled.simulator_calls > 20_000


# Algorithm 3


def test_an_epoch_estimates_q_and_the_dilated_bonus(without_shape_checks):
    """Long epochs, every state known: after one of them C is Q - B of the uniform policy, up to noise and ridge."""
    episodes, cover, gamma = 12_000, 50, 1e-3
    mdp = random_adversarial_mdp(episodes + cover, "stationary", rng=4)
    learner = LinearMDPOptimizer(
        mdp.features,
        n_episodes=episodes + cover,
        epoch=episodes,
        cover_episodes=cover,
        explore=0.3,
        known_up_to=1e6,
        beta_scale=0.002,
        gamma=gamma,
        rng=0,
    )
    play_side_by_side(learner, [mdp], rng=1)
    uniform = np.full((3, 4, 6), 1 / 6)
    _, Q = evaluate_policy(mdp.P, mdp.losses(0), uniform)
    cover_policies = np.eye(6)[learner.cover_actions[0]]
    sigma = 0.7 * covariance(mdp.features, occupancy_measures(mdp.P, uniform, mdp.start))
    for h in range(3):  # an exploring episode that turns at h has the cover's states there, and uniform actions
        mixed = np.where((np.arange(3) < h)[:, None, None], cover_policies, uniform)
        at_turn = occupancy_measures(mdp.P, mixed, mdp.start).mean(axis=0)
        sigma[h] += 0.3 * covariance(mdp.features, at_turn)[h]
    bonus = local_bonus(mdp.features, ridge_inverse(sigma, gamma), uniform, learner.parameters.beta)
    B = dilated_bonus(mdp.P, uniform, bonus)
    assert B.max() > 0.5
    weights = occupancy_measures(mdp.P, uniform, mdp.start)
    error = np.sqrt((weights * (learner.cumulative[0] - Q + B) ** 2).sum(axis=(1, 2)))
    assert (error < 0.15).all()  # 2 H sqrt(d / 6000), and the same for B


def test_unknown_states_are_played_uniformly(without_shape_checks):
    mdp = random_adversarial_mdp(300, "stationary", rng=4)
    learner = LinearMDPOptimizer(mdp.features, n_episodes=300, known_up_to=4.0, gamma=0.3, eta_scale=48.0, rng=0)
    play_side_by_side(learner, [mdp], rng=1)
    assert 0 < learner.known.sum() < learner.known.size
    np.testing.assert_allclose(learner.epoch_policies[~learner.known], 1 / 6)
    assert np.abs(learner.epoch_policies[learner.known] - 1 / 6).max() > 0.01


def test_the_cover_opens_a_lock_that_uniform_play_hardly_ever_opens(without_shape_checks):
    lock = combination_lock(5, 3, rng=0)
    mdp = AdversarialMDP(lock.P, lock.features, np.zeros((400, 5, 6)))
    learner = LinearMDPOptimizer(mdp.features, n_episodes=400, cover_episodes=400, rng=0)
    play_side_by_side(learner, [mdp], rng=1)
    cover = occupancy_measures(mdp.P, np.eye(3)[learner.cover_actions[0]], mdp.start).mean(axis=0)
    assert cover[4, 0].sum() > 10 * 3.0**-4


def test_algorithm_3_beats_the_uniform_policy_without_a_simulator(without_shape_checks):
    processes = [random_adversarial_mdp(2000, "stationary", rng=seed) for seed in range(4)]
    learner = LinearMDPOptimizer(
        np.stack([p.features for p in processes]),
        n_episodes=2000,
        cover_episodes=50,
        explore=0.1,
        known_up_to=60.0,
        gamma=0.1,
        eta_scale=48.0,
        beta_scale=5e-4,
        rng=0,
    )
    found = play_side_by_side(learner, processes, rng=0)
    uniform = [p.regret(np.full((2000, 3, 4, 6), 1 / 6))[-1] for p in processes]
    assert found.final.sum() < 0.95 * np.sum(uniform)


# Regret


def test_regret_is_that_of_the_exact_process(mdp, without_shape_checks):
    rng = np.random.default_rng(0)
    policy = rng.dirichlet(np.ones(6), (3, 4))
    found = play_side_by_side(FixedPolicy(policy, n_episodes=K), [mdp], rng=0)
    np.testing.assert_allclose(found.expected[0], mdp.regret(np.broadcast_to(policy, (K, 3, 4, 6))), atol=1e-9)
    best = np.eye(6)[mdp.best_fixed().policy]
    assert play_side_by_side(FixedPolicy(best, n_episodes=K), [mdp], rng=0).final[0] == pytest.approx(0, abs=1e-9)


def test_the_comparator_is_the_best_of_all_deterministic_policies():
    mdp = random_adversarial_mdp(30, "switching", rng=1, horizon=2, n_states=2, n_actions=3, dim=3)
    totals = [
        mdp.values(np.broadcast_to(np.eye(3)[np.reshape(choice, (2, 2))], (30, 2, 2, 3))).sum()
        for choice in itertools.product(range(3), repeat=4)
    ]
    assert mdp.comparator().sum() == pytest.approx(min(totals), rel=1e-12)


def test_a_play_that_was_ended_early_goes_on(mdp, without_shape_checks):
    whole, halted = MAKERS["linear_mdp"](mdp), MAKERS["linear_mdp"](mdp)
    at_once = play_side_by_side(whole, [mdp], rng=3).expected
    rng = np.random.default_rng(3)
    first = play_side_by_side(halted, [mdp], rng=rng, callback=lambda k: k == 100).expected
    assert first.shape == (1, 100)
    second = play_side_by_side(halted, [mdp], rng=rng).expected
    np.testing.assert_allclose(np.concatenate([first, first[:, -1:] + second], axis=1), at_once, atol=1e-9)
    with pytest.raises(ValueError, match="episodes"):
        play_side_by_side(halted, [mdp], rng=rng)


# Refusals


def changed(mdp, **arrays):
    return PolicyOptimizer(**{"features": mdp.features, "P": mdp.P, "n_episodes": K, "rng": 0} | arrays)


FLAT = np.zeros((3, 4, 6, 5))
FLAT[..., 0] = 1
REFUSED = [
    ("features", lambda m: changed(m, features=3 * m.features)),
    ("features must span 5", lambda m: changed(m, features=FLAT)),
    ("features", lambda m: changed(m, features=m.features[0])),
    ("features", lambda m: changed(m, features=m.features * np.nan)),
    ("P ", lambda m: changed(m, P=2 * m.P)),
    ("P ", lambda m: changed(m, P=m.P[:2])),
    ("start", lambda m: changed(m, start=np.array([0.5, 0.0, 0.0, 0.0]))),
    ("method", lambda m: changed(m, method="ppo")),
    ("covariance", lambda m: changed(m, covariance="guess")),
    ("n_episodes", lambda m: changed(m, n_episodes=0)),
    ("eta_scale", lambda m: changed(m, eta_scale=-1.0)),
    ("gamma", lambda m: changed(m, gamma=0.0)),
    ("n_estimate_samples", lambda m: changed(m, n_estimate_samples=0)),
    ("losses", lambda m: changed(m).tell(np.zeros((1, 3), int), np.zeros((1, 3), int), np.full((1, 3), 1.5))),
    ("losses", lambda m: changed(m).tell(np.zeros((1, 3), int), np.zeros((1, 3), int), np.full((1, 3), np.nan))),
    ("states", lambda m: changed(m).tell(np.full((1, 3), 4), np.zeros((1, 3), int), np.zeros((1, 3)))),
    ("states", lambda m: changed(m).tell(np.zeros((1, 2), int), np.zeros((1, 2), int), np.zeros((1, 2)))),
    ("features must span", lambda m: LinearMDPOptimizer(FLAT, n_episodes=K, rng=0)),
    ("cover_episodes", lambda m: LinearMDPOptimizer(m.features, n_episodes=K, cover_episodes=K + 1, rng=0)),
    ("epoch", lambda m: LinearMDPOptimizer(m.features, n_episodes=K, epoch=1, rng=0)),
    ("explore", lambda m: LinearMDPOptimizer(m.features, n_episodes=K, explore=1.5, rng=0)),
    ("known_up_to", lambda m: LinearMDPOptimizer(m.features, n_episodes=K, known_up_to=0.0, rng=0)),
    ("ridge", lambda m: LSVIUCB(m.features, n_episodes=K, ridge=0.0)),
    ("bonus_scale", lambda m: LSVIUCB(m.features, n_episodes=K, bonus_scale=-1.0)),
    ("n_actions", lambda m: Exp3(3, 4, 0, n_episodes=K)),
    ("policy", lambda m: FixedPolicy(np.full((3, 4, 6), 0.5), n_episodes=K)),
    ("state", lambda m: changed(m).load_state_dict(Exp3(2, 4, 6, n_episodes=K).state_dict())),
    ("processes", lambda m: play_side_by_side(changed(m), [m, m], rng=0)),
    ("processes", lambda m: play_side_by_side(changed(m, n_episodes=K + 1), [m], rng=0)),
    ("reward", lambda m: EpisodicAgent(changed(m), rng=0).observe((0, 0), 0, 0.5, (1, 0))),
    ("layer", lambda m: EpisodicAgent(changed(m), rng=0).observe((1, 0), 0, -0.5, (2, 0))),
    ("3 steps", lambda m: EpisodicAgent(changed(m), rng=0).observe((0, 0), 0, -0.5, (1, 0), terminated=True)),
    ("action", lambda m: EpisodicAgent(changed(m), rng=0).observe((0, 0), 6, -0.5, (1, 0))),
]


@pytest.mark.parametrize(("name", "call"), REFUSED)
def test_bad_input_is_named_before_anything_is_learnt(name, call, mdp, without_shape_checks):
    with pytest.raises(ValueError, match=name):
        call(mdp)


def test_a_refused_episode_leaves_the_learner_as_it_was(mdp, without_shape_checks):
    learner = MAKERS["sampled"](mdp)
    before = learner.state_dict()
    with pytest.raises(ValueError, match="losses"):
        learner.tell(np.zeros((1, 3), int), np.zeros((1, 3), int), np.full((1, 3), -0.1))
    after = learner.state_dict()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_environments_that_do_not_fit_are_refused(mdp, without_shape_checks):
    gymnasium = pytest.importorskip("gymnasium")
    from locally.control.environments.worlds import AdversarialWorld

    learner = MAKERS["log_barrier"](mdp)
    env = AdversarialWorld(mdp)
    env.action_space = gymnasium.spaces.Box(-1, 1)
    with pytest.raises(TypeError, match="discrete"):
        EpisodicAgent.for_env(env, learner, rng=0)
    env.action_space = gymnasium.spaces.Discrete(3)
    with pytest.raises(ValueError, match="n_actions"):
        EpisodicAgent.for_env(env, learner, rng=0)
    with pytest.raises(ValueError, match="observations"):
        EpisodicAgent.for_env(AdversarialWorld(random_adversarial_mdp(5, rng=0, n_states=3)), learner, rng=0)
    with pytest.raises(TypeError, match="one run"):
        EpisodicAgent(Exp3(1, 1, 2, n_episodes=3, n_runs=2), rng=0)
    with pytest.raises(TypeError, match="pair"):
        EpisodicAgent(learner, rng=0).act(3)


def test_nothing_but_the_worlds_needs_gymnasium():
    import subprocess
    import sys

    code = "import sys; sys.modules['gymnasium'] = None; import locally.control.adversarial"
    subprocess.run([sys.executable, "-c", code], check=True)
