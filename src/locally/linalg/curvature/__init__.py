"""Curvature matrices of a torch model and its loss, without ever forming them.

Hessian, generalised Gauss-Newton, Fisher and empirical Fisher as products with vectors, for whatever needs the spectrum
of a network, its Newton steps or its noise: Lanczos, conjugate gradients, Hutchinson. Sources: Pearlmutter (1994) for
Hessian-vector products, Schraudolph (2002) and Martens (arXiv 1412.1193) for the factored matrices J^T M J.
"""

from locally.linalg.curvature.batches import Batch, Data
from locally.linalg.curvature.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from locally.linalg.curvature.matrices import EmpiricalFisher, FactoredCurvature, Fisher, GaussNewton, Hessian
from locally.linalg.curvature.operators import CurvatureOperator, Reduction

__all__ = [
    "Batch",
    "Bernoulli",
    "Categorical",
    "CurvatureOperator",
    "Data",
    "EmpiricalFisher",
    "FactoredCurvature",
    "Fisher",
    "GaussNewton",
    "Gaussian",
    "Hessian",
    "Likelihood",
    "Reduction",
]
