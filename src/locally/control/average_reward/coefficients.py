"""The average-reward generalised eluder coefficient (AGEC): from features, and as one run shows it.

Source: arXiv 2404.12648, Definition of AGEC: dominance d_G ties Bellman errors on the way to errors on past data,
transferability kappa_G says that what fitted the past goes on fitting; the switches are at most of order kappa_G log T.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from locally.checks import check_positive, check_shape
from locally.control.average_reward.agents import Epoch
from locally.control.environments.processes import ContinuingMDP
from locally.control.validity import check_unit_ball


def agec_linear(features: Float[ndarray, "T d"], lam: float = 1.0) -> float:
    """2 log det(I + sum phi phi' / lam): the elliptical potential, which bounds both coefficients of linear classes.

    At most 2 d log(1 + T / (lam d)) for features in the unit ball. O(T d^2 + d^3).

    Raises:
        ValueError: a feature is longer than 1, lam is not positive.

    >>> round(agec_linear(np.eye(3)), 4)  # 6 log 2
    4.1589
    """
    check_shape("features", features, (None, None))
    check_unit_ball("features", features)
    check_positive("lam", lam)
    return 2 * float(np.linalg.slogdet(np.eye(features.shape[1]) + features.T @ features / lam)[1])


def agec_of_visits(visits: Float[ndarray, "S A"] | Int[ndarray, "S A"], lam: float = 1.0) -> float:
    """`agec_linear` of one feature a cell: 2 sum log(1 + n / lam).

    >>> agec_of_visits(np.zeros((2, 2)))
    0.0
    """
    check_positive("lam", lam)
    return 2 * float(np.log1p(visits / lam).sum())


@dataclass(frozen=True)
class EluderEstimate:
    """Smallest coefficients that one run is consistent with, lower-order terms left out.

    Attributes:
        dominance: (sum_t E_t)^2 / sum_t sum_(i < t) E_t(i)^2, where E_t(i) is the Bellman error of the hypothesis at t
            on the pair visited at i, and E_t = E_t(t). Steps whose past error is 0 are lower-order and left out.
        transferability: sum_t E_t^2 / (log T max_t sum_(i < t) E_t(i)^2).
        bellman_regret: sum_t E_t, which bounds the regret up to the span of V at each switch.
    """

    dominance: float
    transferability: float
    bellman_regret: float


def agec_of_run(
    mdp: ContinuingMDP,
    epochs: Sequence[Epoch],
    states: Int[ndarray, " T"],
    actions: Int[ndarray, " T"],
) -> EluderEstimate:
    """Both coefficients along a run of LOOP, from the true process.

    Args:
        mdp: the process that was walked.
        epochs: `LOOP.epochs_` of an agent that began with this run.
        states, actions: every step of it, as `run_continuing(..., keep=True)` returns them.

    Raises:
        ValueError: the trajectory is empty or of uneven lengths.

    Complexity: O(T + epochs S^2 A).

    >>> from locally.control.average_reward import LOOP, TabularValue, run_continuing
    >>> from locally.control.environments import riverswim
    >>> agent, mdp = LOOP(TabularValue(6, 2), horizon=2000, span=6.4, rng=0), riverswim()
    >>> run = run_continuing(mdp, agent, 2000, seed=0, keep=True)
    >>> estimate = agec_of_run(mdp, agent.epochs_, run.states, run.actions)
    >>> bool(0 < estimate.transferability < agec_of_visits(run.visits))
    True
    """
    check_shape("actions", actions, states.shape)
    if states.size < 2:
        raise ValueError(f"states must hold at least 2 steps, got {states.size}")
    counts = np.zeros(mdp.R.shape)
    ends = [*(e.start for e in epochs[1:]), states.size]
    error_sum = square_sum = past_sum = worst = 0.0
    for epoch, stop in zip(epochs, ends):
        w = np.minimum(epoch.plan.w, 1 + epoch.plan.V.max())
        error = w - mdp.R - mdp.P @ epoch.plan.V
        s, a = states[epoch.start : stop], actions[epoch.start : stop]
        here = error[s, a]
        before = (counts * error**2).sum()
        past = before + np.cumsum(here**2) - here**2  # of the steps before each
        known = past > 0
        error_sum += np.abs(here[known]).sum()
        square_sum += (here[known] ** 2).sum()
        past_sum += past.sum()
        worst = max(worst, float(past.max(initial=0.0)))
        np.add.at(counts, (s, a), 1)
    total = float("nan") if past_sum == 0 else error_sum**2 / past_sum
    transfer = float("nan") if worst == 0 else square_sum / (worst * np.log(states.size))
    return EluderEstimate(float(total), float(transfer), float(error_sum))
