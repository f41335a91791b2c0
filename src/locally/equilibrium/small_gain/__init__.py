"""Small-Gain Nash: offline certificates that gradient play contracts to one equilibrium (arXiv 2512.06791).

Games, regions and bounds go in; block weights, a margin, a Lipschitz constant, safe steps and a safe ball come out.
"""

from locally.equilibrium.small_gain.certificate import CertificateStatus, SGNCertificate, SmallGainCertifier
from locally.equilibrium.small_gain.dynamics import GradientPlay, Play, PlayStatus, euler, extragradient, rk4
from locally.equilibrium.small_gain.games import DifferentiableGame, Game, QuadraticGame
from locally.equilibrium.small_gain.margins import (
    GameBounds,
    block_bounds,
    comparison_matrix,
    euclidean_margin,
    lipschitz,
    lipschitz_from_blocks,
    margin,
    signed_margin,
)
from locally.equilibrium.small_gain.mirror import (
    FisherGeometry,
    MirrorCertificate,
    NormalFormGame,
    TabularMarkovGame,
    certify_mirror,
    mirror_step,
)
from locally.equilibrium.small_gain.perron import (
    OptimalWeights,
    balanced_weights,
    optimal_weights,
    small_gain,
    timescale_band,
)
from locally.equilibrium.small_gain.regions import Ball, Box, Region, Samples, project_simplices
from locally.equilibrium.small_gain.signed import SignedOptimum, optimal_signed_weights, optimal_step_weights
from locally.equilibrium.small_gain.step_sizes import (
    affine_contraction,
    affine_step_matrix,
    affine_step_max,
    euler_contraction,
    euler_step_max,
    euler_step_opt,
    extragradient_contraction,
    extragradient_step,
    optimistic_step,
    rk4_contraction,
    rk4_guideline,
    rk4_step_opt,
    rk4_step_rigorous,
    stability_threshold,
)

__all__ = [
    "Ball",
    "Box",
    "CertificateStatus",
    "DifferentiableGame",
    "FisherGeometry",
    "Game",
    "GameBounds",
    "GradientPlay",
    "MirrorCertificate",
    "NormalFormGame",
    "OptimalWeights",
    "Play",
    "PlayStatus",
    "QuadraticGame",
    "Region",
    "SGNCertificate",
    "Samples",
    "SignedOptimum",
    "SmallGainCertifier",
    "TabularMarkovGame",
    "affine_contraction",
    "affine_step_matrix",
    "affine_step_max",
    "balanced_weights",
    "block_bounds",
    "certify_mirror",
    "comparison_matrix",
    "euclidean_margin",
    "euler",
    "euler_contraction",
    "euler_step_max",
    "euler_step_opt",
    "extragradient",
    "extragradient_contraction",
    "extragradient_step",
    "lipschitz",
    "lipschitz_from_blocks",
    "margin",
    "mirror_step",
    "optimal_signed_weights",
    "optimal_step_weights",
    "optimal_weights",
    "optimistic_step",
    "project_simplices",
    "rk4",
    "rk4_contraction",
    "rk4_guideline",
    "rk4_step_opt",
    "rk4_step_rigorous",
    "signed_margin",
    "small_gain",
    "stability_threshold",
    "timescale_band",
]
