"""Exact answers for finite Markov decision processes: what learners are measured against.

Over a fixed horizon by backward induction (`solve_episodic`, `evaluate_policy`, `occupancy_measures`); for the
long-run average reward by policy iteration, relative value iteration or a linear programme (`solve_average_reward`).
Source: Puterman, Markov Decision Processes (1994), chapters 4, 8 and 9.
"""

from locally.control.dynamic_programming.average import (
    AverageRewardSolution,
    PolicyGain,
    Status,
    evaluate_gain,
    limiting_matrix,
    solve_average_reward,
)
from locally.control.dynamic_programming.episodic import (
    EpisodicSolution,
    evaluate_policy,
    greedy_policy,
    occupancy_measures,
    solve_episodic,
)

__all__ = [
    "AverageRewardSolution",
    "EpisodicSolution",
    "PolicyGain",
    "Status",
    "evaluate_gain",
    "evaluate_policy",
    "greedy_policy",
    "limiting_matrix",
    "occupancy_measures",
    "solve_average_reward",
    "solve_episodic",
]
