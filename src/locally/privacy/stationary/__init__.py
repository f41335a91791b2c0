"""Differentially private stationary points: small gradients of empirical and population risks.

For whoever trains a model under (epsilon, delta)-differential privacy and wants more from the budget than noisy
gradient descent gives: Private SpiderBoost (finite sums), tree-based SPIDER (one pass), recursive regularisation
(convex), a random projection for linear models of low rank, and a training loop for torch modules. Noise is calibrated
by `dp-accounting` (extra `privacy`). Source: arXiv 2206.00846.

>>> import torch
>>> X = torch.nn.functional.normalize(torch.randn(2000, 20, generator=torch.Generator().manual_seed(0)))
>>> model = LinearModel(X, (X[:, 0] > 0).float(), data_norm=1.0)
>>> method = PrivateSpiderBoost(epsilon=1.0, delta=1e-6, steps=64, phase=16)
>>> found = method.minimize(model, rng=0)
>>> found.status, round(found.privacy.epsilon, 2)
(<Status.FINISHED: 'finished'>, 1.0)
"""

from locally.privacy.stationary.accounting import (
    Accountant,
    Adjacency,
    Composition,
    Mechanism,
    PrivacyStatement,
    Sampling,
    calibrate,
    spent_epsilon,
)
from locally.privacy.stationary.auditing import Audit, audit, audit_spiderboost, worst_case_pair
from locally.privacy.stationary.convex import RecursiveRegularization, Solver
from locally.privacy.stationary.estimator import PrivateLinearClassifier
from locally.privacy.stationary.glm import (
    LOGISTIC,
    SIGMOID_SQUARE,
    GlmLoss,
    JohnsonLindenstrauss,
    LinearModel,
    Method,
    huber,
    projection_dimension,
)
from locally.privacy.stationary.instances import HardInstance
from locally.privacy.stationary.objectives import Beyond, Objective, PerExampleObjective
from locally.privacy.stationary.randomness import Randomness, SecureRandomness
from locally.privacy.stationary.result import PrivateResult, Status, Trace
from locally.privacy.stationary.spider import (
    NoisyGradientDescent,
    Output,
    PrivateSpiderBoost,
    Sizes,
    theorem_sizes,
)
from locally.privacy.stationary.training import ModuleObjective, fit_module
from locally.privacy.stationary.tree import PrivateTreeSpider, VariationNoise

__all__ = [
    "LOGISTIC",
    "SIGMOID_SQUARE",
    "Accountant",
    "Adjacency",
    "Audit",
    "Beyond",
    "Composition",
    "GlmLoss",
    "HardInstance",
    "JohnsonLindenstrauss",
    "LinearModel",
    "Mechanism",
    "Method",
    "ModuleObjective",
    "NoisyGradientDescent",
    "Objective",
    "Output",
    "PerExampleObjective",
    "PrivacyStatement",
    "PrivateLinearClassifier",
    "PrivateResult",
    "PrivateSpiderBoost",
    "PrivateTreeSpider",
    "Randomness",
    "RecursiveRegularization",
    "Sampling",
    "SecureRandomness",
    "Sizes",
    "Solver",
    "Status",
    "Trace",
    "VariationNoise",
    "audit",
    "audit_spiderboost",
    "calibrate",
    "fit_module",
    "huber",
    "projection_dimension",
    "spent_epsilon",
    "theorem_sizes",
    "worst_case_pair",
]
