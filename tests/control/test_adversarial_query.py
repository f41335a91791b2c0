"""Query mode: the finite learner's policies in expectation, states that never recur, and an agent that goes on."""

import json

import numpy as np
import pytest

from locally.control.adversarial import (
    LinearMDPOptimizer,
    PolicyOptimizer,
    QueryLinearMDPOptimizer,
    QueryPolicyOptimizer,
)
from locally.control.agents import Agent, play
from locally.control.environments import AdversarialMDP, random_adversarial_mdp

K = 40
OPTIONS = {"n_episodes": K, "eta_scale": 16.0, "beta_scale": 0.01, "gamma": 0.2}


class Tabular:
    """A finite process as a simulator; states are numbers."""

    def __init__(self, mdp: AdversarialMDP) -> None:
        self.mdp = mdp

    def start(self, rng):
        return 0

    def step(self, h, state, action, rng):
        return int(rng.choice(self.mdp.n_states, p=self.mdp.P[h, int(state), action]))


class Line:
    """A point that drifts along [0, 1]: no state is ever seen twice."""

    def start(self, rng):
        return rng.random()

    def step(self, h, state, action, rng):
        return float(np.clip(state + 0.1 * (2 * action - 1) + 0.05 * rng.standard_normal(), 0, 1))


def bumps(h, x):
    """Two actions, each with a constant and a slope."""
    phi = np.zeros((2, 4))
    phi[0, :2] = phi[1, 2:] = np.array([1.0, float(x)]) / np.sqrt(2)
    return phi


@pytest.fixture(scope="module")
def mdp() -> AdversarialMDP:
    return random_adversarial_mdp(K, "drifting", rng=0, horizon=2, n_states=3, n_actions=3, dim=3)


def of_process(mdp, **options):
    return QueryPolicyOptimizer(
        lambda h, x: mdp.features[h, int(x)],
        Tabular(mdp),
        **({"n_actions": 3, "dim": 3, "horizon": 2, "rng": 0} | OPTIONS | options),
    )


def tell(agent, states, actions, losses):
    for h in range(agent.horizon):
        ending = h == agent.horizon - 1
        agent.observe((h, states[h]), actions[h], -losses[h], (h + 1, 0), terminated=ending)


@pytest.mark.parametrize("method", ["log_barrier", "magnitude_reduced"])
def test_queries_agree_with_the_finite_learner_up_to_sampling(method, mdp, without_shape_checks):
    """Many samples, and the mean over agents for the random paths of the bonus."""
    exact = PolicyOptimizer(mdp.features, mdp.P, method=method, rng=0, **OPTIONS)
    agents = [
        of_process(mdp, method=method, n_covariance_samples=400, n_estimate_samples=400, rng=seed) for seed in range(10)
    ]
    rng = np.random.default_rng(1)
    for _ in range(3):
        states, actions, losses = rng.integers(3, size=2), rng.integers(3, size=2), rng.random(2)
        states[0] = 0
        exact.tell(states[None], actions[None], losses[None])
        for agent in agents:
            tell(agent, states, actions, losses)
    for h, s in np.ndindex(2, 3):
        found = np.mean([agent._node(h, s, 3).cumulative for agent in agents], axis=0)
        np.testing.assert_allclose(found, exact.cumulative[0, h, s], atol=0.25)
        policy = np.mean([agent.action_probabilities(h, s) for agent in agents], axis=0)
        np.testing.assert_allclose(policy, exact.policies[0, h, s], atol=0.03)


def test_bonuses_are_drawn_once(mdp, without_shape_checks):
    agent = of_process(mdp, n_covariance_samples=5)
    rng = np.random.default_rng(1)
    for _ in range(5):
        tell(agent, [0, rng.integers(3)], rng.integers(3, size=2), rng.random(2))
    policies = [agent.action_probabilities(h, s) for h in range(2) for s in range(3)]
    calls = agent.simulator_calls
    again = [agent.action_probabilities(h, s) for h in range(2) for s in range(3)]
    np.testing.assert_array_equal(again, policies)
    assert agent.simulator_calls == calls
    # a transition in each simulated episode, and one for each (episode, action) at the states of layer 0
    assert calls == 5 * 5 + 5 * 3 * len(agent._nodes[0])


