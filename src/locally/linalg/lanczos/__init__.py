"""Spectra of symmetric matrices that are known only by their products: Lanczos on torch, with every vector kept.

Krylov bases with full reorthogonalisation, so that single precision breeds no ghost eigenvalues; extreme eigenpairs by
thick restarts; spectral densities and traces of functions by stochastic Lanczos quadrature. Sources: Lanczos (1950);
Wu and Simon, SIAM J. Matrix Anal. 22 (2000), for the restart; Ubaru, Chen and Saad, SIAM J. Matrix Anal. 38 (2017),
for the quadrature.
"""

from locally.linalg.lanczos.extremes import Eigenpairs, ExtremeEigenvalues, Status
from locally.linalg.lanczos.measure import Estimate, SpectralMeasure
from locally.linalg.lanczos.quadrature import spectral_measure
from locally.linalg.lanczos.recurrence import KrylovBasis, Operator, Product, lanczos

__all__ = [
    "Eigenpairs",
    "Estimate",
    "ExtremeEigenvalues",
    "KrylovBasis",
    "Operator",
    "Product",
    "SpectralMeasure",
    "Status",
    "lanczos",
    "spectral_measure",
]
