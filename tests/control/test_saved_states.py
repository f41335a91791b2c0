"""States of another problem are refused whole, and compiled loops are given no index that they would not find."""

import copy

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from sklearn.exceptions import NotFittedError

from locally.control.adversarial import (
    LSVIUCB,
    EpisodicAgent,
    Exp3,
    QueryLinearMDPOptimizer,
    QueryPolicyOptimizer,
)
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
    KernelValue,
    LinearMixture,
    LinearValue,
    OptimisticQLearning,
    TabularValue,
    Trace,
    Walk,
    optimistic_plan,
    run_continuing,
)
from locally.control.environments import one_hot_features, random_linear_mixture, riverswim
from locally.control.world_model import (
    DeepQ,
    DynaAgent,
    LosseFTLRegressor,
    LosseWorldModel,
    NetworkRegressor,
    SoftActorCritic,
    TabularQ,
)

pytestmark = pytest.mark.usefixtures("without_shape_checks")

SETTING = {"horizon": 500, "span": 3.0}


def models(n_states, ups=(0.2, 0.35)):
    rivers = [riverswim(n_states, up=up) for up in ups]
    return [m.P for m in rivers], [m.R for m in rivers]


def mixture(n_states):
    mdp = random_linear_mixture(n_states, 2, 3, rng=0)
    return LinearMixture(mdp.mixture, rewards=mdp.R)


# by the number of states
CLASSES = {
    "tables": lambda S: TabularValue(S, 2),
    "features": lambda S: LinearValue(one_hot_features(S, 2)),
    "kernel": lambda S: KernelValue(np.eye(2 * S), S),
    "mixture": mixture,
    "list": lambda S: FiniteValue.of_models(*models(S)),
    "models": lambda S: FiniteModels(*models(S)),
}
AGENTS = {
    "LOOP": lambda S: LOOP(TabularValue(S, 2), rng=0, **SETTING),
    "MLE-LOOP": lambda S: MLELOOP(FiniteModels(*models(S)), rng=0, **SETTING),
    "UCRL2": lambda S: UCRL2(S, 2),
    "PSRL": lambda S: PSRL(S, 2, rng=0),
    "TSDE": lambda S: TSDE(S, 2, rng=0),
    "optimistic Q": lambda S: OptimisticQLearning(S, 2, **SETTING),
    "differential Q": lambda S: DifferentialQLearning(S, 2, rng=0),
    "OLSVI": lambda S: OLSVI(one_hot_features(S, 2), **SETTING),
}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return np.array_equal(a, b, equal_nan=True)
    return a == b or (a != a and b != b)


def refuses(target, state, match="state|shape|sizes"):
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match=match):
        target.load_state_dict(state)
    assert same(before, target.state_dict())


# Average reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("target", "source"), [(8, 6), (6, 8)])
@pytest.mark.parametrize("name", [*CLASSES, *AGENTS])
def test_a_state_of_another_size_is_refused(name, target, source):
    make = (CLASSES | AGENTS)[name]
    other = make(source)
    if name in AGENTS and name != "optimistic Q":
        run_continuing(riverswim(source), other, 40, seed=0)
    refuses(make(target), other.state_dict())


@pytest.mark.parametrize("make", [FiniteValue.of_models, FiniteModels])
def test_a_state_of_another_list_is_refused(make):
    refuses(make(*models(6)), make(*models(6, ups=(0.2, 0.3))).state_dict(), match="hypothesis 1 has gain")
    refuses(make(*models(6)), make(*models(6)).state_dict() | {"current": 2}, match="current")


@pytest.mark.parametrize("name", ["LOOP", "MLE-LOOP", "UCRL2", "OLSVI"])
def test_a_policy_of_actions_that_do_not_exist_is_refused(name):
    agent = AGENTS[name](6)
    run_continuing(riverswim(), agent, 40, seed=0)
    for action in (2, -1):
        state = copy.deepcopy(agent.state_dict())
        place = state["epochs"][-1] if "epochs" in state else state
        place["policy"] = np.full_like(place["policy"], action)
        refuses(AGENTS[name](6), state, match="must hold actions 0, ..., 1")