@pytest.mark.parametrize("method", ["log_barrier", "magnitude_reduced"])
def test_an_agent_on_a_continuum_learns_and_goes_on_where_it_stopped(method, without_shape_checks):
    """Loss 1 for action 1, 0 for action 0, in the last of two layers; the first is free."""

    class World:
        def __init__(self):
            self.rng, self.line, self.taken = np.random.default_rng(0), Line(), []

        def reset(self, seed=None):
            self.h, self.x = 0, self.line.start(self.rng)
            return (0, self.x), {}

        def step(self, action):
            self.taken.append(action)
            loss = float(action == 1 and self.h == 1)
            self.x = self.line.step(self.h, self.x, action, self.rng)
            self.h += 1
            return (self.h, self.x), -loss, self.h == 2, False, {}

    def fresh():
        return QueryPolicyOptimizer(
            bumps,
            Line(),
            n_actions=2,
            dim=4,
            horizon=2,
            n_episodes=30,
            method=method,
            eta_scale=40.0,
            beta_scale=1e-3,
            gamma=0.05,
            n_covariance_samples=4,
            n_estimate_samples=4,
            rng=0,
        )

    whole, first, second = fresh(), fresh(), fresh()
    assert isinstance(whole, Agent)
    world = World()
    play(whole, world, 50)
    assert whole.action_probabilities(1, 0.5)[0] > 0.6

    other = World()
    play(first, other, 27)
    state = json.loads(json.dumps(first.state_dict(), default=_plain), object_hook=_arrays)
    second.load_state_dict(state)
    observation = (other.h, other.x)
    for _ in range(23):
        action = second.act(observation)
        following, reward, terminated, _, _ = other.step(action)
        second.observe(observation, action, reward, following, terminated=terminated)
        observation = other.reset()[0] if terminated else following
    assert other.taken == world.taken


def _plain(value):
    return (
        value.item() if value.ndim == 0 else {"array": value.tolist(), "shape": value.shape, "dtype": str(value.dtype)}
    )


def _arrays(value):
    if value.keys() == {"array", "shape", "dtype"}:
        return np.array(value["array"], value["dtype"]).reshape(value["shape"])
    return value


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("method", lambda m: of_process(m, method="dilated_hedge")),
        ("n_actions", lambda m: of_process(m, n_actions=0)),
        ("horizon", lambda m: of_process(m, horizon=0)),
        ("n_covariance_samples", lambda m: of_process(m, n_covariance_samples=0)),
        ("n_estimate_samples", lambda m: of_process(m, n_estimate_samples=0)),
        ("gamma", lambda m: of_process(m, gamma=0.0)),
        ("features", lambda m: of_process(m, dim=4).act((0, 0))),
        ("h ", lambda m: of_process(m).action_probabilities(2, 0)),
        ("reward", lambda m: of_process(m).observe((0, 0), 0, -2.0, (1, 0))),
        ("layer", lambda m: of_process(m).observe((1, 0), 0, -1.0, (2, 0))),
        ("2 steps", lambda m: of_process(m).observe((0, 0), 0, -1.0, (1, 0), terminated=True)),
        ("action", lambda m: of_process(m).observe((0, 0), 3, -1.0, (1, 0))),
        ("n_episodes", lambda m: [tell(a, [0, 0], [0, 0], [0.5, 0.5]) for a in [of_process(m, n_episodes=1)] * 2]),
        ("layers", lambda m: of_process(m).load_state_dict(of_process(m, horizon=1).state_dict())),
    ],
)
def test_bad_input_is_named(name, call, mdp, without_shape_checks):
    with pytest.raises(ValueError, match=name):
        call(mdp)


