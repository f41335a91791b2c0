"""What a continuing finite process is learnt with otherwise, with the same interface as LOOP.

UCRL2, posterior sampling (PSRL, TSDE) and OLSVI.FH choose policies by episodes; optimistic and differential Q-learning
change their values every step.
"""

from locally.control.average_reward.baselines.least_squares import OLSVI
from locally.control.average_reward.baselines.q_learning import DifferentialQLearning, OptimisticQLearning
from locally.control.average_reward.baselines.tabular import PSRL, TSDE, UCRL2

__all__ = ["OLSVI", "PSRL", "TSDE", "UCRL2", "DifferentialQLearning", "OptimisticQLearning"]
