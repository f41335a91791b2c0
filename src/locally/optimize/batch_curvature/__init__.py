"""How sharp the loss looks through a batch of any size, and the learning rates that this allows.

Spectra of the Hessian and Gauss-Newton matrix over all data and over batches, the sampling noise along their extreme
eigenvectors, what random matrix theory makes of it, the scaling rules for SGD and Adam, and a learner that sets rate
and momentum in mid-training. Source: Granziol, Zohren and Roberts (arXiv 2006.09092).
"""

from locally.optimize.batch_curvature.measuring import BatchCurvature, BatchExtremes, sampling_noise
from locally.optimize.batch_curvature.random_matrices import (
    Regime,
    Shifted,
    effective_batch_size,
    marchenko_pastur_density,
    semicircle_density,
    spiked_covariance,
    spiked_wigner,
)
from locally.optimize.batch_curvature.report import BatchNoise, BatchPrediction, CurvatureReport, Noise
from locally.optimize.batch_curvature.rules import (
    HeavyBall,
    largest_adam_learning_rate,
    largest_learning_rate,
    optimal_heavy_ball,
    scale_damping,
    scale_learning_rate,
)
from locally.optimize.batch_curvature.scheduling import BatchSizeLR
from locally.optimize.batch_curvature.stability import LearningRateSweep, Sweep
from locally.optimize.batch_curvature.tuning import CurvatureTuner, Tuning, TuningStatus

__all__ = [
    "BatchCurvature",
    "BatchExtremes",
    "BatchNoise",
    "BatchPrediction",
    "BatchSizeLR",
    "CurvatureReport",
    "CurvatureTuner",
    "HeavyBall",
    "LearningRateSweep",
    "Noise",
    "Regime",
    "Shifted",
    "Sweep",
    "Tuning",
    "TuningStatus",
    "effective_batch_size",
    "largest_adam_learning_rate",
    "largest_learning_rate",
    "marchenko_pastur_density",
    "optimal_heavy_ball",
    "sampling_noise",
    "scale_damping",
    "scale_learning_rate",
    "semicircle_density",
    "spiked_covariance",
    "spiked_wigner",
]