def linear(mdp, n_episodes=90, **options):
    settings = {
        "cover_episodes": 30,
        "known_up_to": 20.0,
        "gamma": 0.3,
        "eta_scale": 20.0,
        "beta_scale": 1e-2,
        "rng": 3,
    }
    sizes = {"n_actions": 3, "dim": 3, "horizon": 2}
    return QueryLinearMDPOptimizer(
        lambda h, x: mdp.features[h, int(x)], n_episodes=n_episodes, **(sizes | settings | options)
    )


def test_algorithm_3_by_queries_is_algorithm_3_on_the_table(mdp, without_shape_checks):
    """The same draws in the same order: policies agree in both phases and through the epochs."""
    options = {"cover_episodes": 30, "known_up_to": 20.0, "gamma": 0.3, "eta_scale": 20.0, "beta_scale": 1e-2, "rng": 3}
    table = LinearMDPOptimizer(mdp.features, n_episodes=90, **options)
    agent = linear(mdp)
    rng = np.random.default_rng(0)
    for _ in range(90):
        found = [[agent.action_probabilities(h, s) for s in range(3)] for h in range(2)]
        np.testing.assert_allclose(found, table.policies[0], rtol=1e-6, atol=1e-9)
        s = 0
        states, actions, losses = np.zeros(2, int), np.zeros(2, int), rng.random(2)
        for h in range(2):
            a = rng.choice(3, p=table.policies[0, h, s])
            states[h], actions[h] = s, a
            s = rng.choice(3, p=mdp.P[h, s, a])
        table.tell(states[None], actions[None], losses[None])
        tell(agent, states, actions, losses)
    assert np.abs(table.epoch_policies - 1 / 3).max() > 0.05
    with pytest.raises(ValueError, match="n_episodes"):
        tell(agent, states, actions, losses)


def test_algorithm_3_by_queries_goes_on_where_it_stopped(mdp, without_shape_checks):
    rng = np.random.default_rng(0)
    episodes = [(rng.integers(3, size=2), rng.integers(3, size=2), rng.random(2)) for _ in range(80)]
    whole, first, second = linear(mdp), linear(mdp), linear(mdp)
    for i, (states, actions, losses) in enumerate(episodes):
        tell(whole, states, actions, losses)
        if i < 47:
            tell(first, states, actions, losses)
    states, actions, losses = episodes[47]
    first.observe((0, states[0]), actions[0], -losses[0], (1, states[1]))
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), default=_plain), object_hook=_arrays))
    second.observe((1, states[1]), actions[1], -losses[1], (2, 0), terminated=True)
    for episode in episodes[48:]:
        tell(second, *episode)
    for h, s in np.ndindex(2, 3):
        np.testing.assert_array_equal(second.action_probabilities(h, s), whole.action_probabilities(h, s))
    assert second.act((0, 0)) == whole.act((0, 0))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("epoch", lambda m: linear(m, epoch=1)),
        ("cover_episodes", lambda m: linear(m, cover_episodes=91)),
        ("dim", lambda m: linear(m, dim=0)),
        ("features", lambda m: linear(m, dim=4).act((0, 0))),
        ("reward", lambda m: linear(m).observe((0, 0), 0, 0.1, (1, 0))),
        ("layer", lambda m: linear(m).observe((1, 0), 0, -0.1, (2, 0))),
        ("2 steps", lambda m: linear(m).observe((0, 0), 0, -0.1, (1, 0), truncated=True)),
        ("state", lambda m: linear(m).load_state_dict(linear(m, horizon=1).state_dict())),
    ],
)
def test_bad_input_to_algorithm_3_is_named(name, call, mdp, without_shape_checks):
    with pytest.raises(ValueError, match=name):
        call(mdp)


def test_a_simulator_is_needed(mdp, without_shape_checks):
    with pytest.raises(TypeError, match="simulator"):
        QueryPolicyOptimizer(bumps, None, n_actions=2, dim=4, horizon=2, n_episodes=5, rng=0)
