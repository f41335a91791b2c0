"""Agents for episodic problems whose losses change arbitrarily, with values linear in known features.

Expected losses of `PolicyOptimizer` stay within O~(sqrt K) of the best fixed policy over K episodes, whatever the
sequence of losses, where a simulator is at hand; `LinearMDPOptimizer` needs no
simulator, at O~(K^(8/9)). Those whose names begin with Query need no list of the states. `EpisodicAgent`
makes a Gymnasium agent of any learner here, `play_side_by_side` measures exact regret of many runs at once. Source:
Dai, Luo, Wei and Zimmert, ICML 2023, arXiv 2301.12942.
"""

from locally.control.adversarial.algorithms import PolicyOptimizer
from locally.control.adversarial.baselines import LSVIUCB, Exp3, FixedPolicy
from locally.control.adversarial.covariance import (
    covariance,
    matrix_geometric_resampling,
    ridge_inverse,
    sampled_covariances,
    samples_for_resampling,
    samples_for_ridge_inverse,
)
from locally.control.adversarial.estimators import dilated_bonus, local_bonus, magnitude_reduced_q, standard_q
from locally.control.adversarial.ftrl import (
    entropy_stability,
    exponential_weights,
    log_barrier_simplex,
    log_barrier_stability,
)
from locally.control.adversarial.learner import EpisodicAgent, Learner
from locally.control.adversarial.linear_mdp import LinearMDPOptimizer
from locally.control.adversarial.parameters import Parameters
from locally.control.adversarial.query import QueryPolicyOptimizer, Simulator
from locally.control.adversarial.query_linear import QueryLinearMDPOptimizer
from locally.control.adversarial.replay import Regret, play_side_by_side

__all__ = [
    "LSVIUCB",
    "EpisodicAgent",
    "Exp3",
    "FixedPolicy",
    "Learner",
    "LinearMDPOptimizer",
    "Parameters",
    "PolicyOptimizer",
    "QueryLinearMDPOptimizer",
    "QueryPolicyOptimizer",
    "Regret",
    "Simulator",
    "covariance",
    "dilated_bonus",
    "entropy_stability",
    "exponential_weights",
    "local_bonus",
    "log_barrier_simplex",
    "log_barrier_stability",
    "magnitude_reduced_q",
    "matrix_geometric_resampling",
    "play_side_by_side",
    "ridge_inverse",
    "sampled_covariances",
    "samples_for_resampling",
    "samples_for_ridge_inverse",
    "standard_q",
]