@pytest.mark.parametrize("name", ["LOOP", "PSRL", "differential Q"])
def test_a_state_of_another_generator_is_refused(name):
    state = AGENTS[name](6).state_dict() | {"rng": np.random.MT19937(0).state}
    refuses(AGENTS[name](6), state, match="PCG64")


def test_a_state_without_an_array_or_with_other_numbers_is_refused():
    state = TabularValue(6, 2).state_dict()
    refuses(TabularValue(6, 2), {k: v for k, v in state.items() if k != "visits"}, match="visits")
    refuses(TabularValue(6, 2), state | {"visits": np.full((6, 2), 1j)}, match="visits as float64")
    refuses(LOOP(TabularValue(6, 2), **SETTING), LOOP(TabularValue(6, 2), **SETTING).state_dict() | {"due": False})


def test_a_walk_goes_on_in_no_state_that_the_process_lacks():
    walk = Walk(riverswim(), seed=0)
    for state in (6, -1):
        refuses(walk, walk.state_dict() | {"state": state}, match="state must be one of")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    ("step", "names"),
    [
        ((6, 0, 0.0, 0), "state"),
        ((-1, 0, 0.0, 0), "state"),
        ((0, 2, 0.0, 0), "action"),
        ((0, -1, 0.0, 0), "action"),
        ((0, 0, 0.0, 6), "following"),
        ((0, 0, 0.0, -1), "following"),
        ((0, 0, 1.5, 0), "reward"),
        ((0, 0, float("nan"), 0), "reward"),
    ],
)
def test_a_step_that_is_none_is_refused_before_it_is_learnt(name, step, names):
    hypotheses = CLASSES[name](6)
    hypotheses.plan(1.0, 3.0, np.random.default_rng(0))
    before = copy.deepcopy(hypotheses.state_dict())
    with pytest.raises(ValueError, match=f"^{names} must"):
        hypotheses.add(*step)
    assert same(before, hypotheses.state_dict())
    with pytest.raises(TypeError, match="state must be an integer"):
        hypotheses.add(float("nan"), 0, 0.0, 0)


@pytest.mark.parametrize("name", [*CLASSES, "LOOP", "UCRL2", "optimistic Q", "differential Q"])
def test_a_walk_of_another_size_is_refused(name):
    trace, walk = Trace.empty(5), Walk(riverswim(8), seed=0)
    if name in CLASSES:
        hypotheses = CLASSES[name](6)
        plan = hypotheses.plan(1.0, 3.0, np.random.default_rng(0))
        with pytest.raises(ValueError, match="walk must have n_states = 6, got 8"):
            hypotheses.advance(walk, plan, 1.0, trace, 0)
        plan.policy[0] = 2
        with pytest.raises(ValueError, match="policy must hold actions"):
            hypotheses.advance(Walk(riverswim(), seed=0), plan, 1.0, trace, 0)
        return
    with pytest.raises(ValueError, match="walk must have n_states = 6, got 8"):
        AGENTS[name](6).advance(walk, trace)


def test_a_trace_has_as_many_states_and_actions_as_rewards():
    with pytest.raises(ValueError, match="states must have shape"):
        Trace(np.zeros(2, np.int64), np.zeros(5, np.int64), np.zeros(5))
    with pytest.raises(ValueError, match="actions must have shape"):
        Trace(np.zeros(5, np.int64), np.zeros(2, np.int64), np.zeros(5))


def test_a_plan_asks_for_arrays_of_one_size():
    with pytest.raises(ValueError, match="P must have shape"):
        optimistic_plan(np.ones((2, 2, 2)) / 2, np.zeros((6, 2)), np.ones((6, 2)), 1.0, rng=0)


# Adversarial losses ---------------------------------------------------------------------------------------------------


class Coin:
    def start(self, rng):
        return 0

    def step(self, h, state, action, rng):
        return int(rng.integers(2))


