"""World models on Gymnasium spaces, Dyna with tables, deep Q-learning and an actor-critic, exact resumption."""

import importlib
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from gymnasium.utils.env_checker import check_env

from locally.control.agents import Agent, play
from locally.control.world_model import (
    DeepQ,
    DynaAgent,
    Gridworld,
    LosseFTLRegressor,
    LosseWorldModel,
    NetworkRegressor,
    PointMass,
    SoftActorCritic,
    TabularQ,
    Transitions,
    WorldModel,
    walled_gridworld,
    windy_gridworld,
)

UNIT, SIDE = Box(-1, 1, (2,)), Box(-2, 2, (1,))


def seeded(n):
    return torch.Generator().manual_seed(n)


# Environments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [walled_gridworld, windy_gridworld, PointMass])
def test_environments_are_gymnasiums(make):
    env = make()
    check_env(env, skip_render_check=True)
    rng = np.random.default_rng(0)
    ends = 0
    env.reset(seed=0)
    for _ in range(300):
        action = rng.uniform(-1, 1, 2) if make is PointMass else int(rng.integers(4))
        observation, _, terminated, truncated, _ = env.step(action)
        assert env.observation_space.contains(observation)
        if terminated or truncated:
            ends += 1
            env.reset()
    assert ends


def shortest_way(env):
    """Breadth first; checks the walls and the wind against lengths that are known."""
    front, seen, steps = {tuple(env.start.tolist())}, set(), 0
    while env.goal not in front:
        seen |= front
        front = {tuple(env.after(np.array(cell), a).tolist()) for cell in front for a in range(4)} - seen
        steps += 1
    return steps


def test_known_distances():
    assert shortest_way(walled_gridworld()) == 21
    assert shortest_way(windy_gridworld()) == 15  # Sutton and Barto, example 6.5
    assert shortest_way(Gridworld(8, 8, goal=(7, 7))) == 14


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"goal": (8, 0)}, "goal must lie on the 8 x 8 grid"),
        ({"goal": (3, 3), "walls": [(3, 3)]}, "goal must not be a wall"),
        ({"walls": [(9, 9)]}, "walls must lie"),
        ({"wind": (1, 2)}, "wind must have one entry"),
        ({"width": 0}, "width"),
    ],
)
def test_impossible_grids_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Gridworld(**arguments)


def test_actions_outside_are_refused():
    with pytest.raises(ValueError, match="action must lie"):
        walled_gridworld().step(4)
    with pytest.raises(ValueError, match="two finite numbers"):
        PointMass().step(np.array([np.nan, 0.0]))
    with pytest.raises(ValueError, match="friction"):
        PointMass(friction=1.5)


def test_without_gymnasium_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ImportError, match=r"locally\[control\]"):
        LosseWorldModel(UNIT, Discrete(2))
    monkeypatch.delitem(sys.modules, "locally.control.world_model.environments")
    with pytest.raises(ImportError, match=r"locally\[control\]"):
        importlib.import_module("locally.control.world_model.environments")


# Models ---------------------------------------------------------------------------------------------------------------


def step_of(env, rng):
    """Away from the walls, where what follows is linear."""
    observation = env.observation_space.high * rng.uniform(-0.5, 0.5, 4)
    action = rng.uniform(-1, 1, 2)
    return observation, action, env.after(observation.astype(float), action)


def test_a_model_of_continuous_control_predicts_what_follows():
    env, rng = PointMass(), np.random.default_rng(0)
    model = LosseWorldModel(env.observation_space, env.action_space, n_grids=30, random_state=0)
    for _ in range(800):
        o, a, after = step_of(env, rng)
        model.update(o, a, -float(o[0]), after, terminated=o[1] > 0)
    tests = [step_of(env, rng) for _ in range(200)]
    o, a, after = (np.array(part) for part in zip(*tests))
    found = model.predict(o, a)
    still = np.mean((o - after) ** 2)
    assert np.mean((found.next_observations - after) ** 2) < 0.05 * still
    assert np.abs(found.rewards + o[:, 0]).mean() < 0.05
    assert (found.terminated == (o[:, 1] > 0)).mean() > 0.85


