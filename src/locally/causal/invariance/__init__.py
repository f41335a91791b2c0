"""Approximately invariant representations and what they guarantee on unseen interventions (arXiv 2205.15196).

Labelled environments go in; a representation, a predictor, its gaps and a certificate come out. `sem` draws linear
structural equation models and their interventions, `bounds` says how many environments it takes.
"""

from locally.causal.invariance.baselines import AnchorRegression, InvariantCausalPrediction, InvariantRiskMinimization
from locally.causal.invariance.bounds import (
    InterventionFamily,
    agnostic_delta,
    finite_class_delta,
    holdout_delta,
    pac_delta,
    pac_environments,
    unrestricted_lift_dimension,
    vc_dimension,
)
from locally.causal.invariance.certificate import Certificate, extrapolation_factor, moment_rank
from locally.causal.invariance.estimators import (
    InvariantSubsetRegressor,
    LinearInvariantRepresentation,
    NoInvariantRepresentation,
    ReusedEnvironment,
)
from locally.causal.invariance.moments import (
    ConstantColumn,
    EnvironmentMoments,
    SingularCovariance,
    TooFewEnvironments,
    TooFewRows,
)
from locally.causal.invariance.regressor import stack_environments
from locally.causal.invariance.search import InvarianceStatus, SubsetFit, search_subsets
from locally.causal.invariance.sem import (
    CyclicGraph,
    InterventionLaw,
    Interventions,
    LatentObservation,
    LinearSEM,
    TargetIntervened,
    random_sem,
)

__all__ = [
    "AnchorRegression",
    "Certificate",
    "ConstantColumn",
    "CyclicGraph",
    "EnvironmentMoments",
    "InterventionFamily",
    "InterventionLaw",
    "Interventions",
    "InvarianceStatus",
    "InvariantCausalPrediction",
    "InvariantRiskMinimization",
    "InvariantSubsetRegressor",
    "LatentObservation",
    "LinearInvariantRepresentation",
    "LinearSEM",
    "NoInvariantRepresentation",
    "ReusedEnvironment",
    "SingularCovariance",
    "SubsetFit",
    "TargetIntervened",
    "TooFewEnvironments",
    "TooFewRows",
    "agnostic_delta",
    "extrapolation_factor",
    "finite_class_delta",
    "holdout_delta",
    "moment_rank",
    "pac_delta",
    "pac_environments",
    "random_sem",
    "search_subsets",
    "stack_environments",
    "unrestricted_lift_dimension",
    "vc_dimension",
]