def query(n_actions=2, dim=2, n_episodes=6, **options):
    def features(h, x):
        return np.eye(n_actions, dim)

    options = {"horizon": 2, "n_covariance_samples": 5, "n_estimate_samples": 3, "rng": 0} | options
    return QueryPolicyOptimizer(features, Coin(), n_actions=n_actions, dim=dim, n_episodes=n_episodes, **options)


def played(agent, episodes=3, steps=0):
    for e in range(episodes + 1):
        for h in range(2 if e < episodes else steps):
            agent.observe((h, 0), 0, -0.5, (h + 1, 0), terminated=h == 1)
    return agent


@pytest.mark.parametrize(
    "changes",
    [{"n_actions": 3}, {"dim": 3}, {"n_episodes": 2}, {"horizon": 3}, {"method": "magnitude_reduced"}],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_query_agent_refuses_the_state_of_another(changes, steps):
    refuses(query(**changes), played(query(), steps=steps).state_dict(), match="state must")


def test_a_query_agent_loads_what_a_longer_study_had_played():
    first = played(query(), steps=1)
    second = query()
    second.load_state_dict(first.state_dict())
    assert same(first.state_dict(), second.state_dict())
    np.testing.assert_array_equal(first.action_probabilities(1, 0), second.action_probabilities(1, 0))


def test_a_linear_query_agent_refuses_the_state_of_another():
    def make(n_actions):
        return QueryLinearMDPOptimizer(
            lambda h, x: np.eye(n_actions), n_actions=n_actions, dim=n_actions, horizon=2, n_episodes=60, rng=0
        )

    refuses(make(2), make(3).state_dict())


def test_learners_of_layers_refuse_the_state_of_another():
    features = {S: np.tile(np.eye(2 * S).reshape(S, 2, -1) / 2, (2, 1, 1, 1)) for S in (2, 3)}
    refuses(LSVIUCB(features[2], n_episodes=5), LSVIUCB(features[3], n_episodes=5).state_dict())
    state = LSVIUCB(features[2], n_episodes=5).state_dict()
    refuses(LSVIUCB(features[2], n_episodes=5), state | {"inverse": state["inverse"][..., :1]}, match="inverse")
    agent = EpisodicAgent(Exp3(2, 3, 2, n_episodes=5), rng=0)
    agent.observe(np.array([0, 2]), 1, -0.5, np.array([1, 0]))
    refuses(EpisodicAgent(Exp3(2, 2, 2, n_episodes=5), rng=0), agent.state_dict())
    state = EpisodicAgent(Exp3(2, 2, 2, n_episodes=5), rng=0).state_dict() | {"trajectory": [[0, 2, 0.5]]}
    refuses(EpisodicAgent(Exp3(2, 2, 2, n_episodes=5), rng=0), state, match="action must be one of")


def test_an_episode_of_numbers_that_are_no_integers_is_refused():
    learner = Exp3(1, 2, 2, n_episodes=5)
    with pytest.raises(TypeError, match="states must hold integers"):
        learner.tell(np.array([[np.nan]]), np.array([[0]]), np.array([[0.5]]))


# World models ---------------------------------------------------------------------------------------------------------


def fitted(regressor, width=2, targets=2):
    rng = np.random.default_rng(0)
    return regressor.partial_fit(rng.uniform(-1, 1, (20, width)), rng.standard_normal((20, targets)))


def losse(**options):
    return LosseFTLRegressor(**{"n_grids": 4, "n_bins": 3, "random_state": 0} | options)


@pytest.mark.parametrize("options", [{"storage": "dense"}, {"storage": "rows"}, {"solver": "full"}], ids=str)
def test_a_regressor_refuses_a_damaged_state_and_keeps_its_own(options):
    target, state = fitted(losse(**options)), fitted(losse(**options, n_grids=5)).state_dict()
    refuses(target, state, match="codes")
    good = fitted(losse(**options), width=3).state_dict()
    leader = good["leader"]
    damaged = [good | {"projection": good["projection"][:, :1]}]
    if "slot" in leader:
        damaged += [good | {"leader": leader | {"slot": np.where(leader["slot"] >= 0, 10**6, -1)}}]
        damaged += [good | {"leader": leader | {"R": leader["R"][:1]}}]
    else:
        columns = leader["gram_columns"].copy()
        columns[-1] = 10**6
        damaged += [good | {"leader": leader | {"gram_columns": columns}}]
        damaged += [good | {"leader": leader | {"active": leader["active"] + 10**6}}]
        damaged += [good | {"leader": leader | {"W": leader["W"][:, :1]}}]
    for state in damaged:
        refuses(target, state, match=None)
    target.load_state_dict(good)
    assert same(good, target.state_dict())


def test_remembered_nodes_that_do_not_exist_are_refused():
    regressor = fitted(losse(n_sweeps=1, sweep_memory=8))
    state = regressor.state_dict()
    refuses(regressor, state | {"memory": state["memory"] + 10**6}, match="remember")
    refuses(regressor, state | {"memory": state["memory"][:-1]}, match="memory")


@pytest.mark.parametrize("binning", ["soft", "hard"])
def test_inputs_whose_projections_are_not_finite_are_refused(binning):
    regressor = fitted(losse(binning=binning, scale=1e3), width=64)
    with pytest.raises(ValueError, match="X must be small enough"), np.errstate(all="ignore"):
        regressor.predict(np.resize([1e308, -1e308], (1, 64)))


@pytest.mark.parametrize("make", [losse, lambda: NetworkRegressor((4,), random_state=0)], ids=["codes", "network"])
def test_an_unfitted_state_makes_a_regressor_unfitted(make):
    regressor = fitted(make())
    regressor.load_state_dict(make().state_dict())
    with pytest.raises(NotFittedError):
        regressor.predict(np.zeros((1, 2)))
    assert same(fitted(regressor, width=3, targets=1).state_dict(), fitted(make(), width=3, targets=1).state_dict())


def test_a_network_refuses_the_state_of_another():
    target = fitted(NetworkRegressor((4,), random_state=0))
    refuses(target, fitted(NetworkRegressor((5,), random_state=0), width=3).state_dict(), match="theta")
    state = target.state_dict()
    state["networks"]["path"] = state["networks"]["path"][:, :-1]
    refuses(target, state, match="path")


def dyna(width=2, hidden=4, start_memory=5, learner=DeepQ):
    space = Box(-1, 1, (width,))
    actions = Discrete(2) if learner is DeepQ else Box(-1, 1, (1,))
    made = learner(space, actions, hidden=hidden, generator=torch.Generator().manual_seed(0))
    model = LosseWorldModel(space, actions, n_grids=3, random_state=0)
    return DynaAgent(made, model, n_planning=1, start_memory=start_memory, rng=0)


@pytest.mark.parametrize("learner", [DeepQ, SoftActorCritic])
def test_an_agent_with_a_model_refuses_the_state_of_another(learner):
    def lived(**sizes):
        agent = dyna(learner=learner, **sizes)
        width = sizes.get("width", 2)
        for _ in range(6):
            action = agent.act(np.zeros(width))
            agent.observe(np.zeros(width), action, 0.5, np.full(width, 0.1))
        return agent

    target = lived()
    refuses(target, lived(width=3).state_dict(), match=None)
    refuses(target, lived(hidden=5).state_dict(), match="sizes")
    refuses(target, lived(start_memory=4).state_dict(), match="starts")
    state = lived().state_dict()
    state["model"]["target_scale"] = np.ones(2)
    state["learner"] = dyna(learner=learner).state_dict()["learner"]
    refuses(target, state, match="target_scale")


def test_a_table_refuses_the_state_of_another():
    def table(n):
        return TabularQ(Box(0, n, (1,), int), Discrete(2), rng=0)

    refuses(table(3), table(4).state_dict())