def test_after_the_warm_up_the_scale_is_frozen_and_all_was_learnt_once():
    space = Box(-np.inf, np.inf, (2,))
    model = LosseWorldModel(space, Discrete(2), warm_up=50, n_grids=4, random_state=0)
    rng = np.random.default_rng(0)
    data = 5 + 3 * rng.standard_normal((80, 2))
    with pytest.raises(RuntimeError, match="nothing was learnt"):
        model.predict(data[:1], [0])
    for t, row in enumerate(data):
        assert model.ready == (t >= 50)
        model.update(row, int(t % 2), 1.0, row + 1, terminated=False)
    centre, width = model.scale
    np.testing.assert_allclose(centre, data[:50].mean(axis=0))
    np.testing.assert_allclose(width, data[:50].std(axis=0))
    assert model.regressors[0].n_seen_ == 80
    np.testing.assert_allclose(model.predict(data[:5], [0] * 5).next_observations, data[:5] + 1, atol=0.05)


def test_the_scale_of_targets_does_not_matter_to_a_linear_model():
    rng = np.random.default_rng(0)
    regressor = LosseFTLRegressor(6, random_state=0)
    plain, scaled = (WorldModel(regressor, UNIT, SIDE, target_scale=s) for s in (None, [0.1, 10, 3, 1]))
    for _ in range(60):
        o, a = rng.uniform(-1, 1, 2), rng.uniform(-2, 2, 1)
        for model in (plain, scaled):
            model.update(o, a, 1.0, 0.5 * o, terminated=False)
    o, a = rng.uniform(-1, 1, (9, 2)), rng.uniform(-2, 2, (9, 1))
    for one, other in zip(plain.predict(o, a), scaled.predict(o, a)):
        np.testing.assert_allclose(one, other, atol=1e-8)


def test_a_model_for_each_action_has_no_cross_talk():
    model = LosseWorldModel(UNIT, Discrete(3, start=1), per_action=True, n_grids=4, random_state=0)
    for _ in range(3):
        model.update([0.0, 0.0], 1, 1.0, [0.5, 0.0], terminated=False)
        model.update([0.0, 0.0], 3, -1.0, [-0.5, 0.0], terminated=True)
    found = model.predict(np.zeros((3, 2)), [1, 2, 3])
    np.testing.assert_allclose(found.next_observations[:, 0], [0.5, 0, -0.5], atol=1e-3)
    assert found.terminated.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("spaces", "error", "message"),
    [
        ((Discrete(4), SIDE), TypeError, "observation_space must be a Box"),
        ((Box(0, 1, (2, 2)), SIDE), ValueError, "observation_space must have one dimension"),
        ((UNIT, Dict({"a": SIDE})), TypeError, "action_space must be Box or Discrete"),
        ((UNIT, Box(-np.inf, np.inf, (1,))), ValueError, "action_space must have finite limits"),
        ((UNIT, MultiDiscrete([2, 2])), TypeError, "action_space"),
    ],
)
def test_spaces_that_do_not_fit_are_named_before_the_first_step(spaces, error, message):
    with pytest.raises(error, match=message):
        LosseWorldModel(*spaces)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scaling": "mean"}, ValueError, "scaling"),
        ({"scaling": (np.zeros(2), np.zeros(2))}, ValueError, "width must be positive"),
        ({"scaling": (np.zeros(3), np.ones(3))}, ValueError, "centre must have shape"),
        ({"per_action": True}, ValueError, "per_action"),
        ({"target_scale": [1, 1]}, ValueError, "target_scale must have shape"),
        ({"target_scale": [1, 1, 0, 1]}, ValueError, "target_scale must be positive"),
        ({"regressor": object()}, TypeError, "regressor must have partial_fit"),
    ],
)
def test_arguments_of_a_model_are_checked(arguments, error, message):
    regressor = arguments.pop("regressor", LosseFTLRegressor())
    with pytest.raises(error, match=message):
        WorldModel(regressor, UNIT, SIDE, **arguments)
    with pytest.raises(ValueError, match="finite limits"):
        LosseWorldModel(Box(-np.inf, np.inf, (2,)), SIDE, scaling="limits")


