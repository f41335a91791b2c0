"""Designs against closed forms, the coefficient against reference brackets, and what must be monotone."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.control.environments import EpisodicMDP, missing_arm, random_episodic_linear_mdp
from locally.control.fine_tuning import (
    deterministic_policies,
    features_of,
    minimal_online_samples,
    offline_to_online_coefficient,
    reachable,
    softmax_cover,
    visited_features,
    xy_design,
)
from locally.control.fine_tuning.design import Status, attention_reward


def outer(vectors):
    return vectors[:, :, None] * vectors[:, None, :]


@settings(max_examples=25)
@given(st.lists(st.integers(0, 200), min_size=2, max_size=6), st.integers(1, 500))
def test_bandit_design_fills_like_water(counts, budget):
    """H = 1, one-hot: the best T p_a + n_a is level over the arms that are filled up."""
    n = np.sort(np.array(counts, float))
    levels = (budget + np.cumsum(n)) / np.arange(1, n.size + 1)
    level = levels[np.append(n[1:], np.inf) >= levels][0]
    arms = np.eye(n.size)
    design = xy_design(arms, outer(arms), budget=budget, base=np.diag(n), rtol=1e-4)
    assert design.status is Status.CONVERGED
    assert design.value == pytest.approx(1 / level, rel=2e-4)
    assert design.lower <= 1 / level * (1 + 1e-9)


def test_a_log_of_100_0_and_40_pulls():
    arms = np.eye(3)
    design = xy_design(arms, outer(arms), budget=60, base=np.diag([100.0, 0.0, 40.0]), rtol=1e-5)
    assert design.value == pytest.approx(1 / 50, rel=1e-5)
    np.testing.assert_allclose(60 * np.diag(design.covariance), [0, 50, 10], atol=0.02)


@pytest.mark.parametrize("d", [2, 4, 7])
def test_kiefer_wolfowitz(d):
    """Without a log the G-optimal value over actions is the dimension."""
    actions = np.random.default_rng(d).standard_normal((40, d))
    actions /= np.linalg.norm(actions, axis=1, keepdims=True)
    design = xy_design(actions, outer(actions))
    assert design.status is Status.CONVERGED
    assert design.lower <= d * (1 + 1e-6)
    assert d * (1 - 1e-6) <= design.value <= d * (1 + 1e-3)


def test_step_limit_keeps_a_valid_bracket():
    actions = np.random.default_rng(0).standard_normal((40, 4))
    design = xy_design(actions, outer(actions), max_steps=1)
    assert design.status is Status.STEP_LIMIT
    assert design.lower <= 4 <= design.value


def test_attention_reward_is_the_gradient():
    """Xi against a finite difference of the soft maximum along phi phi^T."""
    rng = np.random.default_rng(0)
    directions, features = rng.standard_normal((5, 3)), rng.standard_normal((4, 3))
    A = np.eye(3) + outer(directions).sum(axis=0)
    top = np.einsum("vi,ij,vj->v", directions, np.linalg.inv(A), directions).max()

    def soft(A):
        widths = np.einsum("vi,ij,vj->v", directions, np.linalg.inv(A), directions)
        return top / 5 * np.log(np.exp(5 * widths / top).sum())

    slopes = np.array([(soft(A) - soft(A + 1e-6 * np.outer(f, f))) / 1e-6 for f in features])
    reward = attention_reward(directions, np.linalg.inv(A), features)
    np.testing.assert_allclose(reward, slopes / slopes.max(), rtol=1e-4)
    assert not attention_reward(np.zeros((2, 3)), np.eye(3), features).any()


def test_coefficient_lies_in_the_reference_brackets(golden):
    reference = json.loads((golden / "28-ftpedel" / "o2o_coefficient.json").read_text())
    P, R = np.array(reference["P"]), np.array(reference["R"])
    mdp = EpisodicMDP(P / P.sum(axis=-1, keepdims=True), R)
    policies = deterministic_policies(reachable(mdp), 4)
    assert len(policies) == reference["n_policies"]
    np.testing.assert_allclose(np.sort(mdp.values(policies))[-5:], reference["V_all_sorted_top5"], atol=1e-9)
    free = []
    for case in reference["values"]:
        n = np.zeros(R.shape)
        n[0, 0] = n[1] = case["N_off"]
        n[tuple(reference["missing"])] = 0
        found = offline_to_online_coefficient(
            mdp, policies, covariance(mdp, n), case["eps"], case["T"], case["h"], ridge=reference["ridge"]
        )
        bracket = case["C_o2o"]
        assert bracket["lower"] * (1 - 1e-3) <= found.value <= bracket["upper"] * (1 + 1e-3)
        assert found.lower <= found.value
        if case["N_off"] == 0 and case["eps"] == 0.2:
            free.append(found.value * case["T"])
    np.testing.assert_allclose(free, free[0], rtol=2e-3)  # without a log C T is constant


def covariance(mdp, n):
    return np.einsum("hsa,hsai,hsaj->hij", n, features_of(mdp), features_of(mdp))


@settings(max_examples=8)
@given(seed=st.integers(0, 10**6), layer=st.integers(0, 1))
def test_more_of_anything_never_raises_the_coefficient(seed, layer):
    rng = np.random.default_rng(seed)
    mdp = random_episodic_linear_mdp(2, 3, 3, 3, rng=rng)
    policies = softmax_cover(mdp.features, 20, rng=rng)
    n = rng.integers(0, 50, mdp.R.shape).astype(float)
    more = n + rng.integers(0, 50, mdp.R.shape)
    find = lambda log, epsilon, T: offline_to_online_coefficient(
        mdp, policies, covariance(mdp, log), epsilon, T, layer, ridge=1e-3
    )
    plain = find(n, 0.1, 100)
    for better in (find(n, 0.1, 300), find(more, 0.1, 100), find(n, 0.3, 100)):
        assert better.lower <= plain.value
        assert better.value <= plain.value * (1 + 1e-3)
    assert np.isfinite(find(n, 0.1, 0).value)


def test_fewest_episodes_scale_and_vanish():
    """Known figures of the missing arm at beta = 10; the rest covered, what is left grows like 1 / epsilon^2."""
    mdp = missing_arm()
    policies = deterministic_policies(reachable(mdp), 4)

    def needs(epsilon, samples, missing=True):
        n = np.zeros(mdp.R.shape)
        n[0, 0] = n[1] = samples
        if missing:
            n[1, 2, 3] = 0
        return minimal_online_samples(mdp, policies, covariance(mdp, n), epsilon, 10)

    np.testing.assert_allclose(needs(0.2, 0), [1002, 1486], rtol=0.04)
    np.testing.assert_allclose(needs(0.2, 30_000), [0, 85], rtol=0.04)
    np.testing.assert_allclose(needs(0.1, 30_000), [0, 338], rtol=0.04)
    np.testing.assert_array_equal(needs(0.2, 30_000, missing=False), [0, 0])


def test_what_takes_too_many_episodes_is_infinite():
    mdp = missing_arm()
    policies = deterministic_policies(reachable(mdp), 4)[::16]
    assert minimal_online_samples(mdp, policies, None, 0.05, 10, max_samples=100)[0] == np.inf


def test_visited_features_are_occupancies():
    mdp = missing_arm()
    policies = deterministic_policies(reachable(mdp), 4)
    phi = visited_features(mdp, policies)
    np.testing.assert_allclose(phi.sum(axis=-1), 1)
    np.testing.assert_allclose(np.einsum("nhd,hd->n", phi, mdp.R.reshape(2, 12)), mdp.values(policies))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"directions": np.zeros((2, 3))}, "directions"),
        ({"directions": np.full((2, 3), np.nan)}, "directions"),
        ({"budget": -1}, "budget"),
        ({"ridge": 0}, "ridge"),
        ({"rtol": 1}, "rtol"),
        ({"base": np.triu(np.ones((3, 3)))}, "base"),
        ({"oracle": lambda Xi: Xi}, "initial"),
    ],
)
def test_bad_designs_are_named(change, message, without_shape_checks):
    arguments = {"directions": np.eye(3), "oracle": outer(np.eye(3))} | change
    directions, oracle = arguments.pop("directions"), arguments.pop("oracle")
    with pytest.raises(ValueError, match=message):
        xy_design(directions, oracle, **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epsilon": 0.0}, "epsilon"),
        ({"budget": -1.0}, "budget"),
        ({"layer": 2}, "layer"),
        ({"offline_covariance": np.zeros((2, 3, 3))}, "offline_covariance"),
        ({"policies": np.ones((1, 2, 3, 4))}, "policies"),
    ],
)
def test_bad_coverage_questions_are_named(change, message, without_shape_checks):
    mdp = missing_arm()
    arguments = {"policies": np.full((1, 2, 3, 4), 0.25), "offline_covariance": None, "epsilon": 0.1, "budget": 1}
    with pytest.raises(ValueError, match=message):
        offline_to_online_coefficient(mdp, **(arguments | {"layer": 0} | change))
