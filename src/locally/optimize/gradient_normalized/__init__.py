"""Gradient-normalized smoothness: regularised Newton steps with exact or approximate curvature, and no constants.

For anyone who minimises a smooth function, convex or not, and has a positive semidefinite curvature matrix at hand:
Gauss-Newton, Fisher, or the Hessian itself, as a matrix, of low rank or as products. `gns_minimize` is the function,
`gns_method` plugs into `scipy.optimize.minimize`, `GNS` trains torch models, `GNSLogisticRegression` fits tables.
Source: arXiv 2506.13710.
"""

from typing import TYPE_CHECKING, Any

from locally.optimize.gradient_normalized.baselines import (
    CubicNewton,
    FastGradient,
    GradientMethod,
    SuperUniversalNewton,
)
from locally.optimize.gradient_normalized.classifier import GNSLogisticRegression
from locally.optimize.gradient_normalized.method import GradientNormalizedNewton, gns_method, gns_minimize
from locally.optimize.gradient_normalized.metrics import Dense, Diagonal, Euclidean, FactoredMetric, Implicit, Metric
from locally.optimize.gradient_normalized.objectives import (
    LogSumExp,
    PowerResidual,
    chebyshev_chain,
    rosenbrock,
)
from locally.optimize.gradient_normalized.outcome import Status
from locally.optimize.gradient_normalized.regressions import Logistic, Softmax
from locally.optimize.gradient_normalized.smoothness import SmoothnessBound, probe_smoothness
from locally.optimize.gradient_normalized.systems import LowRank

if TYPE_CHECKING:
    from locally.optimize.gradient_normalized.training import GNS

__all__ = [
    "GNS",
    "CubicNewton",
    "Dense",
    "Diagonal",
    "Euclidean",
    "FactoredMetric",
    "FastGradient",
    "GNSLogisticRegression",
    "GradientMethod",
    "GradientNormalizedNewton",
    "Implicit",
    "LogSumExp",
    "Logistic",
    "LowRank",
    "Metric",
    "PowerResidual",
    "SmoothnessBound",
    "Softmax",
    "Status",
    "SuperUniversalNewton",
    "chebyshev_chain",
    "gns_method",
    "gns_minimize",
    "probe_smoothness",
    "rosenbrock",
]


def __getattr__(name: str) -> Any:
    """Torch takes longer to load than most fits take, so only `GNS` loads it."""
    if name == "GNS":
        from locally.optimize.gradient_normalized.training import GNS

        return GNS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