def test_transitions_that_do_not_fit_are_refused_and_not_learnt():
    model = LosseWorldModel(UNIT, Discrete(2), n_grids=2)
    good = ([0.0, 0.0], 1, 0.0, [0.1, 0.0], False)
    bad = {0: [0.0], 1: 5, 2: np.nan, 3: [np.inf, 0.0]}
    for place, value in bad.items():
        with pytest.raises(ValueError, match=r"observation|action|reward"):
            model.update(*(value if i == place else part for i, part in enumerate(good)))
    assert model.n_seen == 0
    model.update(*good)
    with pytest.raises(ValueError, match="observations must have shape"):
        model.predict(np.zeros((1, 3)), [0])
    with pytest.raises(ValueError, match="observations holds NaN"):
        model.predict(np.full((1, 2), np.nan), [0])


# Learners and Dyna ----------------------------------------------------------------------------------------------------


def grid_agent(seed, planning=10, **changes):
    env = Gridworld(5, 5, goal=(4, 4), walls=[(x, 2) for x in range(4)])
    spaces = env.observation_space, env.action_space
    model = LosseWorldModel(
        *spaces, n_grids=16, n_bins=7, projection="normal", scale=(3.0, 3.0, 2, 2, 2, 2), eps=1e-6, random_state=seed
    )
    learner = TabularQ(*spaces, rng=seed)
    agent = DynaAgent(learner, model if planning else None, n_planning=planning, rng=seed, **changes)
    return env, agent


def test_planning_reaches_the_goal_more_often(without_shape_checks):
    goals = {
        n: sum(play(agent, env, 500, seed=s).sum() for s in range(2) for env, agent in [grid_agent(s, n)])
        for n in (0, 10)
    }
    assert goals[10] > 1.3 * goals[0]


def test_q_learning_solves_a_chain_exactly():
    """States 0 ... 3, right leads on, the last step pays 1: Q(s, right) = 0.9^(2 - s)."""
    learner = TabularQ(Box(0, 3, (1,), int), Discrete(2), step_size=1.0, discount=0.9, epsilon=0.0, rng=0)
    s = np.array([[2], [1], [0]])
    learner.learn(Transitions(s, np.ones(3, int), np.array([1.0, 0, 0]), s + 1, np.array([True, False, False])))
    np.testing.assert_allclose(learner.Q[:3, 1], [0.81, 0.9, 1.0])
    assert learner.sample(s).tolist() == [1, 1, 1]
    greedy = TabularQ(MultiDiscrete([4]), Discrete(2), epsilon=0.0, rng=0)
    assert 20 < sum(greedy.act([0]) for _ in range(100)) < 80  # ties are broken at random


def test_deep_q_learning_finds_the_better_action(without_shape_checks):
    learner = DeepQ(UNIT, Discrete(2), lr=3e-3, epsilon=0.0, generator=seeded(0))
    rng = np.random.default_rng(0)
    for _ in range(100):
        o, a = rng.uniform(-1, 1, (32, 2)), rng.integers(2, size=32)
        learner.learn(Transitions(o, a, np.where(a == (o[:, 0] > 0), 1.0, -1.0), o, np.ones(32, bool)))
    o = rng.uniform(-1, 1, (200, 2))
    assert (learner.sample(o) == (o[:, 0] > 0)).mean() > 0.9


def test_the_actor_critic_finds_the_best_action_and_knows_its_density():
    learner = SoftActorCritic(UNIT, SIDE, lr=3e-3, generator=seeded(0))
    rng = np.random.default_rng(0)
    o = torch.from_numpy(rng.uniform(-1, 1, (50, 2))).float()
    squashed, density = learner._draw(o)
    learner.generator.set_state(seeded(0).get_state())
    mean, raw = learner.actor(o).chunk(2, dim=1)
    std = torch.exp(-5 + 7 * (torch.tanh(raw) + 1) / 2)
    law = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, std), [torch.distributions.TanhTransform()]
    )
    torch.testing.assert_close(density, law.log_prob(squashed).sum(1), rtol=1e-3, atol=1e-3)
    for _ in range(150):
        o, a = rng.uniform(-1, 1, (64, 2)), rng.uniform(-2, 2, (64, 1))
        learner.learn(Transitions(o, a, -5 * (a[:, 0] - o[:, 0]) ** 2, o, np.ones(64, bool)))
    o = rng.uniform(-1, 1, (300, 2))
    assert np.corrcoef(learner.sample(o)[:, 0], o[:, 0])[0, 1] > 0.8


