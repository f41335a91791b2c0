"""Learning to act in a process that never resets: LOOP and MLE-LOOP with general classes of hypotheses, and others.

`LOOP` takes a class (`TabularValue`, `LinearValue`, `KernelValue`, `LinearMixture`, `FiniteValue`, or anything with the
methods of `HypothesisClass`), `MLELOOP` takes `FiniteModels`. All agents follow `locally.control.agents.Agent`;
`run_continuing` measures their regret on processes whose optimum is known. Source: arXiv 2404.12648.
"""

from locally.control.average_reward.agents import LOOP, MLELOOP, Epoch
from locally.control.average_reward.baselines import (
    OLSVI,
    PSRL,
    TSDE,
    UCRL2,
    DifferentialQLearning,
    OptimisticQLearning,
)
from locally.control.average_reward.coefficients import EluderEstimate, agec_linear, agec_of_run, agec_of_visits
from locally.control.average_reward.features import KernelValue, LinearMixture, LinearValue
from locally.control.average_reward.hypotheses import HypothesisClass, squared_loss_beta
from locally.control.average_reward.lists import FiniteModels, FiniteValue
from locally.control.average_reward.planning import Plan, optimistic_plan
from locally.control.average_reward.tables import TabularValue
from locally.control.average_reward.walks import FastAgent, Regret, Trace, Walk, run_continuing

__all__ = [
    "LOOP",
    "MLELOOP",
    "OLSVI",
    "PSRL",
    "TSDE",
    "UCRL2",
    "DifferentialQLearning",
    "EluderEstimate",
    "Epoch",
    "FastAgent",
    "FiniteModels",
    "FiniteValue",
    "HypothesisClass",
    "KernelValue",
    "LinearMixture",
    "LinearValue",
    "OptimisticQLearning",
    "Plan",
    "Regret",
    "TabularValue",
    "Trace",
    "Walk",
    "agec_linear",
    "agec_of_run",
    "agec_of_visits",
    "optimistic_plan",
    "run_continuing",
    "squared_loss_beta",
]
