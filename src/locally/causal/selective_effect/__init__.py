"""Average treatment effects when the instrument may itself act on the outcome.

For observational data with a treatment A, an outcome Y, covariates X, confounding that nobody measured, and an
instrument Z whose exclusion restriction is in doubt. The effect is identified by the instrument moving the *variance*
of the treatment. `MultiplyRobustIVATE` has parametric working models of which one set of four must be right;
`InvalidIVATE` takes any scikit-learn learners; `SelectiveIVATE` chooses among them by how little the effect moves;
`ContrastIVATE` takes instruments of more than two values. Source: arXiv 1907.11882.
"""

from locally.causal.selective_effect.baselines import genius, least_squares, lewbel, two_stage_least_squares
from locally.causal.selective_effect.contrast import ContrastIVATE
from locally.causal.selective_effect.debiased import InvalidIVATE
from locally.causal.selective_effect.diagnostics import Overlap, Sensitivity
from locally.causal.selective_effect.effect import Effect, Status, Table
from locally.causal.selective_effect.effect_learners import PlugInEffect, SieveEffect
from locally.causal.selective_effect.influence import WorkingValues, efficient_influence
from locally.causal.selective_effect.observations import Observations
from locally.causal.selective_effect.parametric import MultiplyRobustIVATE
from locally.causal.selective_effect.selection import Selection, pseudo_risk, smooth_weights
from locally.causal.selective_effect.selective import SelectiveIVATE

__all__ = [
    "ContrastIVATE",
    "Effect",
    "InvalidIVATE",
    "MultiplyRobustIVATE",
    "Observations",
    "Overlap",
    "PlugInEffect",
    "Selection",
    "SelectiveIVATE",
    "Sensitivity",
    "SieveEffect",
    "Status",
    "Table",
    "WorkingValues",
    "efficient_influence",
    "genius",
    "least_squares",
    "lewbel",
    "pseudo_risk",
    "smooth_weights",
    "two_stage_least_squares",
]