def control_agent(seed, regressor=None, **changes):
    env = PointMass()
    spaces = env.observation_space, env.action_space
    model = WorldModel(regressor or LosseFTLRegressor(8, random_state=seed), *spaces)
    learner = SoftActorCritic(*spaces, hidden=32, lr=3e-3, discount=0.9, target_rate=0.02, generator=seeded(seed))
    options = {"n_planning": 4, "planning_batch": 64, "learn_from_real": False} | changes
    return env, DynaAgent(learner, model, rng=seed, **options)


def test_dyna_learns_to_steer_on_imagined_steps_alone(without_shape_checks):
    env, agent = control_agent(0, n_planning=3)
    play(agent, env, 300, seed=0)
    rng = np.random.default_rng(0)
    learnt = np.mean(rewards_of(agent.act, env))
    random = np.mean(rewards_of(lambda _: rng.uniform(-1, 1, 2), env))
    assert learnt > 0.75 * random  # costs are negative: at least a quarter of them is gone


def rewards_of(act, env, steps=300):
    """Six episodes from the same starts for every policy."""
    rewards = []
    observation, _ = env.reset(seed=1)
    for _ in range(steps):
        observation, reward, _, truncated, _ = env.step(act(observation))
        rewards.append(reward)
        if truncated:
            observation, _ = env.reset()
    return rewards


def cart_agent(seed):
    env = gymnasium.make("CartPole-v1")
    spaces = env.observation_space, env.action_space
    model = LosseWorldModel(*spaces, scaling="warm-up", warm_up=15, n_grids=6, random_state=seed)
    return env, DynaAgent(DeepQ(*spaces, generator=seeded(seed)), model, n_planning=2, planning_batch=8, rng=seed)


def network_agent(seed):
    return control_agent(seed, NetworkRegressor((8,), memory="coreset", memory_size=10, random_state=seed))


@pytest.mark.parametrize("make", [grid_agent, control_agent, cart_agent, network_agent])
def test_an_agent_that_loads_its_state_goes_on_exactly(make, without_shape_checks):
    """Twins meet the same steps; one of them is replaced half-way by a fresh agent that loads its state."""
    env, agent = make(0, start_memory=20) if make in (grid_agent, control_agent) else make(0)
    assert isinstance(agent, Agent)
    play(agent, env, 24, seed=0)
    _, other = make(7, start_memory=20) if make in (grid_agent, control_agent) else make(7)
    other.load_state_dict(agent.state_dict())
    mine, theirs = play(agent, env, 12, seed=5), play(other, env, 12, seed=5)
    np.testing.assert_array_equal(mine, theirs)
    if agent.starts is not None:
        np.testing.assert_array_equal(agent.starts, other.starts)


def test_agents_refuse_what_does_not_fit():
    with pytest.raises(TypeError, match="learner must have"):
        DynaAgent(object(), None)
    with pytest.raises(ValueError, match="planning_actions"):
        DynaAgent(TabularQ(Box(0, 3, (1,), int), Discrete(2)), None, planning_actions="best")
    with pytest.raises(TypeError, match="action_space must be a Box"):
        SoftActorCritic(UNIT, Discrete(3))
    with pytest.raises(TypeError, match="action_space must be Discrete"):
        DeepQ(UNIT, SIDE)
    with pytest.raises(TypeError, match="must hold integers"):
        TabularQ(UNIT, Discrete(2))
    with pytest.raises(ValueError, match="observation must have shape"):
        SoftActorCritic(UNIT, SIDE).act(np.zeros(3))
    with pytest.raises(ValueError, match="observation holds NaN"):
        DeepQ(UNIT, Discrete(2)).act(np.array([0.0, np.nan]))
    _, agent = grid_agent(0)
    with pytest.raises(ValueError, match="has a model"):
        grid_agent(0, planning=0)[1].load_state_dict(agent.state_dict())
