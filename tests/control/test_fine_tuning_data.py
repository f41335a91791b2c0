"""Logs and what they refuse, policy classes, least squares against exact answers, learners without certificate."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.control.agents import Agent
from locally.control.dynamic_programming import occupancy_measures
from locally.control.environments import missing_arm, random_episodic_linear_mdp, sample_episodes
from locally.control.fine_tuning import (
    LSVIUCB,
    OfflineDataset,
    bootstrap_policies,
    collect,
    deterministic_policies,
    play_episodes,
    reachable,
    softmax_cover,
    visited_features,
)
from locally.control.fine_tuning import pessimistic_policy as pessimistic
from locally.control.fine_tuning.estimation import Moments
from locally.control.fine_tuning.policies import average_features

SIZES = {"horizon": 2, "n_states": 3, "n_actions": 4}
GOOD = {"layers": [0, 1], "states": [0, 2], "actions": [3, 3], "rewards": [0.0, 1.0], "next_states": [2, 0]}


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6))
def test_visitations_from_infinite_data_are_exact(seed):
    """Expected counts instead of draws: phi^ and V^ are the occupancies' and dynamic programming's."""
    rng = np.random.default_rng(seed)
    mdp = random_episodic_linear_mdp(3, 4, 5, 3, rng=rng, feature_concentration=1.0)
    policies = softmax_cover(mdp.features, 10, rng=rng)
    moments = Moments.zeros(3, 4, 3)
    moments.add(mdp.features, mdp.P, mdp.R)
    fit = moments.fit(1e-14)
    phi = fit.visitations(average_features(mdp.features, policies), mdp.start)
    np.testing.assert_allclose(phi, visited_features(mdp, policies).swapaxes(0, 1), atol=1e-10)
    np.testing.assert_allclose(fit.values(phi), mdp.values(policies), atol=1e-10)


def test_one_hot_features_give_the_empirical_model():
    mdp, rng = missing_arm(), np.random.default_rng(0)
    policies = deterministic_policies(reachable(mdp), 4)
    n = rng.integers(5, 50, mdp.R.shape)
    log = OfflineDataset(*collect(mdp, n, rng), **SIZES)
    np.testing.assert_array_equal(log.visits(), n)
    counts, rewards = log.counts()
    moments = Moments.zeros(2, 3, 12)
    moments.add(mdp.features, counts, rewards)
    np.testing.assert_allclose(moments.covariance, log.covariance(mdp.features))
    np.testing.assert_allclose(moments.covariance, np.stack([np.diag(layer.ravel()) for layer in n]))
    fit = moments.fit(0.01)
    phi = fit.visitations(average_features(mdp.features, policies), mdp.start)
    model = counts[0, 0] / (n[0, 0, :, None] + 0.01)
    first = policies[:, 0, 0].argmax(axis=-1)
    states = model[first]  # of each policy at layer 1
    np.testing.assert_allclose(phi[1].reshape(-1, 3, 4).sum(axis=-1), states)
    chosen = n[1][np.arange(3), policies[:, 1].argmax(axis=-1)]
    np.testing.assert_allclose(fit.widths(phi)[1], (states**2 / (chosen + 0.01)).sum(axis=-1))
    np.testing.assert_allclose(fit.widths_at(1, phi[1]), fit.widths(phi)[1])


def test_batches_have_the_law_of_single_episodes():
    mdp = random_episodic_linear_mdp(3, 4, 3, 3, rng=1)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), (3, 4))
    n = 40_000
    counts, rewards = play_episodes(mdp, policy, n, np.random.default_rng(0))
    np.testing.assert_array_equal(counts.sum(axis=(1, 2, 3)), n)
    for h in range(2):  # who arrives at a state leaves from it
        np.testing.assert_array_equal(counts[h].sum(axis=(0, 1)), counts[h + 1].sum(axis=(1, 2)))
    expected = occupancy_measures(mdp.P, policy, mdp.start)
    np.testing.assert_allclose(counts.sum(axis=-1) / n, expected, atol=5 * 0.5 / np.sqrt(n))
    np.testing.assert_allclose(rewards / n, expected * mdp.R, atol=5 * 0.5 / np.sqrt(n))
    single = sample_episodes(mdp, policy, n, np.random.default_rng(1))
    third = np.bincount(single.states[:, 2] * 3 + single.actions[:, 2], minlength=12).reshape(4, 3)
    np.testing.assert_allclose(counts[2].sum(axis=-1) / n, third / n, atol=7 * 0.5 / np.sqrt(n))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layers": [0, 2]}, ValueError, "layers must lie in 0, ..., 1, but row 1 holds 2"),
        ({"layers": [0, -1]}, ValueError, "layers"),
        ({"states": [3, 0]}, ValueError, "states"),
        ({"actions": [0, 4]}, ValueError, "actions"),
        ({"next_states": [0, 3]}, ValueError, "next_states"),
        ({"states": [0.0, 1.0]}, TypeError, "states must hold integers"),
        ({"actions": [0]}, ValueError, "actions must have shape"),
        ({"rewards": [0.0, 1.5]}, ValueError, "rewards"),
        ({"rewards": [0.0, np.nan]}, ValueError, "rewards"),
        ({"rewards": [0.0]}, ValueError, "rewards"),
    ],
)
def test_impossible_logs_are_refused(change, error, message):
    with pytest.raises(error, match=message):
        OfflineDataset(**(GOOD | change), **SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"actions": [0, 3]}, r"row 0, .* = \(0, 0, 0, 2\), has probability 0"),  # action 0 never reaches state 2
        ({"rewards": [0.0, 0.5]}, "rewards of offline data must be 0 or 1"),
    ],
)
def test_logs_that_the_process_cannot_have_made_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        OfflineDataset(**(GOOD | change), **SIZES).check_possible(missing_arm())
    with pytest.raises(ValueError, match="horizon"):
        OfflineDataset.empty(3, 3, 4).check_possible(missing_arm())


def test_minari_episodes_become_rows():
    episode = SimpleNamespace(
        observations=np.array([[0, 0], [1, 2], [2, 0]]), actions=np.array([3, 1]), rewards=np.array([0.0, 1.0])
    )
    dataset = SimpleNamespace(iterate_episodes=lambda: iter([episode, episode]))
    log = OfflineDataset.from_minari(dataset, **SIZES)
    assert len(log) == 4
    assert log.counts()[0][1, 2, 1, 0] == 2
    assert log.counts()[1][1, 2, 1] == 2
    assert len(OfflineDataset.from_minari([], **SIZES)) == 0
    flat = SimpleNamespace(observations=np.zeros(3, int), actions=np.zeros(2, int), rewards=np.zeros(2))
    with pytest.raises(ValueError, match="observations"):
        OfflineDataset.from_minari([flat], **SIZES)


def test_shares_deal_out_every_row_once():
    log = OfflineDataset(*collect(missing_arm(), np.full((2, 3, 4), 3), np.random.default_rng(0)), **SIZES)
    shares = log.shares(5, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(np.concatenate(shares)), np.arange(len(log)))
    assert {len(s) for s in shares} <= {14, 15}


def test_policy_classes():
    mdp = missing_arm()
    assert reachable(mdp).tolist() == [[True, False, False], [True, True, True]]
    every = deterministic_policies(reachable(mdp), 4)
    assert len(np.unique(every.reshape(256, -1), axis=0)) == 256
    with pytest.raises(ValueError, match="cannot be enumerated"):
        deterministic_policies((3, 5), 4)
    cover = softmax_cover(mdp.features, 50, scale=5, rng=0)
    np.testing.assert_allclose(cover.sum(axis=-1), 1)
    np.testing.assert_array_equal(cover, softmax_cover(mdp.features, 50, scale=5, rng=0))
    assert cover.max(axis=-1).mean() > softmax_cover(mdp.features, 50, scale=0.5, rng=0).max(axis=-1).mean()
    log = OfflineDataset(*collect(mdp, np.full((2, 3, 4), 4000), np.random.default_rng(0)), **SIZES)
    found = bootstrap_policies(mdp.features, log, 5, rng=0)
    np.testing.assert_allclose(mdp.values(found), 0.75)  # with so much data every resample sees the best policy
    with pytest.raises(ValueError, match="offline"):
        bootstrap_policies(mdp.features, OfflineDataset.empty(2, 3, 4), rng=0)
    with pytest.raises(ValueError, match="scale"):
        softmax_cover(mdp.features, 5, scale=0, rng=0)


def test_pessimism_with_one_hot_features_is_value_iteration_with_lower_confidence_bounds():
    mdp, rng = missing_arm(), np.random.default_rng(0)
    n = rng.integers(0, 30, mdp.R.shape)
    n[1, 2, 3] = 0
    log = OfflineDataset(*collect(mdp, n, rng), **SIZES)
    counts, rewards = log.counts()
    V = np.zeros(3)
    for h in (1, 0):
        Q = rewards[h] / (n[h] + 1) + counts[h] / (n[h] + 1)[..., None] @ V - 1 / np.sqrt(n[h] + 1)
        Q = np.clip(Q, 0, 2 - h)
        V = Q.max(axis=-1)
    found = pessimistic(mdp.features, log)
    np.testing.assert_allclose(found.V[0], V, atol=1e-12)
    assert found.value == pytest.approx(V[0])
    assert found.policy[1, 2, 3] == 0  # never what nobody tried
    with pytest.raises(ValueError, match="penalty"):
        pessimistic(mdp.features, log, penalty=-1)
    with pytest.raises(ValueError, match="offline"):
        pessimistic(mdp.features, OfflineDataset.empty(1, 3, 4))


def test_the_optimistic_agent_learns_and_resumes():
    mdp = missing_arm()
    judge = lambda policy: bool(mdp.solve().value - mdp.values(policy[None])[0] < 0.01)
    agent = LSVIUCB(mdp.features, rng=0)
    assert isinstance(agent, Agent)
    assert not judge(agent.greedy_policy())
    agent.advance(mdp, 50)
    twin = LSVIUCB(mdp.features, rng=1)
    twin.load_state_dict(agent.state_dict())
    assert agent.advance(mdp, 3000, judge)
    assert twin.advance(mdp, 3000, judge)
    assert twin.n_episodes == agent.n_episodes
    np.testing.assert_array_equal(twin.greedy_policy(), agent.greedy_policy())
    with pytest.raises(ValueError, match="shape"):
        LSVIUCB(np.eye(2).reshape(1, 1, 2, 2)).load_state_dict(agent.state_dict())
    with pytest.raises(ValueError, match="covariance"):
        agent.load_state_dict(agent.state_dict() | {"covariance": np.eye(2)})
    for bad, message in (((0, 0), "reward"), ((2, 0), "layer"), ((0, 3), "state")):
        with pytest.raises(ValueError, match=message):
            agent.observe(bad, 0, 2.0, (1, 0))
