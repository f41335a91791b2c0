"""Exact solvers against each other, linear programmes and simulation; the processes against what is known of them."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locally.control.dynamic_programming import (
    Status,
    evaluate_gain,
    evaluate_policy,
    limiting_matrix,
    occupancy_measures,
    solve_average_reward,
    solve_episodic,
)
from locally.control.environments import (
    AdversarialMDP,
    ContinuingMDP,
    EpisodicMDP,
    access_control_queue,
    combination_lock,
    decoy_losses,
    drifting_losses,
    garnet,
    missing_arm,
    random_adversarial_mdp,
    random_episodic_linear_mdp,
    random_linear_mdp,
    random_linear_mixture,
    riverswim,
    sample_episodes,
    stationary_losses,
    switching_losses,
)
from locally.control.environments.processes import draw
from locally.control.validity import check_index

seeds = st.integers(0, 2**32 - 1)


def random_process(seed: int, S: int = 5, A: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.full(S, 0.5), (S, A)), rng.random((S, A))


# Average reward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["pi", "rvi", "lp"])
def test_riverswim_has_the_known_gain_and_bias(golden, method):
    known = json.loads((golden / "23-loop" / "optimistic_planner.json").read_text())["riverswim6"]
    mdp = riverswim(6)
    np.testing.assert_array_equal(mdp.P, known["P"])
    np.testing.assert_array_equal(mdp.R, known["R"])
    found = solve_average_reward(mdp.P, mdp.R, method=method, tol=1e-10)
    assert found.success
    assert found.gain == pytest.approx(known["J_star"], abs=1e-8)
    np.testing.assert_allclose(found.bias, known["bias"], atol=1e-8)
    assert found.span == pytest.approx(known["span"], abs=1e-8)
    assert (found.policy == 1).all()


@given(seed=seeds)
def test_three_methods_agree_and_solve_the_optimality_equation(seed):
    P, R = random_process(seed)
    found = {m: solve_average_reward(P, R, method=m) for m in ("pi", "rvi", "lp")}
    for solution in found.values():
        assert solution.success
        assert solution.residual < 1e-8
        np.testing.assert_allclose(solution.gain, found["pi"].gain, atol=1e-8)
        np.testing.assert_allclose(solution.bias, found["pi"].bias, atol=1e-6)
        np.testing.assert_allclose(solution.gain + solution.q, R + P @ solution.bias, atol=1e-9)


@given(seed=seeds)
def test_no_deterministic_policy_has_more_gain(seed):
    P, R = random_process(seed, S=3, A=2)
    best = solve_average_reward(P, R).gain
    gains = [evaluate_gain(P, R, np.array(pi)).gain.max() for pi in itertools.product(range(2), repeat=3)]
    assert max(gains) == pytest.approx(best, abs=1e-9)


@given(seed=seeds, shift=st.floats(-5, 5))
def test_a_constant_reward_moves_the_gain_alone(seed, shift):
    P, R = random_process(seed)
    before, after = solve_average_reward(P, R), solve_average_reward(P, R + shift)
    assert after.gain == pytest.approx(before.gain + shift, abs=1e-8)
    np.testing.assert_allclose(after.bias, before.bias, atol=1e-7)


@settings(max_examples=5)
@given(seed=seeds)
def test_limiting_matrix_is_the_average_of_powers(seed):
    """With a cycle, two recurrent classes and transient states."""
    rng = np.random.default_rng(seed)
    P = np.zeros((6, 6))
    P[0, 1] = P[1, 0] = 1
    P[2:4, 2:4] = rng.dirichlet(np.ones(2), 2)
    P[4:] = rng.dirichlet(np.ones(6), 2)
    limit = limiting_matrix(P)
    powers, average, n = np.eye(6), np.zeros((6, 6)), 5000
    for _ in range(n):
        average += powers / n
        powers = powers @ P
    np.testing.assert_allclose(limit, average, atol=5e-3)
    np.testing.assert_allclose(limit @ P, limit, atol=1e-10)
    np.testing.assert_allclose(P @ limit, limit, atol=1e-10)


def test_evaluation_of_a_policy_solves_its_equations():
    P, R = random_process(3)
    uniform = np.full(R.shape, 1 / 3)
    of = evaluate_gain(P, R, uniform)
    chain, r = P.mean(axis=1), R.mean(axis=1)
    np.testing.assert_allclose(of.gain + of.bias, r + chain @ of.bias, atol=1e-12)
    np.testing.assert_allclose(of.limiting @ of.bias, 0, atol=1e-12)
    assert np.ptp(of.gain) < 1e-12


def test_two_islands_are_named_not_averaged():
    P = np.eye(2)[:, None, :]
    found = solve_average_reward(P, np.array([[0.2], [0.9]]))
    assert found.status is Status.GAIN_VARIES
    assert found.gain == 0.9


def test_too_few_sweeps_end_in_a_status():
    mdp = riverswim(10)
    assert solve_average_reward(mdp.P, mdp.R, method="rvi", max_iter=5).status is Status.ITERATION_LIMIT


def test_a_solve_that_the_callback_ends_says_so():
    mdp, seen = riverswim(10), []
    found = solve_average_reward(mdp.P, mdp.R, method="rvi", callback=lambda n, width: bool(seen.append(n)) or n == 3)
    assert seen == [1, 2, 3]
    assert (found.status, found.n_iter, found.success) == (Status.STOPPED, 3, False)
    long = riverswim(100)  # policy iteration goes up the river for twelve rounds
    found = solve_average_reward(long.P, long.R, callback=lambda n, residual: n == 2)
    assert (found.status, found.n_iter) == (Status.STOPPED, 2)
    found = solve_average_reward(mdp.P, mdp.R, callback=lambda n, residual: True)  # had converged by then
    assert (found.status, found.n_iter) == (Status.CONVERGED, 1)


@pytest.mark.parametrize("n", [6, 20, 40])
def test_swimming_up_is_optimal_in_long_rivers(n):
    solution = riverswim(n).solve()
    assert solution.success
    assert (solution.policy == 1).all()
    assert (np.diff(solution.bias) > 0).all()


# Episodes -------------------------------------------------------------------------------------------------------------


@given(seed=seeds)
def test_backward_induction_is_the_best_of_all_policies(seed):
    rng = np.random.default_rng(seed)
    P, R, start = rng.dirichlet(np.ones(2), (2, 2, 2)), rng.random((2, 2, 2)), rng.dirichlet(np.ones(2))
    every = np.array([np.eye(2)[np.reshape(c, (2, 2))] for c in itertools.product(range(2), repeat=4)])
    values = (occupancy_measures(P, every, start) * R).sum(axis=(-3, -2, -1))
    found = solve_episodic(P, R, start)
    assert found.value == pytest.approx(values.max())
    V, Q = evaluate_policy(P, R, np.eye(2)[found.policy])
    np.testing.assert_allclose(V, found.V)
    np.testing.assert_allclose(Q, found.Q)


@given(seed=seeds)
def test_occupancies_and_values_are_dual(seed):
    rng = np.random.default_rng(seed)
    mdp = random_episodic_linear_mdp(rng=rng)
    policies = rng.dirichlet(np.ones(6), (5, 3, 4))
    occupancy = occupancy_measures(mdp.P, policies, mdp.start)
    np.testing.assert_allclose(occupancy.sum(axis=(-2, -1)), 1)
    V, _ = evaluate_policy(mdp.P, mdp.R, policies)
    np.testing.assert_allclose(mdp.values(policies), V[:, 0] @ mdp.start)


def test_sampled_episodes_have_the_exact_mean_and_occupancy():
    mdp = random_episodic_linear_mdp(rng=1)
    policy = np.random.default_rng(0).dirichlet(np.ones(6), (3, 4))
    seen = sample_episodes(mdp, policy, 20_000, np.random.default_rng(2))
    assert seen.rewards.sum(axis=1).mean() == pytest.approx(mdp.values(policy), abs=5 * 0.9 / np.sqrt(20_000))
    occupancy = occupancy_measures(mdp.P, policy, mdp.start)
    for h in range(3):
        counts = np.zeros((4, 6))
        np.add.at(counts, (seen.states[:, h], seen.actions[:, h]), 1)
        assert np.abs(counts / 20_000 - occupancy[h]).max() < 0.02
    np.testing.assert_array_equal(seen.next_states[:, :-1], seen.states[:, 1:])


def test_inversion_never_leaves_the_support():
    P = np.array([[0.3, 0.7, 0.0]])
    cumulative = EpisodicMDP(P[None, :, None].repeat(3, axis=1), np.zeros((1, 3, 1))).cumulative[0, 0]
    assert draw(cumulative, np.array([np.nextafter(1, 0)])) == 1
    assert draw(cumulative, np.array([0.0])) == 0


@given(horizon=st.integers(1, 8), slip=st.floats(0, 1), decoy=st.floats(0, 1), seed=seeds)
def test_the_lock_is_worth_the_better_of_opening_and_jamming(horizon, slip, decoy, seed):
    """The last right action pays 1 whether the lock jams afterwards or not."""
    value = combination_lock(horizon, 3, rng=seed, slip=slip, decoy=decoy).solve().value
    expected = max(1.0, decoy)
    for _ in range(horizon - 1):
        expected = max((1 - slip) * expected, decoy)
    assert value == pytest.approx(expected)


def test_the_missing_arm_has_its_known_values():
    mdp = missing_arm()
    assert mdp.solve().value == pytest.approx(0.75)
    P, R = mdp.P.copy(), mdp.R.copy()
    R[1, 2, 3] = 0  # without the arm
    assert solve_episodic(P, R, mdp.start).value == pytest.approx(0.65)


@given(seed=seeds)
def test_linear_processes_are_linear(seed):
    mdp = random_linear_mdp(rng=seed)
    flat = mdp.features.reshape(-1, 4)
    for target in (mdp.P.reshape(30, -1), mdp.R.reshape(30, 1)):
        fit = np.linalg.lstsq(flat, target)[0]
        np.testing.assert_allclose(flat @ fit, target, atol=1e-9)
    mixed = random_linear_mixture(rng=seed)
    theta = np.linalg.lstsq(mixed.mixture.reshape(-1, 4), mixed.P.ravel())[0]
    np.testing.assert_allclose(mixed.mixture @ theta, mixed.P, atol=1e-9)
    assert theta.min() > -1e-9
    assert theta.sum() == pytest.approx(1)


def test_other_continuing_processes_are_solvable():
    assert garnet(rng=0, branching=2).solve().success
    queue = access_control_queue()
    assert queue.solve().gain == pytest.approx(queue_gain(queue), abs=1e-6)
    idle = queue.solve().policy.reshape(11, 4)
    assert (idle[1:, 3] == 1).all()  # the best customers are always served
    assert idle[1, 0] == 0  # the last server is not wasted on the worst


def queue_gain(queue: ContinuingMDP) -> float:
    return solve_average_reward(queue.P, queue.R, method="lp").gain


# Losses ---------------------------------------------------------------------------------------------------------------


def test_schedules_are_what_they_say():
    base = np.array([[0.3, 0.6]])
    assert (stationary_losses(base, 5) == base).all()
    decoy = decoy_losses(base, 8)
    np.testing.assert_allclose(decoy[:2], [1 - base] * 2)
    np.testing.assert_allclose(decoy[2:], [base] * 6)
    switching = switching_losses(base, 9, pieces=3)
    np.testing.assert_allclose(switching[[0, 2, 6]], [base] * 3)
    np.testing.assert_allclose(switching[[3, 5]], [1 - base] * 2)
    drift = drifting_losses(base, 400)
    assert drift.min() >= 0
    assert drift.max() <= 1
    np.testing.assert_allclose(drift[0, 0], np.clip(base[0] + 0.35 * np.sin([0, 2.1]), 0, 1))
    np.testing.assert_allclose(drift[100, 0, 0], 0.3 + 0.35 * np.sin(2 * np.pi * 1.5 / 4))


@pytest.mark.parametrize("schedule", ["stationary", "drifting", "decoy", "switching"])
def test_regret_is_against_the_best_fixed_policy(schedule):
    mdp = random_adversarial_mdp(60, schedule, rng=3, n_states=2, n_actions=2, horizon=2)
    best = mdp.best_fixed()
    policy = np.eye(2)[best.policy]
    np.testing.assert_allclose(mdp.regret(np.broadcast_to(policy, (60, 2, 2, 2))), 0, atol=1e-12)
    every = (np.eye(2)[np.reshape(c, (2, 2))] for c in itertools.product(range(2), repeat=4))
    totals = [mdp.values(np.broadcast_to(pi, (60, 2, 2, 2))).sum() for pi in every]
    assert min(totals) == pytest.approx(-60 * best.value)
    rng = np.random.default_rng(0)
    policies = rng.dirichlet(np.ones(2), (60, 2, 2))
    by_hand = [(occupancy_measures(mdp.P, policies[k], mdp.start) * mdp.losses(k)).sum() for k in range(60)]
    np.testing.assert_allclose(mdp.values(policies), by_hand)
    np.testing.assert_allclose(mdp.values(policies[5:9], slice(5, 9)), by_hand[5:9])


def test_the_same_seed_gives_the_same_transitions_under_every_schedule():
    one, other = (random_adversarial_mdp(k, s, rng=4) for k, s in ((10, "decoy"), (50, "drifting")))
    np.testing.assert_array_equal(one.P, other.P)
    np.testing.assert_array_equal(one.features, other.features)


# Refusals -------------------------------------------------------------------------------------------------------------


def test_what_is_no_process_is_refused_by_name(without_shape_checks):
    good = riverswim()
    with pytest.raises(ValueError, match="P must sum to 1"):
        ContinuingMDP(good.P * 0.9, good.R)
    with pytest.raises(ValueError, match="P must hold probabilities"):
        ContinuingMDP(good.P - np.eye(6)[:, None, :] * 3, good.R)
    with pytest.raises(ValueError, match="R must lie in"):
        ContinuingMDP(good.P, good.R * 2)
    with pytest.raises(ValueError, match="R holds NaN"):
        ContinuingMDP(good.P, good.R * np.nan)
    with pytest.raises(ValueError, match="features must have Euclidean norm"):
        ContinuingMDP(good.P, good.R, features=np.ones((6, 2, 2)))
    with pytest.raises(ValueError, match="noise must be one of"):
        ContinuingMDP(good.P, good.R, noise="gaussian")
    lock = combination_lock(2, 2, rng=0)
    with pytest.raises(ValueError, match="P must be features @ measures"):
        EpisodicMDP(lock.P, lock.R, features=lock.features, measures=lock.measures[::-1].copy() * 0.5)
    with pytest.raises(ValueError, match="losses"):
        AdversarialMDP(lock.P, lock.features, np.full((3, 2, 4), 1.5))
    with pytest.raises(ValueError, match="n_states must be at least 2"):
        riverswim(1)
    with pytest.raises(ValueError, match="down must lie in"):
        riverswim(up=0.9, down=0.2)
    with pytest.raises(ValueError, match="schedule must be one of"):
        random_adversarial_mdp(5, "sudden", rng=0)


@pytest.mark.parametrize("action", [2, -1, 0.5, "up", np.array([0.1])])
def test_only_existing_actions_are_taken(action):
    with pytest.raises((TypeError, ValueError), match="action must be"):
        check_index("action", action, 2)
