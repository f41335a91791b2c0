"""Sparse linear regression from records that every user randomises before they leave the device.

For whoever must learn a linear model from people who do not trust the server: a `Client` turns one record into one
report under local differential privacy, a server turns reports into sparse coefficients, and a protocol is what the two
agree on. `NLDPSparseRegression` and `LDPIterativeHardThresholding` simulate both sides on a table in the manner of
scikit-learn. Source: arXiv 2310.07367.
"""

from locally.privacy.regression.calibration import analytic_gaussian_sigma, classical_gaussian_sigma, gaussian_delta
from locally.privacy.regression.client import BudgetSpent, Client, Crowd
from locally.privacy.regression.estimator import (
    ElementarySparseRegression,
    LDPIterativeHardThresholding,
    NLDPSparseRegression,
)
from locally.privacy.regression.mechanisms import BoundExceeded, GaussianRelease, L2BallRandomizer
from locally.privacy.regression.protocols import (
    Beyond,
    Budget,
    Calibration,
    GradientProtocol,
    MomentProtocol,
    OutOfBounds,
    Protocol,
    PublicFeatureProtocol,
)
from locally.privacy.regression.reports import BadRequest, Rejection, Tally
from locally.privacy.regression.samplers import NotPrivateWarning, SecureNoise, SimulatedNoise
from locally.privacy.regression.server import MomentServer, SparseFit, ThresholdingServer
from locally.privacy.regression.simulation import (
    Population,
    simulate_gradient_aggregate,
    simulate_moment_aggregate,
)
from locally.privacy.regression.thresholding import (
    IndefiniteCovariance,
    Status,
    hard_threshold,
    soft_threshold,
    solve_sparse,
)

__all__ = [
    "BadRequest",
    "Beyond",
    "BoundExceeded",
    "Budget",
    "BudgetSpent",
    "Calibration",
    "Client",
    "Crowd",
    "ElementarySparseRegression",
    "GaussianRelease",
    "GradientProtocol",
    "IndefiniteCovariance",
    "L2BallRandomizer",
    "LDPIterativeHardThresholding",
    "MomentProtocol",
    "MomentServer",
    "NLDPSparseRegression",
    "NotPrivateWarning",
    "OutOfBounds",
    "Population",
    "Protocol",
    "PublicFeatureProtocol",
    "Rejection",
    "SecureNoise",
    "SimulatedNoise",
    "SparseFit",
    "Status",
    "Tally",
    "ThresholdingServer",
    "analytic_gaussian_sigma",
    "classical_gaussian_sigma",
    "gaussian_delta",
    "hard_threshold",
    "simulate_gradient_aggregate",
    "simulate_moment_aggregate",
    "soft_threshold",
    "solve_sparse",
]
